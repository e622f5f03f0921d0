import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import TINY, naming
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tnt_hf import (
    TntDeiTConfig,
    TntDeiTForImageClassification,
    TntViTForImageClassification,
    modeling_tnt,
    token_reduction_tnt,
)
from tnt_hf.conversion import to_plain_model
from tnt_hf.inference import unmerge
from tnt_hf.schedules_tnt import UNPRUNED, Schedule
from tnt_hf.training import freeze_idle_heads


SINGLE = {"prune_layers": [2], "keep_rates": [0.6], "num_similar_tokens": 8}
MULTI = {"prune_layers": [1, 2, 4], "keep_rates": [0.8, 0.7, 0.5], "num_similar_tokens": 13}
LAST_AND_FIRST = {"prune_layers": [0, 5], "keep_rates": [0.7, 0.5]}
SMALLER_IMAGES = Schedule("smaller", (1, 2), (0.7, 0.5), 0, 20)
SCHEDULES = pytest.mark.parametrize("schedule", (SINGLE, MULTI, LAST_AND_FIRST), ids=("single", "multi", "ends"))


def patch_hidden_states(model, hidden_states):
    return hidden_states[:, model.config.num_prefix_tokens :]


@pytest.mark.parametrize("attn_implementation", ("sdpa", "eager"))
def test_unpruned_model_equals_transformers_bit_for_bit(make_model, images, attn_implementation):
    model = make_model(attn_implementation=attn_implementation)
    plain = to_plain_model(model)
    plain.set_attn_implementation(attn_implementation)
    expected = plain(images, output_hidden_states=True)
    outputs = model(images, output_hidden_states=True)
    assert torch.equal(outputs.logits, expected.logits)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(outputs.hidden_states, expected.hidden_states))
    assert outputs.kept_indices is None


def test_keep_rate_one_drops_nothing(make_model, images):
    model = make_model()
    expected = model(images).logits
    model.set_schedule([1, 3], [1.0, 1.0])
    outputs = model(images)
    assert torch.equal(outputs.logits, expected)
    assert all(torch.equal(kept, torch.arange(64).expand(4, -1)) for kept in outputs.kept_indices)


@pytest.mark.parametrize("attn_implementation", ("sdpa", "eager"))
@pytest.mark.parametrize("schedule", ({}, SINGLE, MULTI), ids=("full", "single", "multi"))
def test_last_layer_computes_the_prefix_alone_unless_more_is_asked_for(
    make_model, images, schedule, attn_implementation
):
    model = make_model(attn_implementation=attn_implementation, **schedule)
    num_prefix = model.config.num_prefix_tokens
    rows = []
    model.base_model.layers[-1].mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    mask = torch.ones(4, num_prefix + 64, dtype=torch.long)
    mask[:, -8:] = 0
    for attention_mask in (None, mask):
        logits = model(images, attention_mask=attention_mask).logits
        whole = model(images, attention_mask=attention_mask, output_hidden_states=True).logits
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
    remaining = num_prefix + model.config.patch_token_counts()[-1]
    assert rows == [num_prefix, remaining] * 2
    assert model.base_model(images).last_hidden_state.shape[1] == remaining
    if attn_implementation == "eager":
        assert model(images, output_attentions=True).attentions[-1].shape[-2:] == (remaining, remaining)
    model.config.output_hidden_states = True
    model(images)
    assert rows[-1] == remaining


def test_hooks_on_every_attention_and_layer_run(make_model, images):
    model = make_model()
    called = []
    for layer in model.base_model.layers:
        layer.register_forward_hook(lambda module, args, output: called.append("layer"))
        layer.attention.register_forward_hook(lambda module, args, output: called.append("attention"))
    model(images)
    assert called == ["attention", "layer"] * 6


def attention_with_a_mask_of_keys(module, query, key, value, attention_mask, **kwargs):
    """As flash attention, which takes masks of shape `(images, tokens)`."""
    return sdpa_attention_forward(module, query, key, value, attention_mask[:, None, None].bool(), **kwargs)


