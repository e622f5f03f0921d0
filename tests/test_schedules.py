import json
import random
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, count_operations, naming

from tnt_hf import TntDeiTConfig, TntViTConfig, TntViTForImageClassification
from tnt_hf.named_schedules import PUBLISHED_SCHEDULES, FlopsReduction, parse_schedule, resolve_schedules
from tnt_hf.schedules_tnt import UNPRUNED, Schedule, count_gflops, schedule_for


PUBLISHED_GFLOPS = json.loads((Path(__file__).parent / "reference" / "reference_cases.json").read_text())["gflops"]
MODELS = {
    "deit_tiny_distilled_patch16_224": (TntDeiTConfig, 192, 3),
    "deit_small_distilled_patch16_224": (TntDeiTConfig, 384, 6),
    "deit_base_distilled_patch16_224": (TntDeiTConfig, 768, 12),
    "vit_base_patch16_224": (TntViTConfig, 768, 12),
}

SIZES = ("hidden_size", "num_hidden_layers", "image_size", "num_noise_layers")
SMALL = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96}


def entering(config, schedule):
    """Patch tokens that enter each layer."""
    return config.patch_token_counts(schedule=schedule)[:-1]


def with_schedule(config_class, schedule, **fields):
    return config_class(**schedule.settings, **fields)


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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("family", "token_reduction"), (("vit", "drop"), ("deit", "merge"), ("vit", "cluster")))
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
def test_gflops_equal_fvcore(family, schedule, token_reduction):
    config_class, model_class = FAMILIES[family]
    config = with_schedule(
        config_class,
        schedule,
        hidden_size=48,
        num_attention_heads=3,
        intermediate_size=100,
        num_labels=17,
        token_reduction=token_reduction,
    )
    model = model_class(config).eval()
    for as_executed in (True, False):
        model.config.output_hidden_states = not as_executed  # then every layer computes all of its tokens
        counted = count_operations(model, torch.zeros(1, 3, 224, 224))
        assert round(1e9 * count_gflops(config, as_executed=as_executed)) == counted


@pytest.mark.parametrize(
    "schedule",
    (
        Schedule("pixels", (), (), 0, 16),
        Schedule("both", (1, 2), (0.7, 0.5), 0, 20),
    ),
    ids=lambda schedule: schedule.name,
)
def test_gflops_of_smaller_images_are_those_executed(make_model, images, schedule):
    model = make_model(token_reduction="cluster", **schedule.settings)
    counted = count_operations(model, images[:1]) / 1e9
    assert count_gflops(model.config, as_executed=True) == pytest.approx(counted, rel=2e-3)


