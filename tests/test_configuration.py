import json

import numpy as np
import pytest
from conftest import naming

from tnt_hf import TntDeiTConfig, TntViTConfig


@pytest.mark.parametrize("config_class", (TntViTConfig, TntDeiTConfig))
@pytest.mark.parametrize(
    ("fields", "named"),
    (
        ({"prune_layers": [17], "keep_rates": [0.5]}, ("`prune_layers`", "0 to 11", 17)),
        ({"prune_layers": [-1], "keep_rates": [0.5]}, ("`prune_layers`", -1)),
        ({"prune_layers": [1.5], "keep_rates": [0.5]}, ("`prune_layers`", 1.5)),
        ({"prune_layers": [True], "keep_rates": [0.5]}, ("`prune_layers`", True)),
        ({"prune_layers": "2", "keep_rates": [0.5]}, ("`prune_layers`", "'2'")),
        ({"prune_layers": 7, "keep_rates": [0.5]}, ("`prune_layers`", 7)),
        ({"prune_layers": [3, 2], "keep_rates": [0.5, 0.5]}, ("`prune_layers`", [3, 2])),
        ({"prune_layers": [2, 2], "keep_rates": [0.5, 0.5]}, ("`prune_layers`", [2, 2])),
        ({"prune_layers": [2], "keep_rates": [0.5, 0.6]}, ("`keep_rates`", [0.5, 0.6], [2])),
        ({"prune_layers": [2], "keep_rates": [0.0]}, ("`keep_rates`", "(0, 1]", 0.0)),
        ({"prune_layers": [2], "keep_rates": [1.01]}, ("`keep_rates`", "(0, 1]", 1.01)),
        ({"prune_layers": [2], "keep_rates": [float("nan")]}, ("`keep_rates`", "(0, 1]", "nan")),
        ({"prune_layers": [2], "keep_rates": ["half"]}, ("`keep_rates`", "(0, 1]", "'half'")),
        ({"prune_layers": [2], "keep_rates": [0.004]}, ("`keep_rates`", 0.004, 196, "layer 2")),
        ({"num_similar_tokens": -1}, ("`num_similar_tokens`", -1)),
        ({"num_similar_tokens": 2.0}, ("`num_similar_tokens`", 2.0)),
        (
            {"prune_layers": [2], "keep_rates": [0.9], "num_similar_tokens": 25},
            ("`num_similar_tokens`", 20, 25),
        ),
        (
            {"prune_layers": [2], "keep_rates": [0.1], "num_similar_tokens": 25},
            ("`num_similar_tokens`", " 19 ", 25),
        ),
        (
            {"prune_layers": [2, 3], "keep_rates": [0.9, 0.9], "num_similar_tokens": 99},
            ("`num_similar_tokens`", 98, 99),
        ),
        ({"compute_size": 0}, ("`compute_size`", 0)),
        ({"compute_size": -4}, ("`compute_size`", -4)),
        ({"compute_size": 25.6}, ("`compute_size`", 25.6)),
        ({"compute_size": "32"}, ("`compute_size`", "'32'")),
        ({"compute_size": (32, 32, 32)}, ("`compute_size`", (32, 32, 32))),
        ({"compute_size": 15}, ("`compute_size`", "(15, 15)")),
        ({"selection": "attention"}, ("`selection`", "relevance, random", "'attention'")),
        ({"similarity_partition": "even"}, ("`similarity_partition`", "strided, random", "'even'")),
        ({"token_reduction": "pool"}, ("`token_reduction`", "drop, merge, cluster", "'pool'")),
        ({"relevance_weight": -1}, ("`relevance_weight`", -1)),
        ({"size_bias": -0.5}, ("`size_bias`", -0.5)),
        ({"size_bias": "half"}, ("`size_bias`", "'half'")),
        ({"budget_sizes": 160}, ("`budget_sizes`", "pairs", 160)),
        ({"budget_sizes": [3, 160]}, ("`budget_sizes`", "pairs", [3, 160])),
        ({"budget_sizes": [[0, 160]]}, ("`budget_sizes`", "above 0", [[0, 160]])),
        ({"budget_sizes": [[float("inf"), 160]]}, ("`budget_sizes`", "finite", "inf")),
        ({"budget_sizes": [[3, None]]}, ("`budget_sizes`", "pixels", [[3, None]])),
        ({"budget_sizes": [[2, 192], [3, 256]]}, ("`budget_sizes`", [3, 256], "`image_size` 224")),
        ({"budget_sizes": [[3, "160"]]}, ("`budget_sizes`", [3, "160"])),
        ({"noise_std": -0.1}, ("`noise_std`", -0.1)),
        ({"noise_std": float("inf")}, ("`noise_std`", "inf")),
        ({"num_noise_layers": -1}, ("`num_noise_layers`", -1)),
        ({"noise_layer_norm": 1}, ("`noise_layer_norm`", 1)),
        ({"noise_gate": "sigmoid"}, ("`noise_gate`", "softmax, capacity", "'sigmoid'")),
        ({"noise_one_layer": "yes"}, ("`noise_one_layer`", "'yes'")),
    ),
)
def test_bad_field_is_refused_by_name_value_and_what_is_allowed(config_class, fields, named):
    with pytest.raises(ValueError, match=naming(*named)):
        config_class(**fields)


