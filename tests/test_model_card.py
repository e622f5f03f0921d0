"""Every figure of a card is that of its results file, and what was not measured is not there."""

import re
from dataclasses import replace

import yaml
from conftest import RESULTS, results_row
from huggingface_hub import ModelCard, parse_eval_result_entries

from tnt_hf.publishing import KEPT_TOKENS_PICTURE, eval_results_files, make_card
from tnt_hf.results import PublishedResults


CHECKPOINT = {
    "class": "TntViTForImageClassification",
    "image_size": [32, 48],
    "num_patches": 96,
    "num_parameters": 12345,
    "classes": ["ant", "bee"],
    "schedule": {"prune_layers": [2], "keep_rates": [0.6], "num_similar_tokens": 8},
    "token_reduction": "drop",
    "relevance_weight": 0.05,
}
TRAINING = {
    "base_model": "google/vit-base-patch16-224",
    "base_model_hub_id": "google/vit-base-patch16-224",
    "base_model_revision": "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3",
    "base_model_license": "apache-2.0",
    "dataset": "org/photos",
    "dataset_hub_id": "org/photos",
    "dataset_split": "train",
    "num_images": 4321,
    "augmentation": "crop",
    "trained": "scoring heads",
    "num_trained_parameters": 3845,
    "num_steps": 60,
    "num_epochs": 0.5,
    "images_per_step": 36,
    "learning_rate": 0.0025,
    "loss": 0.71828,
}
PUBLISHED = PublishedResults(
    **{**vars(RESULTS), "checkpoint": CHECKPOINT, "training": TRAINING, "weights_license": "apache-2.0"}
)


def card_of(pictures=(), **changes):
    return make_card(replace(PUBLISHED, **changes), "org/tiny", "tnt-0123456789ab", [*pictures])


def table_of(card):
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_table_holds_the_rows_of_the_results():
    table = table_of(card_of())
    assert [cells[0] for cells in table] == ["full (unpruned)", "2:0.6:8", "2:0.6:8"]
    assert [cells[2] for cells in table] == ["-", "learned", "random"]
    for cells, row in zip(table, RESULTS.rows, strict=True):
        assert cells[3:] == [f"{row.top1:.2f}", f"{row.top5:.2f}", f"{row.gflops:.4f}", f"{row.images_per_second:.1f}"]


def test_size_is_that_of_the_checkpoint():
    assert "12,345 parameters and takes images of 32x48 pixels as 96 patches" in card_of().text


def test_measurement_states_device_dtype_and_batch():
    (line,) = (line for line in card_of().text.splitlines() if line.startswith("Measured: "))
    for fact in ("64 images of the test split", "CPU (test)", "3 CPU threads", "float32", "batch 17", "torch 2.0"):
        assert fact in line


def test_metadata_and_model_index_are_those_of_the_results():
    data = ModelCard(str(card_of())).data  # as read back from the text
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "image-classification",
    )
    assert data.base_model == TRAINING["base_model_hub_id"] and data.metrics == ["accuracy"]
    assert data.datasets == ["org/photos", "zalando-datasets/fashion_mnist"]
    assert {"custom_code", "token-pruning"} <= set(data.tags)
    values = [(result.metric_name, result.metric_value) for result in data.eval_results]
    assert values == [
        ("Top-1 accuracy (%), schedule 2:0.6:8", 84.375),  # the stored schedule first, and no random control
        ("Top-5 accuracy (%), schedule 2:0.6:8", 96.875),
        ("Top-1 accuracy (%), schedule full", 90.625),
        ("Top-5 accuracy (%), schedule full", 96.875),
    ]


def test_eval_results_are_one_file_for_each_schedule_with_its_conditions():
    files = eval_results_files(PUBLISHED)
    assert set(files) == {".eval_results/tnt-hf-2-0-6-8.yaml", ".eval_results/tnt-hf-full.yaml"}
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/tnt-hf-2-0-6-8.yaml"]))
    assert (entry.dataset_id, entry.value) == ("zalando-datasets/fashion_mnist", 84.375)
    assert "64 images of the test split" in entry.notes and "0.6 kept after layer 2" in entry.notes
    assert eval_results_files(replace(PUBLISHED, dataset_hub_id=None)) == {}