def test_last_layer_is_whole_under_a_mask_without_a_dimension_of_queries(make_model, images):
    AttentionInterface.register("mask_of_keys", attention_with_a_mask_of_keys)
    AttentionMaskInterface.register("mask_of_keys", lambda attention_mask, **_: attention_mask)
    model = make_model()
    num_prefix = model.config.num_prefix_tokens
    mask = torch.ones(4, num_prefix + 64, dtype=torch.long)
    mask[:, -8:] = 0
    rows = []
    model.base_model.layers[-1].mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    expected = model(images, attention_mask=mask).logits
    model.set_attn_implementation("mask_of_keys")
    torch.testing.assert_close(model(images, attention_mask=mask).logits, expected)
    assert rows == [num_prefix, num_prefix + 64]


def test_last_layer_is_whole_when_tokens_are_dropped_after_it(make_model, images):
    model = make_model(**LAST_AND_FIRST)
    outputs = model(images)
    assert [kept.shape[1] for kept in outputs.kept_indices] == [44, 22]
    torch.testing.assert_close(outputs.logits, model(images, output_hidden_states=True).logits)


def test_last_layer_gives_the_gradients_of_the_whole_layer(make_model, images):
    gradients = []
    for output_hidden_states in (False, True):
        model = make_model(num_noise_layers=6).train()
        generator = torch.Generator().manual_seed(0)
        kwargs = {"generator": generator, "output_hidden_states": output_hidden_states}
        model(images, labels=torch.arange(4), **kwargs).loss.backward()
        gradients.append(model.base_model.alpha_heads[0].weight.grad)
    assert (gradients[0] - gradients[1]).norm() <= 1e-3 * gradients[1].norm()


@SCHEDULES
def test_logits_are_deterministic_and_independent_of_the_batch(make_model, images, schedule):
    model = make_model(**schedule)
    together = model(images)
    assert torch.equal(model(images).logits, together.logits)
    for index in range(len(images)):
        alone = model(images[index : index + 1])
        torch.testing.assert_close(alone.logits[0], together.logits[index], atol=1e-4, rtol=1e-4)
        for kept, kept_alone in zip(together.kept_indices, alone.kept_indices):
            assert torch.equal(kept[index], kept_alone[0])


def test_single_layer_keeps_the_relevant_and_drops_the_similar(make_model, images):
    """Against a loop over images and tokens that follows the description of the method."""
    model = make_model()
    num_kept, num_similar = int(64 * 0.6), 8
    tokens = patch_hidden_states(model, model(images, output_hidden_states=True).hidden_states[3])
    model.set_schedule(**SINGLE)
    kept = model(images).kept_indices[0]
    for image_tokens, image_kept in zip(tokens, kept):
        scores = model.base_model.alpha_heads[2](image_tokens)[:, 0].tolist()
        selected = sorted(sorted(range(64), key=lambda token: -scores[token])[: num_kept + num_similar])
        candidates, references = selected[1::2], selected[::2]
        nearest = {
            token: max(
                nn.functional.cosine_similarity(image_tokens[token], image_tokens[r], dim=0) for r in references
            )
            for token in candidates
        }
        dropped = sorted(candidates, key=lambda token: -nearest[token])[:num_similar]
        assert image_kept.tolist() == sorted(set(selected) - set(dropped))


def test_several_layers_drop_similar_embeddings_first_then_the_irrelevant(make_model, images):
    model = make_model(**MULTI)
    outputs = model(images, output_hidden_states=True)
    num_prefix = model.config.num_prefix_tokens
    assert [states.shape[1] - num_prefix for states in outputs.hidden_states] == [51, 51, 51, 40, 28, 28, 14]
    assert [kept.shape for kept in outputs.kept_indices] == [(4, 40), (4, 28), (4, 14)]
    for earlier, later in zip(outputs.kept_indices, outputs.kept_indices[1:]):
        assert all(set(b.tolist()) < set(a.tolist()) for a, b in zip(earlier, later))
    survivors = outputs.kept_indices[0]
    embeddings = patch_hidden_states(model, model.base_model.embeddings(images))
    first_input = patch_hidden_states(model, outputs.hidden_states[0])
    for image_embeddings, image_input, kept in zip(embeddings, first_input, survivors):
        positions = [torch.cdist(token[None], image_embeddings).argmin().item() for token in image_input]
        assert positions == sorted(positions)
        assert set(kept.tolist()) < set(positions)


