import onnx
import pytest
import torch
from conftest import naming

from tnt_hf import export
from tnt_hf.export import compare_sessions, export_onnx, open_session, quantize_int8, run_session


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "image_size", "token_reduction", "schedule"),
    (
        ("deit", (32, 32), "drop", ((1,), (0.6,), 8)),
        ("vit", (24, 40), "cluster", ((0, 1), (0.9, 0.55))),
        ("deit", (24, 40), "merge", ((0, 1), (0.9, 0.55), 11)),
    ),
    ids=("dropped", "clustered", "merged"),
    indirect=["family"],
)
def test_onnx_runtime_gives_the_logits_at_every_batch_size(
    make_model, image_size, schedule, token_reduction, tmp_path
):
    model = make_model(image_size=image_size, num_hidden_layers=3, token_reduction=token_reduction)
    model.set_schedule(*schedule)
    assert export_onnx(model, tmp_path / "model.onnx") <= 1e-4
    assert model.config._attn_implementation == "sdpa"
    session = open_session(tmp_path / "model.onnx")
    for batch_size in (1, 3, 8):
        images = torch.randn(batch_size, 3, *image_size, generator=torch.Generator().manual_seed(batch_size))
        with torch.no_grad():
            torch.testing.assert_close(run_session(session, images), model(images).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("family", "token_reduction"), (("vit", "drop"), ("deit", "merge"), ("vit", "cluster")), indirect=["family"]
)
def test_older_exporter_leaves_the_batch_size_open(make_model, images, token_reduction, tmp_path):
    model = make_model(num_hidden_layers=4, token_reduction=token_reduction)
    model.set_schedule((0, 2), (0.7, 0.6), 5)
    torch.onnx.export(
        LogitsOnly(model).eval(),
        (images,),
        tmp_path / "model.onnx",
        dynamo=False,
        opset_version=17,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_axes={"pixel_values": {0: "batch"}, "logits": {0: "batch"}},
    )
    session = open_session(tmp_path / "model.onnx")
    for batch in (images[:1], torch.cat((images, images[:3].flip(-1)))):
        torch.testing.assert_close(run_session(session, batch), model(batch).logits, atol=1e-4, rtol=1e-4)


class LogitsOnly(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


@pytest.mark.slow
@pytest.mark.parametrize("family", ("vit",), indirect=True)
def test_int8_copy_keeps_nearly_all_classes_and_the_scoring_heads(make_model, images, tmp_path):
    model = make_model(prune_layers=[1], keep_rates=[0.6], num_similar_tokens=8, num_hidden_layers=3)
    export_onnx(model, tmp_path / "model.onnx")
    quantize_int8(tmp_path / "model.onnx", tmp_path / "model_int8.onnx")
    graph = onnx.load(tmp_path / "model_int8.onnx").graph
    float_weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer if tensor.data_type == 1}
    multiplied = [float_weights.get(node.input[1]) for node in graph.node if node.op_type == "MatMul"]
    assert [shape for shape in multiplied if shape is not None] == [(32, 1)]
    assert (tmp_path / "model_int8.onnx").stat().st_size < (tmp_path / "model.onnx").stat().st_size
    sessions = [open_session(tmp_path / name) for name in ("model.onnx", "model_int8.onnx")]
    batches = [{"pixel_values": images, "labels": model(images).logits.argmax(-1)}] * 2
    compared = compare_sessions(*sessions, batches)
    assert compared["top1"] == 100 and compared["num_images"] == 8
    assert compared["agreement"] == compared["top1_int8"] >= 75


@pytest.mark.slow
@pytest.mark.parametrize("family", ("vit",), indirect=True)
def test_file_that_differs_is_not_kept(make_model, tmp_path):
    with pytest.raises(ValueError, match=naming("ONNX Runtime", "PyTorch", "model.onnx")):
        export_onnx(make_model(num_hidden_layers=1), tmp_path / "model.onnx", tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported_are_refused(make_model, tmp_path, monkeypatch):
    model = make_model(prune_layers=[2], keep_rates=[0.6], num_similar_tokens=4, similarity_partition="random")
    with pytest.raises(ValueError, match=naming("`similarity_partition`", "'strided'", "'random'")):
        export_onnx(model, tmp_path / "model.onnx")
    model = make_model(prune_layers=[2], keep_rates=[0.6], selection="random")
    with pytest.raises(ValueError, match=naming("`selection`", "'relevance'", "'random'")):
        export_onnx(model, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=naming("float32", torch.bfloat16)):
        export_onnx(make_model().bfloat16(), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=naming(tmp_path / "missing", "model.onnx")):
        export_onnx(make_model(), tmp_path / "missing" / "model.onnx")
    monkeypatch.setattr(export, "MAX_BYTES", 4000)
    with pytest.raises(ValueError, match=r"1,000 parameters .* \d\d,\d{3}"):
        export_onnx(make_model(), tmp_path / "model.onnx")