def test_schedules_carry_over_to_another_resolution():
    config = TntViTConfig(prune_layers=[2], keep_rates=[0.6], num_similar_tokens=25)
    assert config.patch_token_counts(576)[:-1] == [576] * 3 + [345] * 9
    assert config.patch_token_counts(14 * 24)[:-1] == [336] * 3 + [201] * 9
    larger = TntViTConfig(prune_layers=[2], keep_rates=[0.6], num_similar_tokens=25 * 576 // 196, image_size=384)
    assert count_gflops(config, 384) == count_gflops(larger) > count_gflops(config)
    config.set_schedule([2, 3], [0.8, 0.8], 40)
    assert config.patch_token_counts(576)[0] == 576 - 40 * 576 // 196
    assert config.patch_token_counts(16)[0] == 16 - 3
    assert config.patch_token_counts(1)[-1] == 1


@pytest.mark.parametrize("keep_rate", (0.3, 0.5, 0.6))
def test_schedule_that_drops_only_similar_tokens_carries_over_to_every_resolution(keep_rate):
    num_kept = int(196 * keep_rate)
    num_similar_tokens = min(num_kept, 196 - num_kept)
    config = TntViTConfig(prune_layers=[2], keep_rates=[keep_rate], num_similar_tokens=num_similar_tokens)
    for num_patches in range(4, 2000):
        assert config.patch_token_counts(num_patches)[-1] == int(num_patches * keep_rate)


def test_reduction_of_compute_grows_with_the_resolution():
    reductions = []
    for image_size in (224, 384, 512):
        full, multi = (
            count_gflops(with_schedule(TntDeiTConfig, PUBLISHED_SCHEDULES[name]), image_size, as_executed=True)
            for name in ("full", "multi")
        )
        reductions.append(full / multi)
    assert reductions == sorted(reductions)


def test_budget_of_the_published_schedule_gives_that_schedule():
    schedule = schedule_for(TntDeiTConfig(num_labels=1000), gflops=12.3)
    assert schedule == Schedule("2:0.6:25", (2,), (0.6,), 25) == parse_schedule(schedule.name)


@pytest.mark.parametrize(("token_reduction", "prune_layers"), (("drop", None), ("merge", None), ("drop", (2, 3))))
def test_schedules_meet_their_budget_by_one_percent_or_name_the_range(token_reduction, prune_layers):
    draw = random.Random(token_reduction)
    num_met = 0
    for _ in range(8):
        config = draw.choice((TntViTConfig, TntDeiTConfig))(
            hidden_size=draw.choice((48, 192, 768)),
            num_hidden_layers=draw.choice((4, 12, 24)),
            image_size=draw.choice((112, 224, (160, 320), 384)),
            num_noise_layers=draw.choice((3, 5, 11)),
            token_reduction=token_reduction,
        )
        full = count_gflops(config)
        executed = count_gflops(config, as_executed=True)
        gflops, reduction = full * draw.uniform(0.1, 1.1), draw.uniform(1, 3)
        for budget in ({"gflops": gflops}, {"flops_reduction": reduction}):
            try:
                schedule = schedule_for(config, prune_layers=prune_layers, **budget)
            except ValueError as error:
                lowest, highest, *nearest = re.findall(r"\d+\.?\d*(?:e-\d+)?", str(error).split("reaches ")[1])
                (target,) = budget.values()
                if nearest:  # one token is more than 1 % of the budget
                    below, above = map(float, nearest)
                    assert below < target < above
                else:  # to four digits
                    assert not float(lowest) * 1.001 < target < float(highest) * 0.999
                continue
            num_met += 1
            fields = {name: getattr(config, name) for name in (*SIZES, "token_reduction")}
            pruned = with_schedule(type(config), schedule, **fields)
            if "gflops" in budget:
                assert 0.99 * gflops <= count_gflops(pruned) <= gflops
            else:
                assert reduction <= executed / count_gflops(pruned, as_executed=True) <= reduction / 0.99
    assert num_met > 6


def test_budget_for_given_layers_and_a_measured_cost():
    config = TntViTConfig()
    schedule = schedule_for(config, gflops=8, prune_layers=(1, 6))
    assert schedule.prune_layers == (1, 6) and config.prune_layers == []
    assert 7.92 <= count_gflops(with_schedule(TntViTConfig, schedule)) <= 8
    schedule = schedule_for(config, speedup=2, cost=lambda *trial: sum(entering(*trial)))
    assert 0.99 <= 2 * sum(entering(config, schedule)) / (12 * 196) <= 1


def test_budgets_of_a_cost_with_plateaus_are_met():
    config = TntDeiTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)

    def cost(config, schedule):
        """As a measured table: constant up to 32 tokens, steeper above 112, and a price for each selection."""
        seconds = [max(tokens, 32) + max(0, tokens - 112) for tokens in entering(config, schedule)]
        return sum(seconds) + 12 * len(schedule.prune_layers)

    full = cost(config, UNPRUNED)
    for speedup in (1.2, 1.35, 1.7, 2.1):
        schedule = schedule_for(config, speedup=speedup, prune_layers=(1, 2, 3, 4), cost=cost)
        assert speedup <= full / cost(config, schedule) <= speedup / 0.99


