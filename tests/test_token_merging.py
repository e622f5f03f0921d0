"""Token Merging, which the page shows beside the reductions of this package."""

import pytest
import torch
from conftest import TINY

from benchmarks.reduced_vit import Reduction, reduced_logits
from tnt_hf import TntViTConfig, TntViTForImageClassification
from tnt_hf.app.token_merging import merge_tokens, token_merging_for
from tnt_hf.conversion import to_plain_model
from tnt_hf.schedules_tnt import UNPRUNED, count_gflops


@pytest.mark.parametrize("reduction", [1.2, 2, 3])
def test_token_merging_is_that_of_the_benchmark(images, reduction):
    torch.manual_seed(0)
    model = TntViTForImageClassification(TntViTConfig(**TINY)).eval()
    merging = token_merging_for(model.config, reduction)
    logits, left = merge_tokens(model, images, merging.counts)
    published = Reduction(metric="mean_keys", counts=merging.counts)
    with torch.no_grad():
        expected = reduced_logits(to_plain_model(model), images, published)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert left.kept.shape[1] == merging.counts[-1]
    assert all(set(groups.tolist()) == set(kept.tolist()) for groups, kept in zip(left.groups, left.kept))


def test_token_merging_that_merges_nothing_answers_as_the_model(make_model, images):
    model = make_model()
    logits, left = merge_tokens(model, images, [model.config.num_patches] * 5)
    torch.testing.assert_close(logits, model(images, schedule=UNPRUNED).logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(left.groups, left.kept)


@pytest.mark.parametrize("reduction", [1, 1.5, 2.5])
def test_token_merging_takes_as_few_tokens_as_the_budget_asks(make_model, reduction):
    config = make_model().config
    merging = token_merging_for(config, reduction)
    full = count_gflops(config, schedule=UNPRUNED, as_executed=True)
    assert merging.gflops <= full / reduction
    before = [config.num_patches, *merging.counts]
    most = before[0] - before[1]
    assert [*merging.counts] == [num - min(most, num // 2) for num in before[:-1]]
    assert 0.8 * full / reduction < merging.gflops
    assert token_merging_for(config, 1000) is None
