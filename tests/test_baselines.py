"""The methods that TNT is compared with."""

from itertools import pairwise

import pytest
import torch
from conftest import FAMILIES, count_operations, naming
from torch import nn

from benchmarks.baselines import METHODS, BaselineSchedule, baseline_logits, baseline_schedules, count_baseline_gflops
from tnt_hf.schedules_tnt import count_gflops


EVERYTHING = (64,) * 6


@pytest.mark.parametrize("method", METHODS)
def test_without_reduction_every_method_is_the_unpruned_model(make_model, images, method):
    model = make_model()
    logits, kept = baseline_logits(model, images, BaselineSchedule(method, EVERYTHING))
    torch.testing.assert_close(logits, model(images).logits, atol=1e-5, rtol=1e-4)
    assert torch.equal(kept, torch.arange(64).expand(4, -1))
    gflops = count_baseline_gflops(model.config, BaselineSchedule(method, EVERYTHING))
    assert gflops == pytest.approx(count_gflops(model.config, as_executed=True), abs=1e-12)


@pytest.mark.parametrize("share", (0.85, 0.65))
@pytest.mark.parametrize("method", METHODS)
def test_schedules_come_close_to_the_budget_from_below(make_model, method, share):
    config = make_model().config
    budget = share * count_gflops(config, as_executed=True)
    schedules = baseline_schedules(config, method, budget)
    assert len(set(schedules)) == len(schedules) == (6 if method == "sort_prune_merge" else 1)
    for schedule in schedules:
        assert 0.95 * budget <= count_baseline_gflops(config, schedule) <= budget
        assert all(before >= after >= 1 for before, after in pairwise((64, *schedule.counts)))


def test_unknown_methods_and_impossible_budgets_are_refused(make_model):
    config = make_model().config
    with pytest.raises(ValueError, match=naming("`method`", "random, cls_attention", "'topk'")):
        baseline_schedules(config, "topk", 1.0)
    with pytest.raises(ValueError, match=naming("random", "GFLOPs", "1e-06")):
        baseline_schedules(config, "random", 1e-6)


class Baseline(nn.Module):
    def __init__(self, model, schedule):
        super().__init__()
        self.model, self.schedule = model, schedule

    def forward(self, pixel_values):
        return baseline_logits(self.model, pixel_values, self.schedule)[0]


def products_of_means(schedule, before, after):
    """Multiply-accumulates for each channel by which `merge` adds tokens up, which no method needs."""
    if schedule.method == "merging":
        return (before - after) ** 2
    if schedule.method == "sort_prune_merge":
        return (before - after - int(schedule.pruned_share * (before - after))) ** 2
    return 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("method", METHODS)
def test_gflops_are_those_that_fvcore_counts(family, method):
    config_class, model_class = FAMILIES[family]
    model = model_class(
        config_class(
            image_size=64,
            patch_size=8,
            hidden_size=48,
            num_hidden_layers=6,
            num_attention_heads=3,
            intermediate_size=100,
        )
    ).eval()
    for schedule in baseline_schedules(model.config, method, 0.75 * count_gflops(model.config, as_executed=True)):
        counted = count_operations(Baseline(model, schedule), torch.zeros(1, 3, 64, 64))
        means = sum(products_of_means(schedule, *counts) for counts in pairwise((64, *schedule.counts)))
        assert counted - 48 * means == round(1e9 * count_baseline_gflops(model.config, schedule))


def test_selection_keeps_what_the_class_token_attends_to(make_model, images):
    model = make_model(attn_implementation="eager")
    attention = model(images, output_attentions=True).attentions[2]
    expected = attention.mean(dim=1)[:, 0, model.config.num_prefix_tokens :].topk(20).indices.sort().values
    _, kept = baseline_logits(model, images, BaselineSchedule("cls_attention", (64, 64, 20, 20, 20, 20)))
    assert torch.equal(kept, expected)


def test_random_selection_follows_its_generator(make_model, images):
    model = make_model()
    schedule = BaselineSchedule("random", (64, 64, 20, 20, 20, 20))
    kept = [baseline_logits(model, images, schedule, torch.Generator().manual_seed(seed))[1] for seed in (0, 0, 1)]
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("method", ("merging", "sort_prune_merge"))
def test_merging_equal_tokens_changes_no_answer(make_model, method):
    model = make_model()
    nn.init.zeros_(model.base_model.embeddings.position_embeddings)
    images = torch.rand(2, 3, 1, 1).expand(-1, -1, 32, 32)
    logits, _ = baseline_logits(model, images, BaselineSchedule(method, (50, 40, 20, 10, 5, 5)))
    torch.testing.assert_close(logits, model(images).logits, atol=1e-5, rtol=1e-4)
