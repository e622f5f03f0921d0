import copy

import pytest
import torch
from conftest import naming
from torch import nn

from tnt_hf.conversion import load_classifier, load_image_processor
from tnt_hf.data import DataArguments, evaluation_images, load_images, prepare_data
from tnt_hf.evaluation import TopKAccuracy, evaluate_schedules, top_classes
from tnt_hf.examples import BUNDLED_BACKBONE
from tnt_hf.named_schedules import PUBLISHED_SCHEDULES
from tnt_hf.schedules_tnt import Schedule, count_gflops


SCHEDULES = (
    PUBLISHED_SCHEDULES["full"],
    Schedule("single", (2,), (0.6,), 8),
    Schedule("multi", (1, 3), (0.7, 0.5), 9),
)


@pytest.fixture
def batches(images):
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    pixel_values = torch.cat((images, images[:2].flip(-1)))
    return [
        {"pixel_values": pixel_values[:4], "labels": labels[:4]},
        {"pixel_values": pixel_values[4:], "labels": labels[4:]},
    ]


def test_top_k_accuracy_in_percent():
    predictions = [[3, 1, 2, 0, 4], [1, 3, 2, 0, 4], [0, 1, 2, 4, 5], [5, 1, 2, 4, 0]]
    assert TopKAccuracy().compute(predictions=predictions, references=[3, 3, 3, 5]) == {"top1": 50.0, "top5": 75.0}


def test_top_classes_are_the_five_most_probable_or_all():
    assert top_classes(torch.tensor([[0.1, 0.9, 0.3, 0.4, 0.5, 0.6]])).tolist() == [[1, 5, 4, 3, 2]]
    assert top_classes(torch.tensor([[0.1, 0.9, 0.3]])).tolist() == [[1, 2, 0]]


def test_answers_may_be_restricted_to_candidates(make_model, batches):
    model = make_model()
    (row,) = evaluate_schedules(model, batches, SCHEDULES[:1], candidates=[1, 2])
    right = losses = 0
    for batch in batches:
        for logits, label in zip(model(batch["pixel_values"]).logits[:, [1, 2]], batch["labels"].tolist()):
            if label in (1, 2):
                right += logits.argmax().item() + 1 == label
                losses += nn.functional.cross_entropy(logits, torch.tensor(label - 1)).item()
    assert row.top1 == 100 * right / 6
    only = [{name: value[1:3] for name, value in batches[0].items()}]
    (row,) = evaluate_schedules(model, only, SCHEDULES[:1], candidates=[1, 2])
    assert row.loss == pytest.approx(losses / 2, rel=1e-4) and row.top5 == 100


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_keeps_the_class_of_97_percent_of_the_bundled_images_even_with_untrained_heads(dtype):
    torch.manual_seed(0)  # of the scoring heads, which the bundled backbone lacks
    model = load_classifier(BUNDLED_BACKBONE)
    half = copy.deepcopy(model).to(dtype)
    arguments = DataArguments(max_eval_samples=64)
    images = load_images(arguments, train=False, validation=True)
    image_processor = load_image_processor(str(BUNDLED_BACKBONE), "main")
    dataset = prepare_data(images, model, image_processor, arguments)
    examples = evaluation_images(dataset["validation"], image_processor)
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    agreements = []
    for schedule in PUBLISHED_SCHEDULES.values():
        for each in (model, half):
            each.set_schedule(**schedule.settings)
        with torch.inference_mode():
            same = model(pixel_values).logits.argmax(dim=-1) == half(pixel_values).logits.argmax(dim=-1)
        agreements.append(same.double().mean().item())
    assert min(agreements) >= 0.97, agreements


@pytest.mark.parametrize(
    ("token_reduction", "selection", "random_control"), (("drop", "relevance", False), ("cluster", "similarity", True))
)
def test_rows_equal_a_loop_over_single_images(make_model, batches, token_reduction, selection, random_control):
    """Clusters have no random control, as no score has a say."""
    model = make_model(token_reduction=token_reduction)
    rows = evaluate_schedules(model, batches, SCHEDULES, random_control=random_control)
    assert [(row.schedule, row.selection) for row in rows] == [
        ("full", "none"),
        ("single", selection),
        ("multi", selection),
    ]
    pairs = [(image, label) for batch in batches for image, label in zip(batch["pixel_values"], batch["labels"])]
    for row, schedule in zip(rows, SCHEDULES):
        model.set_schedule(**schedule.settings)
        with torch.no_grad():
            logits = torch.cat([model(image[None]).logits for image, _ in pairs])
        labels = torch.stack([label for _, label in pairs])
        ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
        assert row.top1 == pytest.approx(100 * (ranks < 1).float().mean().item())
        assert row.top5 == pytest.approx(100 * (ranks < 5).float().mean().item())
        assert row.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
        assert row.gflops == count_gflops(model.config)
        assert row.num_images == 6 and row.images_per_second > 0


def test_random_control_differs_from_the_learned_scores_and_repeats_with_its_seed(make_model, batches):
    model = make_model()
    losses = [[row.loss for row in evaluate_schedules(model, batches, SCHEDULES, seed=seed)] for seed in (0, 0, 1)]
    selections = [row.selection for row in evaluate_schedules(model, batches, SCHEDULES)]
    assert selections == ["none", "relevance", "random", "relevance", "random"]
    assert losses[0] == losses[1]
    assert losses[0][2] not in (losses[0][1], losses[2][2])
    assert losses[0][1] == losses[2][1]


def test_evaluation_leaves_schedule_and_mode_of_the_model_unchanged(make_model, batches):
    model = make_model(prune_layers=[4], keep_rates=[0.5], num_similar_tokens=3).train()
    evaluate_schedules(model, batches, SCHEDULES)
    assert (model.config.prune_layers, model.config.keep_rates, model.config.num_similar_tokens) == ([4], [0.5], 3)
    assert model.config.selection == "relevance" and model.training


def test_schedule_that_does_not_fit_is_refused_before_any_image_is_read(make_model):
    def unread():
        raise AssertionError("an image was read")
        yield

    with pytest.raises(ValueError, match=naming("'deep'", "`prune_layers`", 7)):
        evaluate_schedules(make_model(), unread(), [Schedule("deep", (7,), (0.5,))])