@SCHEDULES
def test_kept_indices_name_the_patches_that_enter_the_next_layer(make_model, images, schedule):
    model = make_model(**schedule)
    layer = schedule["prune_layers"][0]
    entering = []
    handle = model.base_model.layers[layer + 1].register_forward_pre_hook(
        lambda module, args: entering.append(patch_hidden_states(model, args[0]))
    )
    outputs = model(images, output_hidden_states=True)
    handle.remove()
    kept = outputs.kept_indices[0]
    assert (kept.diff(dim=1) > 0).all() and kept.min() >= 0 and kept.max() < 64
    assert entering[0].shape[1] == kept.shape[1]
    if schedule is not MULTI:  # there the output of the layer no longer holds all patches
        leaving = patch_hidden_states(model, outputs.hidden_states[layer + 1])
        assert torch.equal(entering[0], leaving.gather(1, kept.unsqueeze(-1).expand(-1, -1, leaving.shape[-1])))


@pytest.mark.parametrize("num_similar_tokens", (0, 8))
def test_attention_mask_shortens_with_the_sequence_and_masked_patches_go_first(make_model, images, num_similar_tokens):
    model = make_model(prune_layers=[1], keep_rates=[0.5], num_similar_tokens=num_similar_tokens)
    num_prefix = model.config.num_prefix_tokens
    mask = torch.ones(4, num_prefix + 64, dtype=torch.long)
    torch.testing.assert_close(model(images, attention_mask=mask).logits, model(images).logits)
    mask[:, num_prefix : num_prefix + 16] = 0
    outputs = model(images, attention_mask=mask)
    assert outputs.kept_indices[0].min() >= 16
    changed = images.clone()
    changed[:, :, :8] = 5.0  # the first two of eight rows of patches, all masked
    torch.testing.assert_close(model(changed, attention_mask=mask).logits, outputs.logits, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=naming("`attention_mask`", tuple(mask[:, None, None].shape))):
        model(images, attention_mask=mask[:, None, None])
    model.set_schedule(**MULTI)
    outputs = model(images, attention_mask=mask)
    torch.testing.assert_close(model(changed, attention_mask=mask).logits, outputs.logits, atol=1e-5, rtol=1e-4)
    assert all(kept.min() >= 16 for kept in outputs.kept_indices)


@SCHEDULES
def test_other_resolutions_and_non_square_images(make_model, schedule):
    model = make_model(**schedule)
    outputs = model(torch.randn(2, 3, 48, 40), interpolate_pos_encoding=True)
    counts = model.config.patch_token_counts(12 * 10)
    assert [kept.shape[1] for kept in outputs.kept_indices] == [
        counts[layer + 1] for layer in schedule["prune_layers"]
    ]
    with pytest.raises(ValueError, match=r"48\*40"):
        model(torch.randn(2, 3, 48, 40))


def test_kept_indices_are_those_of_the_mask(make_model, images):
    outputs = make_model(**MULTI)(images)
    assert outputs.kept_mask.shape == (4, 3, 64) and set(outputs.kept_mask.unique().tolist()) == {0, 1}
    for index, kept in enumerate(outputs.kept_indices):
        for image in range(4):
            assert kept[image].tolist() == [patch for patch in range(64) if outputs.kept_mask[image, index, patch]]


def test_models_made_from_one_config_have_budgets_of_their_own(make_model, family, images):
    full = make_model()
    fast = type(full)(full.config).eval()
    backbone = type(full.base_model)(full.config).eval()
    fast.load_state_dict(full.state_dict())
    fast.set_schedule(**SINGLE)
    backbone.set_schedule([1], [0.5])
    assert full.config.prune_layers == [] and full(images).kept_mask is None
    assert fast(images).kept_mask.shape == (4, 1, 64) and fast.base_model.config is fast.config
    setattr(fast, fast.base_model_prefix, backbone)
    fast.set_schedule([0, 1], [0.5, 0.5])
    assert fast(images).kept_mask.shape == (4, 2, 64)
    setattr(fast, fast.base_model_prefix, type(full.base_model)(fast.config, add_pooling_layer=False).eval())
    backbone.set_schedule([1], [0.5])
    config = fast.base_model.config
    config.set_schedule([], [])
    assert fast(images).kept_mask is None and backbone(images).kept_mask is not None


