"""ONNX files of small networks: what is in them, and that making them leaves everything else alone."""

import copy
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import onnx
import pytest
import timm
import torch
from ekgfx.export import check_parity, exporter, to_fp16, to_onnx
from timm.models.nest import Nest
from torch import nn

from ekgfx.errors import EkgfxWarning, ExportError
from tests.export.nets import Classifier, Contiguous, Detector, FixedBatch, LearnedBias, Mystery, Windows, mystery
from tests.tracing.test_containers import Named, Registered


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A network in a mixture of modes, its inputs, and its file, made from a batch of one."""
    torch.manual_seed(0)
    model = Classifier()
    model.drop.eval()
    before = copy.deepcopy(model)
    path = tmp_path_factory.mktemp("classifier") / "net.onnx"
    images = torch.randn(3, 3, 8, 8)
    to_onnx(model, images[:1], path, metadata={"plan": "0123abcd", "macs": 1234})
    return model, before, images, path


def test_batch_size_is_free(classifier):
    model, _, images, path = classifier
    parity = check_parity(model, path, images)
    assert parity.batches == (1, 3)
    assert parity.relative < 1e-5
    graph = onnx.load(path).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_model_is_left_as_it_was(classifier):
    model, before, _, _ = classifier
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    for (name, tensor), (_, old) in zip(model.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(tensor, old), name
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_names_are_those_of_the_model(classifier):
    graph = onnx.load(classifier[3]).graph
    assert [value.name for value in graph.input] == ["x"]
    assert [value.name for value in graph.output] == ["output"]
    # The batch norm is folded into the convolution, which still carries its own name.
    assert [node.name for node in graph.node] == ["stem/Conv", "Relu", "ReduceMean", "head/Gemm"]
    assert {"stem.weight", "head.weight", "head.bias"} <= {value.name for value in graph.initializer}


def test_metadata_is_in_the_file(classifier):
    recorded = {entry.key: entry.value for entry in onnx.load(classifier[3]).metadata_props}
    assert recorded["ekgfx.plan"] == "0123abcd"
    assert recorded["ekgfx.macs"] == "1234"
    assert recorded["ekgfx.precision"] == "fp32"
    assert recorded["ekgfx.model"].endswith("nets.Classifier")
    assert recorded["ekgfx.version.onnx"] == onnx.__version__


def test_file_holds_no_path_of_this_machine(classifier):
    content = classifier[3].read_bytes()
    assert b"/nets.py" not in content
    assert b"site-packages" not in content


def test_half_precision(classifier, tmp_path):
    model, _, images, _ = classifier
    path = to_onnx(model, images, tmp_path / "half.onnx", fp16=True)
    half = onnx.load(path)
    assert {value.data_type for value in half.graph.initializer if value.dims} <= {
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.INT64,
    }
    types = {value.type.tensor_type.elem_type for value in (*half.graph.input, *half.graph.output)}
    assert types == {onnx.TensorProto.FLOAT}
    parity = check_parity(model, path, images)
    assert parity.precision == "fp16"
    assert 1e-5 < parity.relative < parity.tolerance == 1e-2
    with pytest.raises(ExportError, match="differs"):
        check_parity(model, path, images, tolerance=1e-6)


def test_half_precision_from_a_file_is_that_from_the_model(classifier, tmp_path):
    model, _, images, single = classifier
    from_model = onnx.load(to_onnx(model, images, tmp_path / "model.onnx", fp16=True))
    from_file = onnx.load(to_fp16(single, tmp_path / "file.onnx"))
    assert from_file.graph.SerializeToString() == from_model.graph.SerializeToString()
    recorded = {entry.key: entry.value for entry in from_file.metadata_props}
    assert (recorded["ekgfx.precision"], recorded["ekgfx.plan"]) == ("fp16", "0123abcd")
    with pytest.raises(ExportError, match="is an fp16 file"):
        to_fp16(tmp_path / "file.onnx", tmp_path / "again.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises(ExportError, match=r"broken\.onnx cannot be read"):
        to_fp16(tmp_path / "broken.onnx", tmp_path / "again.onnx")
    with pytest.raises(ExportError, match="no ONNX file"):
        to_fp16(tmp_path / "none.onnx", tmp_path / "again.onnx")
    assert not (tmp_path / "again.onnx").exists()


def test_several_inputs_and_a_nested_output(tmp_path):
    model = Detector()
    inputs = (torch.randn(1, 4), torch.randn(1, 6))
    path = to_onnx(model, inputs, tmp_path / "net.onnx")
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["image", "points"]
    assert [value.name for value in graph.output] == ["boxes_0", "boxes_1", "scores", "image_out"]
    parity = check_parity(model, path, inputs)
    assert parity.batches == (1, 2)
    assert {difference.output for difference in parity.differences} == {"boxes_0", "boxes_1", "scores", "image"}


@pytest.mark.parametrize("net", [Windows, LearnedBias])
@pytest.mark.parametrize("opset", [None, 18, 23])
def test_attention_of_any_kind(net, opset, tmp_path):
    torch.manual_seed(0)
    model = net()
    with torch.no_grad():
        model.qkv.weight.mul_(5)  # near-uniform attention would hide errors
    inputs = torch.randn(3, 8, 8)
    path = to_onnx(model, inputs, tmp_path / "net.onnx", opset=opset)
    written = onnx.load(path)
    assert check_parity(model, path, inputs).relative < 1e-5
    assert opset is None or written.opset_import[0].version == opset
    assert ("Attention" in {node.op_type for node in written.graph.node}) == (net is LearnedBias and opset == 23)


def nest(**options) -> nn.Module:
    return Nest(img_size=64, embed_dims=(8, 16, 32), num_heads=(1, 2, 4), depths=(1, 1, 1), **options)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (partial(timm.create_model, "test_resnet", channels=(24, 40, 40, 64)), 64),
        (partial(timm.create_model, "test_vit", depth=2), 160),
        pytest.param(
            partial(timm.create_model, "test_vit_relpos", depth=2),
            160,
            marks=pytest.mark.skipif(not timm.is_model("test_vit_relpos"), reason="timm is older"),
        ),
        (partial(timm.create_model, "test_convnext"), 64),
        (nest, 64),
    ],
    ids=["resnet", "vit", "vit_relpos", "convnext", "nest"],
)
def test_timm(make, size, tmp_path):
    torch.manual_seed(0)
    model = make(num_classes=10)
    inputs = torch.randn(3, 3, size, size)
    path = to_onnx(model, inputs, tmp_path / "net.onnx")
    assert check_parity(model, path, inputs).relative < 1e-5


def test_weights_of_a_large_model_lie_beside_the_file(tmp_path, monkeypatch):
    moved, replace = [], os.replace

    def record(source, target) -> None:
        replace(source, target)
        if Path(target).parent == tmp_path:
            moved.append(Path(target).name)

    monkeypatch.setattr(exporter, "PROTOBUF_LIMIT", 100)
    monkeypatch.setattr(os, "replace", record)
    model, inputs = nn.Linear(64, 64), torch.randn(2, 64)
    path = to_onnx(model, inputs, tmp_path / "net.onnx")
    # The file that is opened comes last: it never points to weights that are not there.
    assert moved == ["net.onnx.data", "net.onnx"]
    assert {file.name for file in tmp_path.iterdir()} == set(moved)
    assert path.stat().st_size < 64 * 64 * 4
    assert check_parity(model, path, inputs).relative < 1e-5


def test_half_of_a_large_model_stands_alone(tmp_path, monkeypatch):
    """One whose fp16 file is small enough for its weights, of which some stay as they were."""
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "PROTOBUF_LIMIT", 100)
        torch.manual_seed(0)
        model, inputs = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(2, 64)
        with torch.no_grad():
            model[1].weight[0, 0] = 1e5  # too large for fp16
        single = to_onnx(model, inputs, tmp_path / "net.onnx")
    half = to_fp16(single, tmp_path / "half.onnx", inputs)
    for file in (single, tmp_path / "net.onnx.data"):
        file.unlink()
    assert [file.name for file in tmp_path.iterdir()] == ["half.onnx"]
    assert check_parity(model, half, inputs).precision == "fp16"


def test_failed_export_leaves_the_old_file(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise onnx.checker.ValidationError("node Conv is broken")

    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ExportError, match="not valid ONNX: node Conv is broken"):
        to_onnx(nn.Linear(2, 2), torch.randn(2, 2), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder(tmp_path):
    with pytest.raises(ExportError, match="cannot write .*No such file"):
        to_onnx(nn.Linear(2, 2), torch.randn(2, 2), tmp_path / "nowhere" / "net.onnx")


def test_unknown_operator_is_named_with_its_module(tmp_path):
    with pytest.raises(ExportError, match=r"ekgfx_tests\.mystery.* in body\.1 .*translations="):
        to_onnx(Mystery(), torch.randn(2, 4), tmp_path / "net.onnx")


def test_translation_of_an_unknown_operator(tmp_path):
    from onnxscript import opset18

    def identity(x):
        return opset18.Identity(x)

    model, inputs = Mystery(), torch.randn(2, 4)
    translations = {torch.ops.ekgfx_tests.mystery.default: identity}
    path = to_onnx(model, inputs, tmp_path / "net.onnx", translations=translations)
    assert check_parity(model, path, inputs).relative < 1e-5
    assert mystery is not None


class Bounded(nn.Module):
    """One value between several bounds that are tensors of the model, as in Gemma's clippable layers."""

    def __init__(self) -> None:
        super().__init__()
        bounds = {"low": -0.5, "high": 0.5, "lower": -0.2, "higher": 0.3, "least": -torch.inf, "most": torch.inf}
        for name, bound in bounds.items():
            self.register_buffer(name, torch.tensor(bound))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        return x.clamp(self.low, self.high) + x.clamp(self.lower, self.higher) * x.clamp(self.least, self.most)


