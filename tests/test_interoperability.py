"""What people do to the plain model with other tools works on a TNT model too."""

import pytest
import torch
from accelerate import disk_offload
from accelerate.utils import convert_outputs_to_fp32, send_to_device
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil, pipeline
from transformers.quantizers.base import HfQuantizer

from tnt_hf import TntViTForImageClassification
from tnt_hf.conversion import to_plain_model
from tnt_hf.modeling_tnt import ScoringHead


SINGLE = {"prune_layers": [2], "keep_rates": [0.6], "num_similar_tokens": 8}
SEVERAL = {"prune_layers": [0, 1, 3], "keep_rates": [0.8, 0.7, 0.5], "token_reduction": "merge"}
SCHEDULES = pytest.mark.parametrize("schedule", (SINGLE, SEVERAL), ids=("drop", "merge"))
IMAGE_PROCESSOR = ViTImageProcessorPil(size={"height": 32, "width": 32})


def pictures(num_images):
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (num_images, 40, 48, 3), dtype=torch.uint8, generator=generator)
    return [Image.fromarray(each.numpy()) for each in pixels]


@SCHEDULES
def test_hooks_on_the_heads_of_pruned_layers_run(make_model, images, schedule):
    model = make_model(**schedule)
    called = []
    for index, head in enumerate(model.base_model.alpha_heads):
        head.register_forward_hook(lambda module, args, output, index=index: called.append(index))
    model(images)
    assert called == schedule["prune_layers"]


@SCHEDULES
def test_offloaded_weights_give_the_same_logits(make_model, images, schedule, tmp_path):
    model = make_model(**schedule)
    with torch.no_grad():
        expected = model(images).logits
        disk_offload(model, tmp_path, execution_device="cpu")
        assert next(model.base_model.alpha_heads.parameters()).device.type == "meta"
        assert torch.equal(model(images).logits, expected)


def test_dynamic_quantisation_of_all_linear_layers_runs(make_model, images):
    quantised = torch.ao.quantization.quantize_dynamic(make_model(**SINGLE), {nn.Linear}, dtype=torch.qint8)
    assert type(quantised.base_model.layers[0].mlp.fc1) is not nn.Linear
    assert torch.isfinite(quantised(images).logits).all()


def test_quantisers_of_transformers_leave_out_the_heads(make_model):
    model = make_model()
    left_out = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    assert "alpha_heads" in left_out


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_head_may_be_replaced(make_model, images, dtype):
    model = make_model(**SINGLE).to(dtype)
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    kept = []
    for head in (ScoringHead(32, 1, bias=False), nn.Linear(32, 1, bias=False)):
        head.to(dtype).weight.data.copy_(weight)
        model.base_model.alpha_heads[2] = head
        kept.append(model(images).kept_indices[0])
    agreement = (kept[0][:, :, None] == kept[1][:, None]).any(-1).float().mean()
    assert agreement == 1 if dtype == torch.float32 else agreement > 0.9


