from itertools import pairwise

import pytest
import torch

from tnt_hf.visualization import trace_tokens


SCHEDULES = (
    ([2], [0.6], 8),
    ([1, 2, 4], [0.8, 0.7, 0.8], 10),
    ([0, 1, 2, 3, 4, 5], [0.9] * 6, 0),
    ([0, 3], [1, 0.5], 6),
)


def mean_by_group(tokens, groups, kept):
    """Mean token of the patches of each group, shape `(batch_size, num_kept, hidden_size)`."""
    is_member = (groups.unsqueeze(1) == kept.unsqueeze(2)).float()
    return is_member @ tokens / is_member.sum(dim=-1, keepdim=True)


@pytest.mark.parametrize(
    ("token_reduction", "selection"),
    (("drop", "relevance"), ("drop", "random"), ("merge", "relevance"), ("merge", "random"), ("cluster", "relevance")),
)
@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.no_grad()
def test_trace_is_what_the_model_does(make_model, images, token_reduction, selection, schedule):
    model = make_model(token_reduction=token_reduction, similarity_partition="random", num_noise_layers=6)
    model.set_schedule(*schedule)
    model.config.selection = selection
    logits, layers = trace_tokens(model, images, seed=3)
    expected = model(images, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(logits, expected.logits)
    assert [layer.layer for layer in layers] == schedule[0]
    assert all((layer.relevance is None) == (token_reduction == "cluster") for layer in layers)
    for layer, kept in zip(layers, expected.kept_indices, strict=True):
        assert torch.equal(layer.kept, kept)
        for ranked, remaining in zip(layer.ranked.tolist(), kept.tolist()):
            assert set(remaining) <= set(ranked)
    for before, after in pairwise(layers):
        assert torch.equal(after.ranked, before.kept)
    num_dissimilar = 64 - (schedule[2] if len(schedule[0]) > 1 else 0)
    assert layers[0].ranked.shape[1] == num_dissimilar


@torch.no_grad()
def test_relevance_is_the_softmax_of_the_scores_by_which_tokens_are_kept(make_model, images):
    model = make_model(prune_layers=[2], keep_rates=[0.5])
    _, (layer,) = trace_tokens(model, images)
    hidden_states = model.base_model(images, output_hidden_states=True).hidden_states
    scores = model.base_model.relevance_scores(2, hidden_states[3])
    torch.testing.assert_close(layer.relevance, scores.double().softmax(dim=-1))
    highest = layer.ranked.gather(1, layer.relevance.topk(32).indices).sort(dim=-1).values
    assert torch.equal(highest, layer.kept)


@pytest.mark.parametrize("schedule", (([0], [0.4], 10), ([0, 1], [0.7, 1], 0)))
@torch.no_grad()
def test_merged_tokens_are_the_means_of_their_groups(make_model, images, schedule):
    model = make_model(token_reduction="merge")
    model.set_schedule([0], [1.0])
    before = model.base_model(images, output_hidden_states=True).hidden_states[1]
    model.set_schedule(*schedule)
    _, layers = trace_tokens(model, images)
    entering = []
    model.base_model.layers[1].register_forward_pre_hook(lambda layer, inputs: entering.append(inputs[0]))
    model(images)
    num_prefix_tokens = model.config.num_prefix_tokens
    means = mean_by_group(before[:, num_prefix_tokens:], layers[0].groups, layers[0].kept)
    torch.testing.assert_close(entering[0][:, num_prefix_tokens:], means)


@torch.no_grad()
@pytest.mark.parametrize("token_reduction", ("merge", "cluster"))
def test_groups_only_grow_and_hold_all_patches(make_model, images, token_reduction):
    model = make_model(token_reduction=token_reduction, num_noise_layers=6)
    model.set_schedule([0, 1, 2, 3, 4, 5], [0.75] * 6, 6)
    _, layers = trace_tokens(model, images)
    for layer in layers:
        assert torch.equal(layer.groups.gather(1, layer.kept), layer.kept)
        assert [set(groups) for groups in layer.groups.tolist()] == [set(kept) for kept in layer.kept.tolist()]
    for before, after in pairwise(layers):
        assert torch.equal(after.groups, after.groups.gather(1, before.groups))


def test_trace_leaves_mode_and_schedule(make_model, images):
    model = make_model(prune_layers=[1], keep_rates=[0.5], hidden_dropout_prob=0.5).train()
    model.base_model.layernorm.eval()
    first, again = (trace_tokens(model, images)[0] for _ in range(2))
    assert torch.equal(first, again) and not model.base_model.layernorm.training
    assert model.training and model.config.prune_layers == [1]
    model.set_schedule([], [])
    assert trace_tokens(model, images)[1] == []
