"""Tokens that are merged instead of dropped."""

import pytest
import torch
from conftest import MERGE_BEFORE_MLP, naming
from torch import nn

from tnt_hf.token_reduction_tnt import match_similar, merge, partition_positions


ONE = {"prune_layers": [2], "keep_rates": [0.6]}
ONE_TWICE = {"prune_layers": [2], "keep_rates": [0.2], "num_similar_tokens": 8}
TWO = {"prune_layers": [0, 1], "keep_rates": [0.7, 0.4], "num_similar_tokens": 13}
SEVERAL = {"prune_layers": [0, 1, 2, 4], "keep_rates": [0.7, 0.4, 0.9, 0.5], "num_similar_tokens": 13}
SCHEDULES = pytest.mark.parametrize("schedule", (ONE, ONE_TWICE, SEVERAL), ids=("one", "rounds", "several"))


def reference_merge(tokens, sizes, num_merged, partition, resistance):
    """One image, in the words of the description, token by token."""
    half = len(partition) // 2
    candidates, references = partition[:half], partition[half:]
    nearest = {}
    for token in candidates:
        similarity = {r: nn.functional.cosine_similarity(tokens[token], tokens[r], dim=0).item() for r in references}
        nearest[token] = max(similarity, key=similarity.get)
        similarity[token] = similarity[nearest[token]] - resistance[token].item()
        nearest[token] = (nearest[token], similarity[token])
    leaving = sorted(candidates, key=lambda token: -nearest[token][1])[:num_merged]
    members = {token: [token] for token in range(len(tokens)) if token not in leaving}
    for token in leaving:
        members[nearest[token][0]].append(token)
    kept = sorted(members)
    merged = [sum(sizes[t] * tokens[t] for t in members[k]) / sum(sizes[t] for t in members[k]) for k in kept]
    return torch.stack(merged), torch.stack([sum(sizes[t] for t in members[k]) for k in kept]), kept


@pytest.mark.parametrize(("num_tokens", "num_merged"), ((12, 1), (12, 6), (13, 5), (2, 1)))
def test_merge_joins_the_most_similar_by_their_weighted_mean(num_tokens, num_merged):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, num_tokens, 5, generator=generator)
    sizes = torch.randint(1, 5, (3, num_tokens), generator=generator).float()
    resistance = torch.rand(3, num_tokens, generator=generator)
    partition = torch.randperm(num_tokens, generator=generator)
    matching = match_similar(tokens, num_merged, partition, penalty=resistance)
    merged, merged_sizes, positions = merge(tokens, sizes, matching)
    for image in range(3):
        expected = reference_merge(tokens[image], sizes[image], num_merged, partition.tolist(), resistance[image])
        torch.testing.assert_close(merged[image], expected[0])
        torch.testing.assert_close(merged_sizes[image], expected[1])
        assert positions[image].tolist() == expected[2]
    torch.testing.assert_close(merged_sizes.sum(dim=1), sizes.sum(dim=1))
    before, after = (tokens * sizes.unsqueeze(-1)).sum(dim=1), (merged * merged_sizes.unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_merging_equal_tokens_changes_no_answer(make_model):
    """A token of size n attends and is attended to as n equal tokens are: a uniform image without positions."""
    model = make_model(token_reduction="merge")
    nn.init.zeros_(model.base_model.embeddings.position_embeddings)
    images = torch.rand(2, 3, 1, 1).expand(-1, -1, 32, 32)
    expected = model(images).logits
    for schedule in (ONE, ONE_TWICE, SEVERAL):
        model.set_schedule(**schedule)
        torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-4)


def reference_logits_of_merging_before_the_mlp(model, images):
    """Of a ViT, layer by layer and half by half."""
    config, backbone = model.config, model.base_model
    steps = {step.layer: step for step in config.reduction_steps()}
    tokens = backbone.embeddings(images)
    sizes = torch.ones(tokens.shape[:2])
    for index, layer in enumerate(backbone.layers):
        bias = config.size_bias * sizes.log()[:, None, None, :]
        tokens = tokens + layer.attention(layer.layernorm_before(tokens), bias)[0]
        if index in steps:
            patches, patch_sizes = tokens[:, 1:], sizes[:, 1:]
            num_leaving = patches.shape[1] - steps[index].num_kept
            matching = match_similar(patches, num_leaving, partition_positions(patches.shape[1], "strided"))
            means, left, _ = merge(patches, patch_sizes, matching)
            norms, _, _ = merge(patches.norm(dim=-1, keepdim=True), patch_sizes, matching)
            means = nn.functional.normalize(means, dim=-1) * norms
            tokens, sizes = torch.cat((tokens[:, :1], means), dim=1), torch.cat((sizes[:, :1], left), dim=1)
        tokens = tokens + layer.mlp(layer.layernorm_after(tokens))
    return model.classifier(backbone.layernorm(tokens)[:, 0])


@pytest.mark.parametrize("family", ("vit",), indirect=True)
def test_tokens_may_be_merged_between_attention_and_mlp(make_model, images):
    several = {"prune_layers": [0, 1, 3], "keep_rates": [0.7, 0.8, 0.6]}
    model = make_model(relevance_weight=0.0, **MERGE_BEFORE_MLP, **several)
    expected = reference_logits_of_merging_before_the_mlp(model, images)
    torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-4)


@SCHEDULES
def test_counts_kept_indices_and_batches_are_those_of_dropping(make_model, images, schedule):
    model = make_model(token_reduction="merge", **schedule)
    outputs = model(images, output_hidden_states=True)
    counts = model.config.patch_token_counts()
    num_prefix = model.config.num_prefix_tokens
    assert [states.shape[1] - num_prefix for states in outputs.hidden_states[1:]] == counts[:-1]
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


@SCHEDULES
def test_masked_patches_leave_no_trace(make_model, images, schedule):
    model = make_model(token_reduction="merge", **schedule)
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


def test_other_resolutions_merge_too(make_model):
    model = make_model(token_reduction="merge", **SEVERAL)
    outputs = model(torch.randn(2, 3, 48, 40), interpolate_pos_encoding=True)
    counts = model.config.patch_token_counts(12 * 10)
    assert [kept.shape[1] for kept in outputs.kept_indices] == [counts[layer + 1] for layer in SEVERAL["prune_layers"]]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_stays_close(make_model, images, dtype):
    model = make_model(token_reduction="merge", **SEVERAL)
    expected = model(images).logits
    logits = model.to(dtype)(images).logits
    assert logits.isfinite().all()
    assert nn.functional.cosine_similarity(logits.float(), expected).min() > 0.95


def test_attention_that_takes_no_bias_is_refused(make_model, images):
    model = make_model(token_reduction="merge", **ONE)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=naming("`attn_implementation`", "sdpa, eager", "'flash_attention_2'")):
        model(images)


def test_training_is_the_same_as_with_dropping(make_model, images):
    logits = [
        make_model(token_reduction=reduction, **ONE).train()(images, generator=torch.Generator().manual_seed(0)).logits
        for reduction in ("drop", "merge")
    ]
    assert torch.equal(*logits)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "schedule"), (("vit", ONE_TWICE), ("deit", TWO)), indirect=["family"])
def test_compiles_as_one_graph_and_exports_with_a_dynamic_batch(make_model, images, schedule):
    model = make_model(token_reduction="merge", num_hidden_layers=3, **schedule)
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