@pytest.mark.parametrize("fp16", [False, True])
def test_bounds_that_are_tensors(fp16, tmp_path):
    """onnxscript makes a Clip of them whose bounds nobody has given to the graph."""
    torch.manual_seed(0)
    model, values = Bounded(), torch.randn(3, 4)
    path = to_onnx(model, values, tmp_path / "net.onnx", fp16=fp16)
    assert [node.op_type for node in onnx.load(path).graph.node].count("Clip") >= 2
    check_parity(model, path, values)


def test_fixed_batch_size_is_named(tmp_path):
    with pytest.raises(ExportError, match="FixedBatch fixes its batch size"):
        to_onnx(FixedBatch(), torch.randn(2, 4), tmp_path / "net.onnx")


def test_a_model_that_does_otherwise_with_large_batches_is_exported_for_small_ones(tmp_path):
    model, path = Contiguous(), tmp_path / "net.onnx"
    with pytest.warns(EkgfxWarning, match="Contiguous does otherwise from a batch of 64 on"):
        to_onnx(model, torch.randn(2, 4), path)
    assert check_parity(model, path, torch.randn(3, 4)).batches == (1, 3)


@pytest.mark.parametrize("least", [1e-8, 1e-15])
def test_a_small_number_in_a_sum_stays(least, tmp_path):
    """Without it, the optimizer that PyTorch runs over the file leaves it out: 0 / 0."""

    class Normalizing(nn.Module):
        def forward(self, x):
            return x / (x.abs().sum(1, keepdim=True) + least) + x / (least - -x.abs())

    model, path, x = Normalizing(), tmp_path / "net.onnx", torch.randn(3, 4)
    x[1] = 0
    to_onnx(model, x, path)
    assert check_parity(model, path, x).relative < 1e-6