def test_a_budget_may_be_spent_on_smaller_images():
    config = TntViTConfig(token_reduction="cluster")
    full = count_gflops(config, schedule=UNPRUNED, as_executed=True)
    (schedule,) = resolve_schedules(config, [parse_schedule("3x@160")])
    assert schedule.compute_size == 160 and len(schedule.prune_layers) == 8
    assert 0.99 / 3 <= count_gflops(config, schedule=schedule, as_executed=True) / full <= 1 / 3
    assert schedule_for(config, flops_reduction=3, compute_size=(160, 160)).settings == schedule.settings
    shares = resolve_schedules(config, [parse_schedule(text) for text in ("3x@0.7", "full@0.7")])
    assert [(each.name, each.compute_size) for each in shares] == [("3x@0.7", 160), ("full@0.7", 160)]
    assert shares[1].prune_layers == ()
    for text in ("full@160", "0,1:0.9,0.8@160x96", "2:0.5:10@96"):
        (written,) = resolve_schedules(config, [parse_schedule(text)])
        assert written.name == text and written.compute_size is not None
    kept = Schedule.keeping((50, 20), (1, 2), 60, compute_size=(96, 160))
    assert parse_schedule(kept.name) == kept
    assert schedule_for(config, flops_reduction=1.1, compute_size=64) == Schedule("full", (), (), 0, 64)


def test_clusters_leave_later_the_milder_the_budget():
    config = TntDeiTConfig(token_reduction="cluster", num_noise_layers=0)  # which do not matter: no head is needed
    full = count_gflops(config, schedule=UNPRUNED, as_executed=True)
    steepness = []
    for share in (0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.2):
        schedule = schedule_for(config, flops_reduction=1 / share)
        assert schedule.prune_layers == tuple(range(8)) and schedule.num_similar_tokens == 0
        assert 0.99 * share <= count_gflops(config, schedule=schedule, as_executed=True) / full <= share
        counts = config.patch_token_counts(schedule=schedule)[:8]  # the last one is what meets the budget
        leaving = [(before - left) / before for before, left in pairwise(counts)]
        if share > 0.35:
            assert all(low < high for low, high in pairwise(leaving))
        else:
            assert max(each - 1 / before for each, before in zip(leaving, counts)) < min(leaving)  # to a token
        steepness.append((leaving[-1] - leaving[0]) / (leaving[-1] + leaving[0]))
    assert steepness[:2] == pytest.approx([0.7, 0.7], abs=0.1)  # the slope has a largest value
    assert all(milder > harsher + 0.05 for milder, harsher in pairwise(steepness[1:5]))


def test_budgets_are_spent_on_the_sizes_chosen_for_them():
    config = TntViTConfig(token_reduction="cluster", budget_sizes=[[2, 192], [4, (160, 128)]])
    full = count_gflops(config, schedule=UNPRUNED, as_executed=True)
    texts = ("1x", "1.2x", "2.5x", "3x", "3x@224", "3x@1.0", "3x@112")
    sizes = (None, None, 192, (160, 128), None, None, 112)
    schedules = resolve_schedules(config, [parse_schedule(text) for text in texts])
    assert [(schedule.name, schedule.compute_size) for schedule in schedules] == [*zip(texts, sizes)]
    for schedule in schedules:
        reduction = full / count_gflops(config, schedule=schedule, as_executed=True)
        asked = float(schedule.name.partition("x")[0])
        assert asked <= reduction and (reduction <= asked / 0.99 or schedule.prune_layers == ())
    model = TntViTForImageClassification(TntViTConfig(token_reduction="cluster", budget_sizes=[[2, 192]], **SMALL))
    assert model.set_budget(flops_reduction=2).compute_size == model.config.compute_size == 192
    assert model.set_budget(flops_reduction=2, compute_size=224).compute_size is model.config.compute_size is None
    unpruned = count_gflops(model.config, schedule=UNPRUNED)
    assert model.set_budget(gflops=unpruned / 2.2).compute_size == 192
    assert model.set_budget(gflops=unpruned / 1.3).compute_size is None


