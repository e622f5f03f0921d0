"""Tokens that are merged instead of dropped."""

import math

import pytest
import torch
from conftest import naming
from torch import nn

from tnt_hf.token_reduction_tnt import match_similar, merge, norms


ONE = {"prune_layers": [2], "keep_rates": [0.6]}
ONE_TWICE = {"prune_layers": [2], "keep_rates": [0.2], "num_similar_tokens": 8}
TWO = {"prune_layers": [0, 1], "keep_rates": [0.7, 0.4], "num_similar_tokens": 13}
SEVERAL = {"prune_layers": [0, 1, 2, 4], "keep_rates": [0.7, 0.4, 0.9, 0.5], "num_similar_tokens": 13}
MERGING = pytest.mark.parametrize("token_reduction", ("merge", "cluster"))
SCHEDULES = pytest.mark.parametrize("schedule", (ONE, ONE_TWICE, SEVERAL), ids=("one", "rounds", "several"))


def reference_merge(tokens, sizes, num_merged, partition, resistance=None, *, is_clustering=False):
    """One image, in the words of the description, token by token; the members of each token, itself first."""
    half = len(partition) // 2
    candidates, references = partition[:half], partition[half:]
    unit_vectors = nn.functional.normalize(tokens, dim=-1)
    cosines, counts = (unit_vectors @ unit_vectors.T).tolist(), sizes.tolist()
    nearest = {}
    for token in candidates:
        similarity = {other: cosines[token][other] for other in references}
        if is_clustering:
            for other in references:
                a, b = counts[token], counts[other]
                similarity[other] = -(1 - similarity[other]) * math.sqrt(a * b / (a + b))
        best = max(similarity, key=similarity.get)
        nearest[token] = best, similarity[best] - (0 if resistance is None else resistance[token].item())
    leaving = sorted(candidates, key=lambda token: -nearest[token][1])[:num_merged]
    members = {token: [token] for token in range(len(tokens)) if token not in leaving}
    for token in leaving:
        members[nearest[token][0]].append(token)
    groups = [members[token] for token in sorted(members)]
    merged = torch.stack([(sizes[group] @ tokens[group]) / sizes[group].sum() for group in groups])
    if is_clustering:
        lengths = [(sizes[group] @ tokens[group].norm(dim=-1)) / sizes[group].sum() for group in groups]
        merged = merged / merged.norm(dim=-1, keepdim=True) * torch.stack(lengths)[:, None]
    return merged, torch.stack([sizes[group].sum() for group in groups]), groups


@pytest.mark.parametrize(("num_tokens", "num_merged"), ((12, 1), (12, 6), (13, 5), (2, 1)))
@pytest.mark.parametrize("is_clustering", (False, True), ids=("merge", "cluster"))
def test_merge_joins_the_most_similar_by_their_weighted_mean(num_tokens, num_merged, is_clustering):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, num_tokens, 5, generator=generator)
    sizes = torch.randint(1, 9, (3, num_tokens), generator=generator).float()
    resistance = torch.rand(3, num_tokens, generator=generator)
    partition = torch.randperm(num_tokens, generator=generator)
    matching = match_similar(tokens, num_merged, partition, penalty=resistance, sizes=sizes if is_clustering else None)
    merged, merged_sizes = merge(tokens, sizes, matching, norms(tokens) if is_clustering else None)
    for image in range(3):
        one = tokens[image], sizes[image], num_merged, partition.tolist(), resistance[image]
        expected = reference_merge(*one, is_clustering=is_clustering)
        torch.testing.assert_close(merged[image], expected[0])
        torch.testing.assert_close(merged_sizes[image], expected[1])
        assert matching.left[image].tolist() == [group[0] for group in expected[2]]
    torch.testing.assert_close(merged_sizes.sum(dim=1), sizes.sum(dim=1))
    if not is_clustering:
        before, after = (tokens * sizes.unsqueeze(-1)).sum(dim=1), (merged * merged_sizes.unsqueeze(-1)).sum(dim=1)
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_small_tokens_join_before_large_ones_as_near():
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]])
    partition, sizes = torch.tensor([1, 3, 0, 2]), torch.tensor([[9.0, 9.0, 2.0, 1.0]])
    assert match_similar(tokens, 1, partition, sizes=sizes).leaving.tolist() == [[3]]
    assert match_similar(tokens, 1, partition, sizes=sizes.flip(-1)).leaving.tolist() == [[1]]