def test_a_squeeze_of_what_is_longer_than_one_is_left_out(tmp_path):
    class Squeezing(nn.Module):
        """As diffusers' PixArt does to its tokens."""

        def forward(self, x):
            return (x[..., None] * 2).squeeze((1, 3)).squeeze(1) + 1

    model, path = Squeezing(), tmp_path / "net.onnx"
    to_onnx(model, torch.randn(2, 5, 4), path)
    assert check_parity(model, path, torch.randn(3, 5, 4)).batches == (1, 3)


def test_a_bound_on_the_batch_need_not_be_a_whole_number(tmp_path):
    class Clips(nn.Module):
        """Three frames each, as diffusers' UNet3DConditionModel has them: 64 frames are 21 clips and a third."""

        def forward(self, x):
            frames = x.flatten(0, 1)
            return frames * 2 if frames.shape[0] >= 64 else frames + 1

    model, path = Clips(), tmp_path / "net.onnx"
    with pytest.warns(EkgfxWarning, match="Clips does otherwise from a batch of 22 on"):
        to_onnx(model, torch.randn(2, 3, 4), path)
    assert check_parity(model, path, torch.randn(21, 3, 4)).batches == (1, 21)


def test_opset_out_of_reach(tmp_path):
    with pytest.raises(ExportError, match="opset 9 .*18"):
        to_onnx(nn.Linear(2, 2), torch.randn(2, 2), tmp_path / "net.onnx", opset=9)
    with pytest.raises(ExportError, match="opset 99 cannot be written"):
        to_onnx(nn.Linear(2, 2), torch.randn(2, 2), tmp_path / "net.onnx", opset=99)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((torch.randn(2, 2), 3), "input 1 is a int"),
        (
            (torch.randn(2, 4), torch.randn(3, 6)),
            r"dim 0 of the inputs has sizes \[2, 3\], of which 2 is taken for the batch",
        ),
        ((torch.tensor(1.0), torch.tensor(2.0)), "no input has a batch"),
        ((torch.randn(2, 4), torch.randn(2, 6), torch.randn(2, 6)), "takes 2 positional inputs .* but 3"),
        (torch.randn(0, 4), "dim 0 of the inputs has the size 0"),
    ],
)
def test_inputs_that_make_no_batch(inputs, message, tmp_path):
    with pytest.raises(ExportError, match=message):
        to_onnx(Detector(), inputs, tmp_path / "net.onnx")


def test_model_without_tensors_in_its_output(tmp_path):
    class Silent(nn.Module):
        def forward(self, x):
            return 3

    with pytest.raises(ExportError, match="returns no tensor"):
        to_onnx(Silent(), torch.randn(2, 2), tmp_path / "net.onnx")


def test_nothing_is_printed(tmp_path):
    """In a process of its own, with every warning on: the exporters' commentary stays inside."""
    code = (
        "import torch; from torch import nn; from ekgfx.export import check_parity, providers, to_onnx\n"
        "model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8)\n"
        f"check_parity(model, to_onnx(model, x, {str(tmp_path / 'net.onnx')!r}, fp16=True, opset=20), x); providers()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_output_class_that_pytorch_does_not_know_by_names(tmp_path):
    """As those of diffusers, which are registered without names for their parts, and those that are not at all."""

    class Wrapped(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.body, self.output = nn.Linear(5, 3), output

        def forward(self, x):
            return self.output(sample=self.body(x), twice=[2 * x])

    for output in (Registered, Named):
        path = to_onnx(Wrapped(output).eval(), torch.randn(2, 5), tmp_path / "net.onnx")
        assert [value.name for value in onnx.load(path).graph.output] == ["sample", "twice_0"]
