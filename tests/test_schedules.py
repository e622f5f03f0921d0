import json
from math import prod
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES
from fvcore.nn import FlopCountAnalysis

from tnt_hf import TntDeiTConfig, TntViTConfig
from tnt_hf.schedules import PUBLISHED_SCHEDULES, Schedule, count_gflops, parse_schedule, tokens_per_layer


PUBLISHED_GFLOPS = json.loads((Path(__file__).parent / "reference" / "reference_cases.json").read_text())["gflops"]
MODELS = {
    "deit_tiny_distilled_patch16_224": (TntDeiTConfig, 192, 3),
    "deit_small_distilled_patch16_224": (TntDeiTConfig, 384, 6),
    "deit_base_distilled_patch16_224": (TntDeiTConfig, 768, 12),
    "vit_base_patch16_224": (TntViTConfig, 768, 12),
}


def with_schedule(config_class, schedule, **fields):
    return config_class(
        prune_layers=schedule.prune_layers,
        keep_rates=schedule.keep_rates,
        num_similar_tokens=schedule.num_similar_tokens,
        **fields,
    )


@pytest.mark.parametrize("name", MODELS)
def test_gflops_of_the_published_models_to_four_digits(name):
    config_class, hidden_size, num_heads = MODELS[name]
    counted = [
        count_gflops(
            with_schedule(
                config_class,
                schedule,
                hidden_size=hidden_size,
                num_attention_heads=num_heads,
                intermediate_size=4 * hidden_size,
                num_labels=1000,
            )
        )
        for schedule in PUBLISHED_SCHEDULES.values()
    ]
    assert counted == pytest.approx(PUBLISHED_GFLOPS[name], abs=6e-5)


def attention_operations(inputs, outputs):
    query, key, value = (tensor.type().sizes() for tensor in inputs[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "schedule",
    (
        *PUBLISHED_SCHEDULES.values(),
        Schedule("ends", (0, 5, 11), (0.91, 0.5, 0.3), 7),
        Schedule("nothing dropped", (3,), (1.0,)),
        Schedule("after the last layer", (11,), (0.5,), 3),
    ),
    ids=lambda schedule: schedule.name,
)
def test_gflops_equal_fvcore(family, schedule):
    config_class, model_class = FAMILIES[family]
    config = with_schedule(
        config_class, schedule, hidden_size=48, num_attention_heads=3, intermediate_size=100, num_labels=17
    )
    count = FlopCountAnalysis(model_class(config).eval(), torch.zeros(1, 3, 224, 224))
    count.set_op_handle("aten::scaled_dot_product_attention", attention_operations)
    count.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    assert round(1e9 * count_gflops(config)) == count.total()


def test_tokens_and_gflops_at_another_resolution():
    config = TntViTConfig(prune_layers=[2], keep_rates=[0.6], num_similar_tokens=25)
    assert tokens_per_layer(config, 384) == [576] * 3 + [345] * 9
    assert tokens_per_layer(config, (224, 384)) == [336] * 3 + [201] * 9
    larger = TntViTConfig(prune_layers=[2], keep_rates=[0.6], num_similar_tokens=25, image_size=384)
    assert count_gflops(config, 384) == count_gflops(larger) > count_gflops(config)
    with pytest.raises(ValueError, match="`num_similar_tokens`"):
        tokens_per_layer(config, 64)


def test_schedules_are_read_from_text():
    assert parse_schedule("multi") is PUBLISHED_SCHEDULES["multi"]
    assert parse_schedule("2,3:0.7,0.5:30") == Schedule("2,3:0.7,0.5:30", (2, 3), (0.7, 0.5), 30)
    assert parse_schedule("4:0.5") == Schedule("4:0.5", (4,), (0.5,), 0)
    for text in ("dual", "2", "2:x", "2:0.5:1:1", ""):
        with pytest.raises(ValueError, match=r"full, single, multi or LAYERS:RATES"):
            parse_schedule(text)