def test_attentions_shrink_with_the_sequence(make_model, images):
    model = make_model(attn_implementation="eager", **SINGLE)
    num_prefix = model.config.num_prefix_tokens
    sizes = [attention.shape[-1] - num_prefix for attention in model(images, output_attentions=True).attentions]
    assert sizes == [64, 64, 64, 38, 38, 38]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@SCHEDULES
def test_half_precision_keeps_nearly_the_same_tokens(make_model, images, schedule, dtype):
    model = make_model(**schedule)
    expected = model(images)
    outputs = model.to(dtype)(images)
    assert outputs.logits.dtype == dtype
    for kept, kept_in_half in zip(expected.kept_indices, outputs.kept_indices):
        agreement = (kept[:, :, None] == kept_in_half[:, None]).any(-1).float().mean()
        assert agreement > 0.9
    spread = expected.logits.std()
    assert (outputs.logits.float() - expected.logits).abs().mean() < 0.2 * spread


def test_noise_is_gated_by_relevance_and_spares_the_prefix(make_model, images):
    model = make_model(noise_std=0.5, num_noise_layers=1, noise_layer_norm=False).train()
    inputs = []
    handles = [
        model.base_model.layers[1].register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
        model.base_model.layers[0].register_forward_hook(lambda module, args, output: inputs.append(output)),
    ]
    model(images, generator=torch.Generator().manual_seed(3))
    for handle in handles:
        handle.remove()
    clean, noisy = inputs
    patches = patch_hidden_states(model, clean)
    relevance = model.base_model.alpha_heads[0](patches).squeeze(-1).softmax(-1)
    noise = torch.randn(patches.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(noisy[:, : model.config.num_prefix_tokens], clean[:, : model.config.num_prefix_tokens])
    expected = patches + 0.5 * (1 - relevance)[..., None] * noise
    torch.testing.assert_close(patch_hidden_states(model, noisy), expected)


def noise_after_each_layer(model, images, seed):
    """What training added to the patch tokens after each noised layer, `(layers, images, tokens, channels)`."""
    outputs, inputs = {}, {}
    handles = []
    for index, layer in enumerate(model.base_model.layers):
        hooks = (
            layer.register_forward_pre_hook(lambda _, args, index=index: inputs.update({index: args[0]})),
            layer.register_forward_hook(lambda _, args, output, index=index: outputs.update({index: output})),
        )
        handles.extend(hooks)
    model(images, generator=torch.Generator().manual_seed(seed))
    for handle in handles:
        handle.remove()
    noised = range(model.config.num_noise_layers)
    return torch.stack([patch_hidden_states(model, inputs[index + 1] - outputs[index]) for index in noised]), outputs


def test_capacity_gate_spares_the_most_relevant_and_scales_with_the_token(make_model, images):
    model = make_model(noise_std=1.5, num_noise_layers=2, noise_layer_norm=False, noise_gate="capacity").train()
    images = images.repeat(16, 1, 1, 1)
    noise, outputs = noise_after_each_layer(model, images, seed=3)
    for layer in range(2):
        patches = patch_hidden_states(model, outputs[layer])
        scores = model.base_model.alpha_heads[layer](patches).squeeze(-1)
        amount = noise[layer].std(dim=-1) / patches.std(dim=-1) / 1.5
        amount = amount.gather(1, scores.argsort(dim=-1, descending=True))
        assert amount[:, :3].mean() < 0.1 and 0.9 < amount[:, -3:].mean() < 1.1
        spared = (amount < 0.5).float().mean(dim=-1)  # for each image another share of its tokens
        assert 0.1 < spared.min() < 0.3 and 0.7 < spared.max() < 0.95


def test_noise_after_one_layer_reaches_each_image_once(make_model, images):
    model = make_model(noise_std=0.5, num_noise_layers=3, noise_layer_norm=False, noise_one_layer=True).train()
    noise, _ = noise_after_each_layer(model, images.repeat(16, 1, 1, 1), seed=3)
    is_noised = noise.abs().amax(dim=(-1, -2)) > 0
    assert is_noised.sum(dim=0).tolist() == [1] * 64
    assert is_noised.sum(dim=1).min() > 8  # 64 images on 3 layers


@pytest.mark.parametrize("noise_gate", ("softmax", "capacity"))
@pytest.mark.parametrize("num_noise_layers", (5, 6), ids=("not the last layer", "every layer"))
def test_every_learning_head_gets_a_gradient_from_either_gate(make_model, images, noise_gate, num_noise_layers):
    fields = {"noise_std": 1.0, "noise_layer_norm": False, "noise_one_layer": True}
    model = make_model(noise_gate=noise_gate, num_noise_layers=num_noise_layers, **fields).train()
    model.freeze_backbone()
    model(images.repeat(8, 1, 1, 1), labels=torch.arange(32) % 7).loss.backward()
    for head in model.base_model.alpha_heads[: model.config.num_learning_layers]:
        assert head.weight.grad.isfinite().all() and head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("token_reduction", ("drop", "merge"))
def test_autocast_leaves_scores_and_similarities_in_full_precision(make_model, images, token_reduction, monkeypatch):
    model = make_model(token_reduction=token_reduction, **SINGLE)
    products = []
    norms = token_reduction_tnt.norms

    def remember(vectors):
        products.append(((vectors / norms(vectors).unsqueeze(-1)) @ vectors.transpose(-1, -2).float()).dtype)
        return norms(vectors)

    monkeypatch.setattr(token_reduction_tnt, "norms", remember)
    with torch.autocast("cpu", torch.bfloat16):
        hidden_states = model.base_model(images, output_hidden_states=True).hidden_states
        scores = model.base_model.relevance_scores(2, hidden_states[3])
    assert scores.dtype == torch.float32 and set(products) == {torch.float32}
    assert len(scores[0].unique()) == scores.shape[1]
    model.train()(images, labels=torch.arange(4)).loss.backward()


def test_training_never_prunes(make_model, images):
    model = make_model(**SINGLE).train()
    outputs = model(images, output_hidden_states=True)
    assert outputs.kept_indices is None
    assert len({states.shape[1] for states in outputs.hidden_states}) == 1


def test_random_settings_follow_the_generator(make_model, images):
    for fields in ({"selection": "random", **SINGLE}, {"similarity_partition": "random", **MULTI}):
        model = make_model(**fields)
        first, again, other = (
            model(images, generator=torch.Generator().manual_seed(seed)).kept_indices[0] for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("num_layers", "num_noise_layers", "learning"), ((6, 5, 5), (6, 6, 5), (6, 2, 2), (3, 5, 2)), ids=str
)
def test_freeze_backbone_leaves_exactly_the_heads_with_a_gradient(
    make_model, images, num_layers, num_noise_layers, learning
):
    model = make_model(num_hidden_layers=num_layers, num_noise_layers=num_noise_layers, noise_std=0.5).train()
    model.freeze_backbone()
    model(images, labels=torch.arange(4)).loss.backward()
    prefix = model.base_model_prefix
    expected = {f"{prefix}.alpha_heads.{i}.{name}" for i in range(learning) for name in ("weight", "bias")}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == expected
    assert all(head.weight.grad.abs().sum() > 0 for head in model.base_model.alpha_heads[:learning])


def test_freeze_idle_heads_leaves_exactly_the_parameters_with_a_gradient(make_model, images):
    for num_noise_layers in (0, 2, 6):
        model = make_model(num_noise_layers=num_noise_layers).train()
        freeze_idle_heads(model)
        model(images, labels=torch.arange(4)).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("fields", ({"num_noise_layers": 0}, {"noise_std": 0.0}, {"num_hidden_layers": 1}))
def test_freeze_backbone_refuses_when_nothing_could_learn(make_model, fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=naming("scoring head", f"{name}={value}")):
        make_model(**fields).freeze_backbone()


def test_step_of_heads_keeps_no_copy_of_the_patch_tokens(make_model, images):
    model = make_model().train()
    model.freeze_backbone()
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(images, labels=torch.arange(4)).loss
    num_bytes = 4 * images.shape[0] * 64 * model.config.hidden_size
    assert list(kept.values()).count(num_bytes) == model.config.num_noise_layers  # the noise itself
    loss.backward()


def test_gradient_checkpointing_gives_the_same_gradients(make_model, images):
    gradients = []
    for checkpointing in (False, True):
        model = make_model(noise_std=0.5).train()
        model.freeze_backbone()
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(images, labels=torch.arange(4), generator=torch.Generator().manual_seed(0)).loss
        loss.backward()
        gradients.append(torch.cat([head.weight.grad for head in model.base_model.alpha_heads[:5]]))
    torch.testing.assert_close(*gradients)


def test_soft_labels_are_cross_entropy_and_change_nothing_in_the_config(make_model, images):
    model = make_model().train()
    labels = torch.arange(4)
    generator = torch.Generator()
    hard = [model(images, labels=each, generator=generator.manual_seed(0)).loss for each in (labels, labels.flip(0))]
    one_hot = nn.functional.one_hot(labels, 7).float()
    mixed = 0.7 * one_hot + 0.3 * one_hot.flip(0)
    soft = model(images, labels=mixed, generator=generator.manual_seed(0)).loss
    torch.testing.assert_close(soft, 0.7 * hard[0] + 0.3 * hard[1])
    assert model.config.problem_type is None


def test_labels_that_are_no_probabilities_need_a_problem_type(make_model, images):
    model = make_model()
    several = torch.tensor([[1.0, 0, 1, 0, 1, 0, 0], [0] * 7, [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]])
    for labels in (several, torch.eye(7)[:4]):
        with pytest.raises(ValueError, match="problem_type"):
            model(images, labels=labels)
    model.config.problem_type = "multi_label_classification"
    outputs = model(images, labels=several)
    expected = nn.functional.binary_cross_entropy_with_logits(outputs.logits, several)
    torch.testing.assert_close(outputs.loss, expected)
    model.config.problem_type = None
    for labels in (several.long(), several[:, :3], torch.arange(3)):
        with pytest.raises(ValueError, match=naming("`labels`", (4,), tuple(labels.shape))):
            model(images, labels=labels)
    model.config.problem_type = "single_label_classification"
    loss = model(images, labels=torch.eye(7)[:4]).loss
    torch.testing.assert_close(loss, model(images, labels=torch.arange(4)).loss)
    model.config.problem_type = "regression"
    targets = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    outputs = model(images, labels=targets)
    torch.testing.assert_close(outputs.loss, nn.functional.mse_loss(outputs.logits, targets))


def test_deit_loss_is_of_the_cls_head_in_training_and_of_the_mean_in_evaluation(images):
    model = TntDeiTForImageClassification(TntDeiTConfig(**TINY))
    labels = torch.arange(4)
    for training in (True, False):
        outputs = model.train(training)(images, labels=labels)
        torch.testing.assert_close(outputs.logits, (outputs.cls_logits + outputs.distillation_logits) / 2)
        expected = nn.functional.cross_entropy(outputs.cls_logits if training else outputs.logits, labels)
        torch.testing.assert_close(outputs.loss, expected)
    model.config.distillation_head_in_loss = True
    outputs = model.train()(images, labels=labels)
    both = [
        nn.functional.cross_entropy(logits, labels) for logits in (outputs.cls_logits, outputs.distillation_logits)
    ]
    torch.testing.assert_close(outputs.loss, sum(both) / 2)
    freeze_idle_heads(model)
    assert model.distillation_classifier.weight.requires_grad


def test_gradient_accumulation_does_not_scale_the_loss(make_model, images, tmp_path):
    weights = []
    dataset = [{"pixel_values": image, "labels": index % 7} for index, image in enumerate(images)]
    for batch_size, accumulation in ((4, 1), (1, 4)):
        model = make_model(noise_std=0.0, noise_layer_norm=False)
        arguments = TrainingArguments(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            max_grad_norm=0,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=dataset).train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("token_reduction", ("drop", "merge"))
def test_schedule_of_a_call_is_as_that_of_the_config_and_leaves_it(make_model, images, token_reduction):
    model = make_model(token_reduction=token_reduction, **SINGLE)
    given, own = Schedule("given", **MULTI), model(images)
    outputs = model(images, schedule=given)
    assert torch.equal(model(images).logits, own.logits)
    assert model(images, schedule=UNPRUNED).kept_mask is None
    model.set_schedule(given)
    assert torch.equal(model(images).logits, outputs.logits)
    assert torch.equal(model(images).kept_mask, outputs.kept_mask) and not torch.equal(own.logits, outputs.logits)
    drawn = (model(images, selection="random", generator=torch.Generator().manual_seed(0)) for _ in range(2))
    first, again = (each.kept_mask for each in drawn)
    assert torch.equal(first, again) and not torch.equal(first, outputs.kept_mask)
    assert model.config.selection == "relevance"
    with pytest.raises(ValueError, match=naming("`prune_layers`", "0 to 5", 6)):
        model(images, schedule=Schedule("deep", (6,), (0.5,)))


@pytest.mark.parametrize("family", ("vit",), indirect=True)
def test_smaller_images_are_those_that_the_plain_model_sees(make_model, images):
    model = make_model()
    smaller = nn.functional.interpolate(images, (20, 20), mode="bicubic", antialias=True)
    expected = to_plain_model(model)(smaller, interpolate_pos_encoding=True).logits
    outputs = model(images, schedule=Schedule("", (), (), 0, 20))
    torch.testing.assert_close(outputs.logits, expected, atol=1e-5, rtol=1e-4)
    model.set_schedule(Schedule("", (), (), 0, (20, 20)))
    torch.testing.assert_close(model(images).logits, outputs.logits)
    assert model(images, schedule=SMALLER_IMAGES).kept_mask.shape == (4, 2, 25)
    assert model(images, schedule=UNPRUNED, output_hidden_states=True).hidden_states[0].shape[1] == 65


@pytest.mark.parametrize("family", ("vit",), indirect=True)
def test_a_smaller_size_is_part_of_the_saved_schedule(make_model, images, tmp_path):
    model = make_model(token_reduction="cluster")
    model.set_schedule(SMALLER_IMAGES)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config.schedule.settings == SMALLER_IMAGES.settings
    torch.testing.assert_close(loaded(images).logits, model(images).logits)
    loaded.set_schedule([1], [0.5])
    assert loaded.config.compute_size is None


def test_training_steps_can_carry_out_a_schedule(make_model, images):
    """Gradient checkpointing changes no gradient, and no noise is added."""
    model = make_model(token_reduction="cluster")
    gradients = []
    for checkpointing in (False, True):
        trained = copy.deepcopy(model).train()
        if checkpointing:
            trained.gradient_checkpointing_enable()
        loss = trained(images, labels=torch.arange(4), schedule=SMALLER_IMAGES).loss
        loss.backward()
        gradients.append(trained.base_model.layers[0].mlp.fc1.weight.grad)
        if not hasattr(model.config, "distillation_head_in_loss"):
            torch.testing.assert_close(loss, model(images, labels=torch.arange(4), schedule=SMALLER_IMAGES).loss)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().sum() > 0


def test_arguments_of_a_call_and_of_a_schedule_are_checked(make_model, images):
    model = make_model(**SINGLE)
    with pytest.raises(ValueError, match=naming("`selection`", "relevance, random", "'randm'")):
        model(images, selection="randm")
    with pytest.raises(ValueError, match=naming("schedule", "(0.5,)", [0.9])):
        model.set_schedule(Schedule("", (1,), (0.5,)), [0.9])
    assert model.config.schedule == Schedule("", **SINGLE)


@pytest.mark.parametrize("token_reduction", ("drop", "merge", "cluster"))
def test_tokens_of_a_model_are_put_back_on_its_grid(make_model, images, token_reduction):
    model = make_model(token_reduction=token_reduction, **MULTI)
    outputs = model.base_model(images, output_groups=True)
    assert outputs.patch_groups.shape == (4, 1 + len(MULTI["prune_layers"]), 64)
    tokens, groups = patch_hidden_states(model, outputs.last_hidden_state), outputs.patch_groups[:, -1]
    grid = unmerge(tokens, groups)
    for image, kept in enumerate(outputs.kept_indices[-1].tolist()):
        for patch, owner in enumerate(groups[image].tolist()):
            expected = tokens[image, kept.index(owner)] if owner >= 0 else torch.zeros(32)
            assert torch.equal(grid[image, patch], expected)
    assert (groups < 0).any() == (token_reduction == "drop")


@pytest.mark.parametrize("token_reduction", ("merge", "cluster"))
def test_layers_may_lie_on_several_devices(make_model, images, token_reduction):
    model = make_model(token_reduction=token_reduction, **MULTI)
    move = {"with_kwargs": True}
    for part in (*model.base_model.layers[3:], model.base_model.layernorm, *list(model.children())[1:]):
        part.to("meta").register_forward_pre_hook(
            lambda _, args, kwargs: (tuple(None if each is None else each.to("meta") for each in args), kwargs), **move
        )
    for head in model.base_model.alpha_heads[3:]:
        head.to("meta")
    outputs = model(images, output_groups=True)
    assert outputs.logits.device.type == outputs.kept_mask.device.type == outputs.patch_groups.device.type == "meta"


def test_threads_may_use_one_model_under_schedules_of_their_own(make_model, images):
    model = make_model(token_reduction="merge")
    schedules = [UNPRUNED, Schedule("single", **SINGLE), Schedule("multi", **MULTI)]
    expected = {schedule: model(images, schedule=schedule).logits for schedule in schedules}
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda schedule: (schedule, model(images, schedule=schedule).logits), schedules * 20))
    assert all(torch.equal(logits, expected[schedule]) for schedule, logits in answers)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "token_reduction"), (("vit", "cluster"), ("deit", "drop")), indirect=["family"])