@pytest.mark.parametrize("num_tokens", (8, 9))
@pytest.mark.parametrize("num_prefix", (0, 2))
def test_every_second_token_may_leave_unless_a_partition_says_otherwise(num_tokens, num_prefix):
    generator = torch.Generator().manual_seed(num_tokens)
    tokens = torch.randn(2, num_prefix + num_tokens, 5, generator=generator)
    sizes = torch.randint(1, 9, (2, num_prefix + num_tokens), generator=generator).float()
    partition = torch.tensor([*range(1, num_tokens, 2), *range(0, num_tokens, 2)])
    merged = []
    for each in (None, partition):
        matching = match_similar(tokens, 3, each, sizes=sizes, num_prefix_tokens=num_prefix)
        merged.append((*merge(tokens, sizes, matching), matching.left))
    for every_second, by_partition in zip(*merged, strict=True):
        assert torch.equal(every_second, by_partition)
    after, _, left = merged[0]
    assert left[:, :num_prefix].tolist() == [[*range(num_prefix)]] * 2
    assert torch.equal(after[:, :num_prefix], tokens[:, :num_prefix])


@MERGING
def test_merging_equal_tokens_changes_no_answer(make_model, token_reduction):
    """A token of size n attends and is attended to as n equal tokens are: a uniform image without positions."""
    model = make_model(token_reduction=token_reduction, size_bias=1)
    nn.init.zeros_(model.base_model.embeddings.position_embeddings)
    images = torch.rand(2, 3, 1, 1).expand(-1, -1, 32, 32)
    expected = model(images).logits
    for schedule in (ONE, ONE_TWICE, SEVERAL):
        model.set_schedule(**schedule)
        torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-4)