def test_lora_on_all_linear_layers_reaches_every_head_that_is_noised(make_model, images):
    model = get_peft_model(make_model(noise_std=0.5), LoraConfig(target_modules="all-linear")).train()
    model(pixel_values=images, labels=torch.arange(4)).loss.backward()
    unreached = [name for name, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert unreached and all("alpha_heads.5." in name or "distillation_classifier" in name for name in unreached)


def test_lora_adapters_that_are_merged_give_the_same_logits(make_model, images):
    model = get_peft_model(make_model(**SINGLE), LoraConfig(target_modules=["q_proj", r"alpha_heads.2"])).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        before = model(pixel_values=images)
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
        adapted = model(pixel_values=images)
        merged = model.merge_and_unload()(images)
    assert not torch.equal(adapted.kept_mask, before.kept_mask)
    assert torch.equal(adapted.kept_mask, merged.kept_mask)
    torch.testing.assert_close(adapted.logits, merged.logits, atol=1e-4, rtol=1e-4)


@SCHEDULES
def test_outputs_are_rebuilt_whole_by_accelerate(make_model, images, schedule):
    outputs = make_model(**schedule)(images)
    expected = outputs.kept_indices
    for rebuilt in (
        send_to_device(outputs, "cpu"),
        type(outputs)(**dict(outputs.items())),
        convert_outputs_to_fp32(make_model(**schedule).forward)(images),  # as in its mixed precision
    ):
        assert len(rebuilt.kept_indices) == len(schedule["prune_layers"])
        assert [kept.shape for kept in rebuilt.kept_indices] == [kept.shape for kept in expected]
    assert all(torch.equal(*pair) for pair in zip(send_to_device(outputs, "cpu").kept_indices, expected))
    as_tuple = make_model(**schedule)(images, return_dict=False)
    assert any(torch.equal(value, outputs.kept_mask) for value in as_tuple)


@SCHEDULES
def test_pipeline_answers_batches_as_it_answers_images(make_model, schedule):
    classify = pipeline(
        "image-classification", model=make_model(**schedule), image_processor=IMAGE_PROCESSOR, device="cpu"
    )
    one_by_one, in_batches = (classify(pictures(5), batch_size=size, top_k=7) for size in (1, 2))
    for alone, together in zip(one_by_one, in_batches):
        assert [answer["label"] for answer in alone] == [answer["label"] for answer in together]
        assert [answer["score"] for answer in alone] == pytest.approx([answer["score"] for answer in together])


def test_model_left_in_training_mode_is_pruned_and_answers_without_noise(make_model, images):
    model = make_model(noise_std=1.0, **SINGLE)
    expected = model(images, labels=torch.arange(4))
    model.train()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            outputs = model(images, labels=torch.arange(4))
        assert torch.equal(outputs.logits, expected.logits) and torch.equal(outputs.loss, expected.loss)
        assert torch.equal(outputs.kept_mask, expected.kept_mask)
    classify = pipeline("image-classification", model=model, image_processor=IMAGE_PROCESSOR, device="cpu")
    assert classify(pictures(1)) == classify(pictures(1))
    assert model(images).kept_mask is None and not torch.equal(model(images).logits, model(images).logits)


@SCHEDULES
def test_forward_pass_on_the_meta_device(make_model, images, schedule):
    outputs = make_model(**schedule).to("meta")(images.to("meta"), labels=torch.arange(4))
    assert (
        outputs.loss.shape == ()
        and outputs.logits.shape == (4, 7)
        and outputs.kept_mask.shape == (4, len(schedule["prune_layers"]), 64)
    )


@SCHEDULES
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traces(make_model, images, schedule):
    model = make_model(**schedule)
    with torch.no_grad():
        traced = torch.jit.trace(model, images, strict=False)
        for batch in (images, images[:1], torch.cat((images, images.flip(0)))):
            outputs = traced(batch)
            torch.testing.assert_close(outputs["logits"], model(batch).logits)
            assert torch.equal(outputs["kept_mask"], model(batch).kept_mask)


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, attention_mask=None):
        return self.layer(hidden_states, attention_mask)


@pytest.mark.parametrize("token_reduction", ["drop", "merge"])
def test_layers_may_be_wrapped_by_modules_that_take_what_plain_layers_take(make_model, images, token_reduction):
    model = make_model(**SINGLE, token_reduction=token_reduction)
    expected, layers = model(images).logits, model.base_model.layers
    for index in range(0, len(layers), 2):
        layers[index] = Wrapped(layers[index])
    torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-5)
    for index in range(1, len(layers), 2):
        layers[index] = Wrapped(layers[index])
    torch.testing.assert_close(model(images).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("order", ([5, 4, 3, 2, 1, 0], [0, 1, 2, 3]), ids=("reversed", "shortened"))
def test_layers_may_be_put_in_another_order(make_model, images, order):
    model = make_model()
    plain = to_plain_model(model)
    for each in (model.base_model, plain.base_model):
        each.layers = nn.ModuleList([each.layers[index] for index in order])
    torch.testing.assert_close(model(images).logits, plain(images).logits, atol=1e-5, rtol=1e-5)


class Doubled(TntViTForImageClassification):
    def forward(self, pixel_values=None, **kwargs):
        outputs = super().forward(pixel_values, **kwargs)
        outputs.logits = 2 * outputs.logits
        return outputs


def test_subclass_loads_public_checkpoints_and_claims_no_code_of_the_package(images, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    plain = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=4)).eval()
    plain.save_pretrained(tmp_path / "plain")  # under the names of the Hub
    model = Doubled.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(model(images).logits, 2 * plain(images).logits)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(Doubled.from_pretrained(tmp_path / "saved").eval()(images).logits, model(images).logits)
    assert not any("modeling_tnt" in path for path in model.config.auto_map.values())