def test_compiles_once_for_each_schedule_of_a_call(make_model, images, token_reduction):
    model = make_model(num_hidden_layers=3, token_reduction=token_reduction)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    schedules = [
        UNPRUNED,
        Schedule("single", (1,), (0.6,), 8),
        Schedule("several", (0, 2), (0.8, 0.5), 13),
        SMALLER_IMAGES,
    ]
    with torch.no_grad():
        for schedule in (*schedules, *schedules, Schedule("again", (1,), (0.6,), 8)):
            logits = compiled(images, schedule=schedule).logits
            torch.testing.assert_close(logits, model(images, schedule=schedule).logits, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == len(schedules)


@pytest.mark.slow
@pytest.mark.parametrize("family", ("vit",), indirect=True)
def test_compiled_model_follows_the_schedule_of_its_config(make_model, images):
    model = make_model(num_hidden_layers=3)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    single = {"prune_layers": [1], "keep_rates": [0.6], "num_similar_tokens": 8}
    with torch.no_grad():
        for schedule in (single, {**single, "keep_rates": [0.5]}, {"prune_layers": []}, single):
            model.set_schedule(**schedule)
            torch.testing.assert_close(compiled(images).logits, model(images).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ("deit",), indirect=True)
def test_compiles_once_for_batch_one_and_once_for_all_others(make_model, images):
    model = make_model(num_hidden_layers=3, prune_layers=[0, 1], keep_rates=[0.8, 0.7], num_similar_tokens=13)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (images[:1], images[:3], images, images[:2], images[:1]):
            torch.testing.assert_close(compiled(batch).logits, model(batch).logits, atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("family", ("deit",), indirect=True)
def test_training_step_compiles_as_one_graph(make_model, images):
    model = make_model(num_hidden_layers=3).train()
    model.freeze_backbone()
    torch.compiler.reset()
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(images, labels=torch.arange(4)).loss
    loss.backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in model.base_model.alpha_heads[:2])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "schedule"), (("vit", MULTI), ("deit", LAST_AND_FIRST)), indirect=["family"])
def test_exports_with_a_dynamic_batch(make_model, images, schedule):
    model = make_model(**schedule)
    program = torch.export.export(
        model, (), {"pixel_values": images}, dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", max=64)}}
    )
    for batch in (images[:1], images, torch.cat((images, images))):
        logits = program.module()(pixel_values=batch).logits
        torch.testing.assert_close(logits, model(batch).logits, atol=1e-5, rtol=1e-4)


def test_subclasses_are_those_of_transformers():
    assert issubclass(TntViTForImageClassification, ViTForImageClassification)
    assert issubclass(TntDeiTForImageClassification, DeiTForImageClassificationWithTeacher)
    assert issubclass(modeling_tnt.TntViTConfig, ViTConfig) and issubclass(TntDeiTConfig, DeiTConfig)