def reference_clusters(model, image):
    """Logits of one image, computed from the weights, and after each step the patches in each token."""
    config, backbone = model.config, model.base_model
    steps = {step.layer: step for step in config.reduction_steps()}
    num_prefix = len(model.head_names)
    tokens, grouped = backbone.embeddings(image[None])[0], []
    sizes, groups = torch.ones(len(tokens)), [[patch] for patch in range(64)]

    def reduce(step):
        nonlocal tokens, sizes, groups
        for num_left in (step.num_kept + step.num_similar, step.num_kept):
            while len(groups) > num_left:
                num_leaving = min(len(groups) - num_left, len(groups) // 2)
                partition = [*range(1, len(groups), 2), *range(0, len(groups), 2)]
                patches = tokens[num_prefix:], sizes[num_prefix:]
                merged, left, members = reference_merge(*patches, num_leaving, partition, is_clustering=True)
                tokens, sizes = torch.cat((tokens[:num_prefix], merged)), torch.cat((sizes[:num_prefix], left))
                groups = [[patch for token in each for patch in groups[token]] for each in members]
        grouped.append(groups)

    def attend(attention, values):
        query, key, value = (
            projection(values).view(len(values), config.num_attention_heads, -1).transpose(0, 1)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).exp() * sizes**0.85
        attended = weights / weights.sum(dim=-1, keepdim=True) @ value
        return attention.o_proj(attended.transpose(0, 1).flatten(1))

    if -1 in steps:
        reduce(steps[-1])
    for index, layer in enumerate(backbone.layers):
        tokens = tokens + attend(layer.attention, layer.layernorm_before(tokens))
        if index in steps:
            reduce(steps[index])
        tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
    heads = [getattr(model, name) for name in model.head_names]
    read = backbone.layernorm(tokens)
    return sum(head(token) for head, token in zip(heads, read)) / len(heads), grouped


@SCHEDULES
@torch.no_grad()
def test_clusters_are_merged_between_attention_and_mlp_without_scores(make_model, images, schedule):
    model = make_model(token_reduction="cluster", **schedule)
    called = []
    for head in model.base_model.alpha_heads:
        head.register_forward_hook(lambda *_: called.append(True))
    outputs = model(images[:2], output_groups=True)
    torch.testing.assert_close(model(images[:2], selection="random").logits, outputs.logits)
    assert not called
    num_layers = len(schedule["prune_layers"])
    for index, image in enumerate(images[:2]):
        logits, grouped = reference_clusters(model, image)
        torch.testing.assert_close(outputs.logits[index], logits, atol=1e-5, rtol=1e-4)
        for owners, groups in zip(outputs.patch_groups[index].tolist(), grouped, strict=True):
            assert all(owners[patch] == group[0] for group in groups for patch in group)
        for mask, groups in zip(outputs.kept_mask[index].tolist(), grouped[-num_layers:], strict=True):
            assert [patch for patch in range(64) if mask[patch]] == [group[0] for group in groups]


@MERGING
@SCHEDULES
def test_counts_kept_indices_and_batches_are_those_of_dropping(make_model, images, token_reduction, schedule):
    model = make_model(token_reduction=token_reduction, **schedule)
    outputs = model(images, output_hidden_states=True)
    counts = model.config.patch_token_counts()
    num_prefix = model.config.num_prefix_tokens
    put_out = counts[:-1] if token_reduction == "merge" else counts[1:]  # clusters are merged within a layer
    assert [states.shape[1] - num_prefix for states in outputs.hidden_states[1:]] == put_out
    assert [kept.shape[1] for kept in outputs.kept_indices] == [
        counts[layer + 1] for layer in schedule["prune_layers"]
    ]
    for earlier, later in zip(outputs.kept_indices, outputs.kept_indices[1:]):
        assert all(set(b.tolist()) <= set(a.tolist()) for a, b in zip(earlier, later))
    assert all((kept.diff(dim=1) > 0).all() for kept in outputs.kept_indices)
    torch.testing.assert_close(model(images).logits, outputs.logits, atol=1e-5, rtol=1e-4)
    for index in range(len(images)):
        alone = model(images[index : index + 1]).logits[0]
        torch.testing.assert_close(alone, outputs.logits[index], atol=1e-4, rtol=1e-4)


def test_relevance_decides_at_a_large_weight_and_not_at_none(make_model, images):
    model = make_model(token_reduction="merge", relevance_weight=0.0, **ONE)
    unsteered = model(images).kept_indices[0]
    head = model.base_model.alpha_heads[2]
    nn.init.normal_(head.weight)
    assert torch.equal(model(images).kept_indices[0], unsteered)
    model.config.relevance_weight = 1e3
    tokens = model(images, output_hidden_states=True).hidden_states[3][:, model.config.num_prefix_tokens :]
    kept = model(images).kept_indices[0]
    scores = head(tokens).squeeze(-1)
    for image_scores, image_kept in zip(scores, kept):
        candidates = list(range(1, 64, 2))
        expected = sorted(candidates, key=lambda token: image_scores[token].item())[: 64 - int(64 * 0.6)]
        assert set(range(64)) - set(image_kept.tolist()) == set(expected)


@MERGING
@SCHEDULES
def test_masked_patches_leave_no_trace(make_model, images, token_reduction, schedule):
    model = make_model(token_reduction=token_reduction, **schedule)
    mask = torch.ones(4, model.config.num_prefix_tokens + 64, dtype=torch.long)
    torch.testing.assert_close(model(images, attention_mask=mask).logits, model(images).logits)
    mask[:, model.config.num_prefix_tokens : model.config.num_prefix_tokens + 16] = 0
    changed = images.clone()
    changed[:, :, :8] = 5.0  # the first two of eight rows of patches, all masked
    expected = model(images, attention_mask=mask).logits
    assert expected.isfinite().all()
    torch.testing.assert_close(model(changed, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-4)
    mask[:, model.config.num_prefix_tokens :] = 0
    assert model(images, attention_mask=mask).logits.isfinite().all()


@MERGING
def test_other_resolutions_merge_too(make_model, token_reduction):
    model = make_model(token_reduction=token_reduction, **SEVERAL)
    outputs = model(torch.randn(2, 3, 48, 40), interpolate_pos_encoding=True)
    counts = model.config.patch_token_counts(12 * 10)
    assert [kept.shape[1] for kept in outputs.kept_indices] == [counts[layer + 1] for layer in SEVERAL["prune_layers"]]


@MERGING
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_stays_close(make_model, images, token_reduction, dtype):
    model = make_model(token_reduction=token_reduction, **SEVERAL)
    expected = model(images).logits
    logits = model.to(dtype)(images).logits
    assert logits.isfinite().all()
    assert nn.functional.cosine_similarity(logits.float(), expected).min() > 0.95


@MERGING
def test_attention_that_takes_no_bias_is_refused(make_model, images, token_reduction):
    model = make_model(token_reduction=token_reduction, **ONE)
    model.config._attn_implementation = "flash_attention_2"
    named = ("`attn_implementation`", "sdpa, eager", f"'{token_reduction}'", "'flash_attention_2'")
    with pytest.raises(ValueError, match=naming(*named)):
        model(images)


def test_training_is_the_same_as_with_dropping(make_model, images):
    logits = [
        make_model(token_reduction=reduction, **ONE).train()(images, generator=torch.Generator().manual_seed(0)).logits
        for reduction in ("drop", "merge", "cluster")
    ]
    assert all(torch.equal(each, logits[0]) for each in logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "token_reduction", "schedule"),
    (("vit", "merge", ONE_TWICE), ("deit", "cluster", TWO)),
    indirect=["family"],
)
def test_compiles_as_one_graph_and_exports_with_a_dynamic_batch(make_model, images, token_reduction, schedule):
    model = make_model(token_reduction=token_reduction, num_hidden_layers=3, **schedule)
    torch.compiler.reset()
    with torch.no_grad():
        logits = torch.compile(model, fullgraph=True, backend="aot_eager")(images).logits
        torch.testing.assert_close(logits, model(images).logits, atol=1e-5, rtol=1e-4)
    program = torch.export.export(
        model, (), {"pixel_values": images}, dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", max=64)}}
    )
    for batch in (images[:1], torch.cat((images, images))):
        logits = program.module()(pixel_values=batch).logits
        torch.testing.assert_close(logits, model(batch).logits, atol=1e-5, rtol=1e-4)
