from types import SimpleNamespace

import pytest
import torch
from conftest import naming

from tnt_hf.inference import unmerge
from tnt_hf.schedules_tnt import Schedule, reduction_steps
from tnt_hf.token_reduction_tnt import ReductionStep, TokenState, randn_like, random_partition, take_tokens


NUM_PREFIX, NUM_PATCHES = 2, 24
SCHEDULE = Schedule("several", (0, 1, 2), (0.8, 0.5, 0.7), 5)


REDUCTIONS = pytest.mark.parametrize("token_reduction", ("drop", "merge", "cluster"))


def settings(num_prefix_tokens=NUM_PREFIX, token_reduction="merge", size_bias=None):
    return SimpleNamespace(
        num_prefix_tokens=num_prefix_tokens,
        similarity_partition="strided",
        token_reduction=token_reduction,
        relevance_weight=0.05,
        size_bias=size_bias,
    )


def reduced(token_reduction, attention_mask=None, num_prefix=NUM_PREFIX):
    """A state after all steps of a schedule, each with scores of its own if it needs them, and its first tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, num_prefix + NUM_PATCHES, 6, generator=generator)
    merges = token_reduction != "drop"
    state = TokenState(tokens, settings(num_prefix, token_reduction), attention_mask, merges=merges, track_groups=True)
    for step in reduction_steps(SCHEDULE, NUM_PATCHES, 3):
        scores = torch.randn(3, step.num_tokens, generator=generator)
        state.reduce(step, scores if step.uses_scores and token_reduction != "cluster" else None)
    return state, tokens


def test_taken_tokens_are_those_gathered():
    tokens = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 6], [3, 2], [5, 5]])
    for each in (tokens, torch.cat((tokens, tokens), dim=1)[:, 4:]):
        assert torch.equal(take_tokens(each, positions), each.gather(1, positions.unsqueeze(-1).expand(-1, -1, 5)))


def test_draws_take_a_generator_and_follow_the_tensor():
    tokens = torch.zeros(2, 5, 3, dtype=torch.bfloat16)
    noise = randn_like(tokens, torch.Generator().manual_seed(0))
    assert (noise.shape, noise.dtype) == (tokens.shape, tokens.dtype)
    assert torch.equal(noise, randn_like(tokens, torch.Generator().manual_seed(0)))
    partition = random_partition(9, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert partition.sort().values.tolist() == list(range(9))


def test_tokens_of_a_state_without_a_model_are_the_means_of_their_groups():
    state, tokens = reduced("merge")
    patches = tokens[:, NUM_PREFIX:]
    assert torch.equal(state.tokens[:, :NUM_PREFIX], tokens[:, :NUM_PREFIX])
    assert state.sizes[:, NUM_PREFIX:].sum(dim=1).tolist() == [NUM_PATCHES] * 3
    for image in range(3):
        for index in range(state.positions.shape[1]):
            members = state.groups[image] == state.positions[image, index]
            assert members.sum() == state.sizes[image, NUM_PREFIX + index]
            torch.testing.assert_close(state.patch_tokens[image, index], patches[image, members].mean(dim=0))
    assert torch.equal(state.attention_bias, state.sizes.log())


def test_attention_counts_sizes_to_a_power():
    tokens = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0))
    for token_reduction, size_bias, power in (("merge", 0.5, 0.5), ("merge", None, 1), ("cluster", None, 0.85)):
        mask = torch.tensor([[1] * 8 + [0]])
        state = TokenState(tokens, settings(1, token_reduction, size_bias), mask, merges=True)
        state.reduce(ReductionStep(0, 8, 4, 0))
        bias = state.attention_bias[0]
        assert bias[0] == 0 and bias.exp().pow(1 / power).sum() == pytest.approx(8)


@pytest.mark.parametrize("num_prefix", (0, 1, 5))
@REDUCTIONS
def test_prefix_tokens_stay_as_they_are_however_many(token_reduction, num_prefix):
    state, tokens = reduced(token_reduction, num_prefix=num_prefix)
    assert torch.equal(state.tokens[:, :num_prefix], tokens[:, :num_prefix])
    assert state.tokens.shape[1] == num_prefix + reduction_steps(SCHEDULE, NUM_PATCHES, 3)[-1].num_kept
    assert [mask.shape for mask in state.kept_masks] == [(3, NUM_PATCHES)] * 3


@REDUCTIONS
def test_reduced_tokens_are_put_back_on_the_whole_grid(token_reduction):
    state, tokens = reduced(token_reduction)
    kept, owners = state.kept_masks[-1], state.groups
    assert len(state.step_groups) == 4 and torch.equal(state.step_groups[-1], owners)
    grid = unmerge(state.patch_tokens, owners)
    assert grid.shape == (3, NUM_PATCHES, 6)
    assert kept.sum(dim=1).tolist() == [state.positions.shape[1]] * 3
    for image in range(3):
        for patch in range(NUM_PATCHES):
            owner = owners[image, patch].item()
            if owner < 0:
                assert token_reduction == "drop" and not kept[image, patch] and not grid[image, patch].any()
                continue
            assert kept[image, owner] and (owner == patch) == bool(kept[image, patch])
            place = state.positions[image].tolist().index(owner)
            assert torch.equal(grid[image, patch], state.patch_tokens[image, place])
    if token_reduction == "drop":
        assert torch.equal(grid * kept.unsqueeze(-1), tokens[:, NUM_PREFIX:] * kept.unsqueeze(-1))
    if token_reduction == "merge":
        mean = state.patch_tokens * state.sizes[:, NUM_PREFIX:, None] / NUM_PATCHES
        torch.testing.assert_close(grid.mean(dim=1), mean.sum(dim=1))


@REDUCTIONS
def test_masked_tokens_leave_first_and_leave_no_trace(token_reduction):
    mask = torch.ones(3, NUM_PREFIX + NUM_PATCHES, dtype=torch.long)
    mask[:, -9:] = 0
    state, _ = reduced(token_reduction, mask)
    assert state.positions.max() < NUM_PATCHES - 9
    left = state.attention_mask if token_reduction == "drop" else state.sizes
    assert left.shape == state.tokens.shape[:2] and (left > 0).all()
    if token_reduction != "drop":
        assert state.sizes[:, NUM_PREFIX:].sum(dim=1).tolist() == [NUM_PATCHES - 9] * 3


@pytest.mark.parametrize(
    ("merges", "step", "named"),
    (
        (False, ReductionStep(2, 20, 10, 0), ("24 patch tokens", "num_tokens=20")),
        (True, ReductionStep(2, 20, 20, 0), ("24 patch tokens", "num_tokens=20")),
        (False, ReductionStep(2, 24, 10, 6), ("Scores", "num_similar=6")),
    ),
)
def test_steps_that_do_not_fit_the_tokens_are_refused(merges, step, named):
    state = TokenState(torch.randn(3, NUM_PREFIX + NUM_PATCHES, 6), settings(), merges=merges)
    with pytest.raises(ValueError, match=naming(*named)):
        state.reduce(step)


def test_noise_and_its_gradients_are_those_of_the_patches_alone():
    torch.manual_seed(0)
    tokens = torch.randn(3, NUM_PREFIX + NUM_PATCHES, 6, requires_grad=True)
    scores = torch.randn(3, NUM_PATCHES, requires_grad=True)
    weights = torch.randn_like(tokens)
    fields = {"noise_std": 0.5, "noise_one_layer": False, "noise_gate": "softmax"}
    state = TokenState(tokens, SimpleNamespace(num_prefix_tokens=NUM_PREFIX, **fields))
    state.generator = torch.Generator().manual_seed(1)
    state.add_noise(0, scores)
    prefix, patches = tokens.split((NUM_PREFIX, NUM_PATCHES), dim=1)
    noise = torch.randn(patches.shape, generator=torch.Generator().manual_seed(1))
    noised = torch.cat((prefix, patches + 0.5 * noise * (1 - scores.softmax(-1)).unsqueeze(-1)), dim=1)
    torch.testing.assert_close(state.tokens, noised)
    gradients = [torch.autograd.grad((each * weights).sum(), (tokens, scores)) for each in (state.tokens, noised)]
    torch.testing.assert_close(*gradients)