def test_limits_of_the_similarity_step_are_allowed():
    assert TntViTConfig(prune_layers=[2], keep_rates=[0.9], num_similar_tokens=20).patch_token_counts()[-1] == 176
    assert TntViTConfig(prune_layers=[2], keep_rates=[0.1], num_similar_tokens=19).patch_token_counts()[-1] == 19
    assert TntViTConfig(prune_layers=[2, 3], keep_rates=[1, 1], num_similar_tokens=98).patch_token_counts()[-1] == 98


def test_refused_schedule_leaves_the_old_one_in_place():
    config = TntViTConfig(prune_layers=[2], keep_rates=[0.6], num_similar_tokens=25)
    with pytest.raises(ValueError, match="`keep_rates`"):
        config.set_schedule([1, 2], [0.5, 1.5])
    assert (config.prune_layers, config.keep_rates, config.num_similar_tokens) == ([2], [0.6], 25)


def test_schedule_is_saved_and_overridden_as_a_whole(tmp_path):
    TntViTConfig(prune_layers=(2,), keep_rates=(0.6,), num_similar_tokens=25).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["prune_layers"], saved["keep_rates"], saved["num_similar_tokens"]) == ([2], [0.6], 25)
    changed = TntViTConfig.from_pretrained(tmp_path, prune_layers=[1, 3], keep_rates=[0.5, 0.5], num_similar_tokens=3)
    assert (changed.prune_layers, changed.keep_rates, changed.num_similar_tokens) == ([1, 3], [0.5, 0.5], 3)
    changed = TntViTConfig.from_pretrained(tmp_path, prune_layers=[1], keep_rates=[0.95])
    assert (changed.prune_layers, changed.num_similar_tokens) == ([1], 0)
    with pytest.raises(ValueError, match=naming("`keep_rates`", [1, 3])):
        TntViTConfig.from_pretrained(tmp_path, prune_layers=[1, 3])


def test_schedule_is_copied_as_plain_numbers(tmp_path):
    config = TntViTConfig(noise_std=np.float32(0.5), num_noise_layers=np.int64(3))
    layers = [np.int64(2)]
    config.set_schedule(layers, (np.float32(0.5),), np.int64(3))
    layers.append(99)
    assert (config.prune_layers, config.keep_rates, config.num_similar_tokens) == ([2], [0.5], 3)
    config.save_pretrained(tmp_path)
    assert TntViTConfig.from_pretrained(tmp_path).prune_layers == [2]


def test_what_was_chosen_for_budgets_is_saved(tmp_path):
    config = TntViTConfig(token_reduction="cluster", budget_sizes=((np.int64(2), 192), (3, (np.int64(160), 96))))
    assert (config.budget_sizes, config.size_bias) == ([[2, 192], [3, [160, 96]]], None)
    config.save_pretrained(tmp_path)
    loaded = TntViTConfig.from_pretrained(tmp_path)
    assert (loaded.token_reduction, loaded.budget_sizes, loaded.size_bias) == ("cluster", config.budget_sizes, None)
    assert (loaded.size_for(1.8), loaded.size_for(9), loaded.size_for(1.1)) == ((192, 192), (160, 96), None)
    assert TntViTConfig.from_pretrained(tmp_path, budget_sizes=[], size_bias=0.7).size_for(3) is None


def test_config_of_the_plain_model_may_be_passed_on():
    config = TntDeiTConfig(**{**TntDeiTConfig(hidden_size=48).to_dict(), "model_type": "deit"})
    assert (config.model_type, config.hidden_size) == ("tnt_deit", 48)


def test_config_of_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=naming("TntViTConfig", "`model_type`", "'vit'", "'tnt_vit'", "'bert'")):
        TntViTConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "num_patches"), ((224, 16, 196), ([32, 64], 8, 32), (30, [4, 5], 42))
)
def test_number_of_patches_follows_the_geometry(image_size, patch_size, num_patches):
    assert TntViTConfig(image_size=image_size, patch_size=patch_size).num_patches == num_patches