def test_training_is_told_as_recorded_and_left_out_if_not():
    text = card_of().text
    for fact in (
        "3845 parameters",
        "4321 images of the train split of org/photos",
        "learning rate: 0.0025",
        "epochs: 0.50",
        "0.7183",
    ):
        assert fact in text
    assert "weight decay" not in text and "None" not in text
    assert "## Training" not in card_of(training=None).text


def test_an_adaptation_is_told_by_what_was_adapted_to_what():
    adapted = {"trained": "LayerNorms and biases", "adaptation_schedules": ["full", "2x"], "self_distillation": True}
    text = card_of(training={**TRAINING, **adapted, "noise_std": 0.02, "size_bias": 0.7}).text
    assert "LayerNorms and biases (3845 parameters)" in text and "under full, 2x, no labels" in text
    assert "size_bias" in text and "noise" not in text.split("## Training")[1]


def test_merging_is_not_told_as_dropping():
    card = card_of(checkpoint={**CHECKPOINT, "token_reduction": "merge"})
    assert "dropp" not in card.text and "drops" not in card.text
    assert "0.6 kept after layer 2, the others merged, 8 by similarity alone" in table_of(card)[1]
    assert "with a weight of 0.05 (`relevance_weight`)." in card.text
    files = eval_results_files(replace(PUBLISHED, checkpoint={**CHECKPOINT, "token_reduction": "merge"}))
    assert "the others merged" in files[".eval_results/tnt-hf-2-0-6-8.yaml"]
    card = card_of(checkpoint={**CHECKPOINT, "token_reduction": "merge", "relevance_weight": 0.0})
    assert "learned and random are the same" in card.text and "sooner" not in card.text
    assert "merg" not in card_of().text


def test_clusters_are_told_to_be_merged_by_similarity_alone():
    rows = [results_row("full", "none", 90.625), results_row("2:0.6:8", "similarity", 84.375)]
    training = {**TRAINING, "trained": "LayerNorms and biases"}
    checkpoint = {**CHECKPOINT, "token_reduction": "cluster"}
    card = card_of([KEPT_TOKENS_PICTURE], checkpoint=checkpoint, rows=rows, training=training)
    assert [cells[2] for cells in table_of(card)] == ["-", "similarity"]
    assert "merges patch tokens into those that they resemble most" in card.text
    assert "leave by their *similarity*\nalone" in card.text and "the others merged" in table_of(card)[1][1]
    assert KEPT_TOKENS_PICTURE in card.text
    assert not re.search("learned|random|scoring head|relevance|dropp|drops", card.text)
    accuracies = [result.metric_value for result in ModelCard(str(card)).data.eval_results]
    assert accuracies == [84.375, 96.875, 90.625, 96.875]  # the stored schedule first


def test_unknown_licences_are_said_to_be_unknown():
    card = card_of(weights_license=None, dataset_license=None)
    assert card.data.license == "unknown"
    assert "- Weights: unknown; neither the publisher nor" in card.text
    assert "- Data: unknown; neither the publisher nor" in card.text
    assert "- Weights: `apache-2.0`." in card_of().text and "- Data: `mit`." in card_of().text


def test_random_control_that_wins_is_not_hidden():
    assert "random selection is at least as accurate" not in card_of().text
    rows = [results_row("2:0.6:8", "relevance", 70.0), results_row("2:0.6:8", "random", 70.0)]
    assert "at least as accurate as the learned scores for 2:0.6:8.**" in card_of(rows=rows).text


def test_only_what_was_measured_appears():
    card = card_of(rows=[results_row("2:0.6:8", "relevance", 84.375)])
    assert len(table_of(card)) == 1 and "unpruned)" not in card.text
    assert "More" + " information needed" not in str(card) and "{{" not in str(card)
    assert KEPT_TOKENS_PICTURE not in card.text
    stored = {"prune_layers": [3], "keep_rates": [0.6], "num_similar_tokens": 8}
    assert "The schedule stored in this repo" not in card_of(checkpoint={**CHECKPOINT, "schedule": stored}).text


def test_lines_to_copy_are_python_and_pin_the_revision():
    blocks = re.findall(r"```python\n(.*?)```", card_of().text, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        compile(block, "card", "exec")
        assert 'revision="tnt-0123456789ab"' in block


def test_names_cannot_break_the_card():
    card = card_of(dataset="a | b\n# c")
    assert "a \\| b # c" in card.text and "\n# c" not in card.text