def test_impossible_budgets_are_refused():
    config = TntViTConfig()
    with pytest.raises(ValueError, match=naming("`gflops` 20", "196 patch tokens")):
        schedule_for(config, gflops=20)
    both = {"gflops": 8, "flops_reduction": 2}
    with pytest.raises(ValueError, match=naming("`gflops`, `flops_reduction`, `speedup`", both)):
        schedule_for(config, **both)
    with pytest.raises(ValueError, match=naming("`flops_reduction`", "nan")):
        schedule_for(config, flops_reduction=float("nan"))
    for budget in ({"gflops": 8, "cost": count_gflops}, {"speedup": 2}):
        with pytest.raises(ValueError, match=naming("`speedup`", "`cost`")):
            schedule_for(config, **budget)
    with pytest.raises(ValueError, match="num_noise_layers=0"):
        schedule_for(TntViTConfig(num_noise_layers=0), gflops=8)


def test_model_takes_a_budget_and_keeps_its_schedule_if_it_cannot():
    model = TntViTForImageClassification(TntViTConfig(**SMALL))
    schedule = model.set_budget(flops_reduction=1.5)
    assert tuple(model.config.prune_layers) == schedule.prune_layers != ()
    with pytest.raises(ValueError, match="`gflops` 1000"):
        model.set_budget(gflops=1000)
    assert tuple(model.config.keep_rates) == schedule.keep_rates


def test_schedules_are_named_by_a_text_that_gives_them_back():
    for counts, layers, num_similar_tokens in (
        ((117,), (2,), 25),
        ((150, 90, 1), (0, 3, 7), 40),
        ((98, 98), (1, 2), 0),
    ):
        schedule = Schedule.keeping(counts, layers, 196, num_similar_tokens)
        assert parse_schedule(schedule.name) == schedule
        config = TntViTConfig(**schedule.settings)
        assert tuple(config.patch_token_counts()[layer + 1] for layer in layers) == counts
    with pytest.raises(ValueError, match=naming("`num_kept`", 90, 91)):
        Schedule.keeping((90, 91), (2, 3), 196)


def test_schedules_are_read_from_text():
    assert parse_schedule("multi") is PUBLISHED_SCHEDULES["multi"]
    assert parse_schedule("2,3:0.7,0.5:30") == Schedule("2,3:0.7,0.5:30", (2, 3), (0.7, 0.5), 30)
    assert parse_schedule("4:0.5") == Schedule("4:0.5", (4,), (0.5,), 0)
    assert parse_schedule("1.5x") == FlopsReduction("1.5x", 1.5)
    for text in ("full@0.0", "2x@-0.5", "full@1.4", "multi@0.5", "dual", "2", "2:x", "2:0.5:1:1", "", "x", "twox"):
        with pytest.raises(ValueError, match=naming("full, single, multi", "2x", "LAYERS:RATES", repr(text))):
            parse_schedule(text)


@pytest.mark.parametrize("token_reduction", ["drop", "merge", "cluster"])
def test_a_reduction_becomes_the_schedule_of_the_model_it_is_resolved_on(token_reduction):
    config = TntDeiTConfig(token_reduction=token_reduction, num_labels=1000)
    full, twice, published = resolve_schedules(config, [parse_schedule(text) for text in ("1x", "2x", "single")])
    assert (full.name, full.prune_layers, published) == ("1x", (), PUBLISHED_SCHEDULES["single"])
    assert twice == replace(schedule_for(config, flops_reduction=2), name="2x")
    whole = count_gflops(config, as_executed=True)
    config.set_schedule(**twice.settings)
    assert whole / count_gflops(config, as_executed=True) == pytest.approx(2, rel=0.01)


def test_a_schedule_that_does_not_fit_the_model_is_refused_by_name():
    config = TntViTConfig(num_hidden_layers=4)
    for text, *named in (("0.5x", "`flops_reduction` 0.5"), ("nanx", "nan"), ("multi", "`prune_layers`", "0 to 3")):
        with pytest.raises(ValueError, match=naming(f"'{text}'", *named)):
            resolve_schedules(config, [parse_schedule(text)])
