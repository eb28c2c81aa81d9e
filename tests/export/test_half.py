"""fp16 files of small networks, each of which breaks a conversion in one way; and what may stay in fp32."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from ekgfx.export import amplification, check_parity, to_fp16, to_onnx
from ekgfx.export.half import narrowed, to_half
from torch import Tensor, nn
from torch.nn import functional as F

from ekgfx.errors import ExportError

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


class Shared(nn.Module):
    """Two operators that stay in fp32 read one fp16 value, and two resizes share their scales."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + torch.cumsum(x, 2) / 8 + torch.cumsum(x, 3) / 8
        up = F.interpolate(x, scale_factor=2.0), F.interpolate(x.relu(), scale_factor=2.0)
        return F.instance_norm(up[0] + up[1]).square().mean((2, 3)) + x.mean((2, 3))


class Large(nn.Module):
    """The middle is a thousand times too large for fp16, what comes out is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grow, self.shrink = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 5)
        with torch.no_grad():
            self.first.weight.mul_(1e2)
            self.grow.weight.mul_(1e5)
            self.shrink.weight.mul_(1e-7)

    def forward(self, x: Tensor) -> Tensor:
        large = self.grow(self.first(x)).relu()
        # A step that moves values only is not fused away, so that the runtime really stores them.
        return self.shrink(large.reshape(-1, 4, 4).transpose(1, 2).flatten(1))


class Unscaled(nn.Module):
    """Self-attention over pixels whose query is scaled by a number: onnxruntime's fusion reads that number as fp32."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.stem = heads, nn.Conv2d(3, width, 3, padding=1)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        batch, count, width = tokens.shape
        q, k, v = self.qkv(tokens).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q * 0.35 @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, count, width))


def types(graph: onnx.GraphProto) -> dict[str, set[int]]:
    """Operator → element types of what it writes."""
    inferred = onnx.shape_inference.infer_shapes(onnx.helper.make_model(graph), strict_mode=True).graph
    known = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
    found: dict[str, set[int]] = {}
    for node in graph.node:
        found.setdefault(node.op_type, set()).update(known[name] for name in node.output)
    return found


@pytest.mark.parametrize(
    ("make", "shape"), [(Shared, (2, 3, 8, 8)), (Unscaled, (2, 3, 4, 4))], ids=["shared", "unscaled"]
)
def test_file_computes_the_same(make, shape, tmp_path):
    torch.manual_seed(0)
    model, inputs = make(), torch.randn(shape)
    path = to_onnx(model, inputs, tmp_path / "net.onnx", fp16=True)
    assert check_parity(model, path, inputs).relative < 2e-3


def test_a_value_is_cast_once_for_all_its_readers(tmp_path):
    torch.manual_seed(0)
    graph = onnx.load(to_onnx(Shared(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx", fp16=True)).graph
    found = types(graph)
    assert found["CumSum"] == {FLOAT}
    assert found["Conv"] == found["Resize"] == {HALF}
    casts = [(node.input[0], node.attribute[0].i) for node in graph.node if node.op_type == "Cast"]
    assert len(casts) == len(set(casts))
    stem = next(node.output[0] for node in graph.node if node.op_type == "Conv")
    assert (stem, FLOAT) in casts
    weights = {value.name: value.data_type for value in graph.initializer}
    assert weights["stem.weight"] == HALF
    assert not any(name.endswith("_fp16") for name in weights)


def test_what_overflows_stays_in_fp32(tmp_path):
    torch.manual_seed(0)
    model, inputs = Large(), torch.randn(4, 8)
    single = to_onnx(model, inputs, tmp_path / "single.onnx")
    half = to_fp16(single, tmp_path / "half.onnx", inputs)
    assert check_parity(model, half, inputs).relative < 2e-3
    written = onnx.load(half)
    recorded = {entry.key: entry.value for entry in written.metadata_props}
    assert recorded["ekgfx.fp32_nodes"] == "grow/Gemm, Relu, Reshape, Transpose, Reshape_2, shrink/Gemm"
    weights = {value.name: value.data_type for value in written.graph.initializer}
    assert (weights["first.weight"], weights["grow.weight"], weights["shrink.weight"]) == (HALF, FLOAT, FLOAT)
    # Between operators in fp32 nothing is rounded to fp16 and back.
    assert [node.op_type for node in written.graph.node].count("Cast") == 2
    assert onnx.load(to_onnx(model, inputs, tmp_path / "direct.onnx", fp16=True)).graph == written.graph


def test_overflow_without_inputs_is_explained(tmp_path):
    torch.manual_seed(0)
    model, inputs = Large(), torch.randn(4, 8)
    half = to_fp16(to_onnx(model, inputs, tmp_path / "single.onnx"), tmp_path / "half.onnx")
    assert "ekgfx.fp32_nodes" not in {entry.key for entry in onnx.load(half).metadata_props}
    with pytest.raises(ExportError, match=r"overflow fp16: .* from inputs like these"):
        check_parity(model, half, inputs)


class Steep(nn.Module):
    """A weight too large for fp16 times values so small that the product fits."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.steep, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        with torch.no_grad():
            self.narrow.weight.mul_(1e-4)
            self.narrow.bias.mul_(1e-4)
            self.steep.weight[3, 5] = -2e5

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steep(self.narrow(x)) / 10)


@pytest.mark.parametrize("measured", [True, False], ids=["with inputs", "without"])
def test_a_weight_that_does_not_fit_stays_in_fp32(measured, tmp_path):
    torch.manual_seed(0)
    model, inputs = Steep(), torch.randn(4, 8)
    single = to_onnx(model, inputs, tmp_path / "single.onnx")
    half = to_fp16(single, tmp_path / "half.onnx", inputs if measured else None)
    written = onnx.load(half)
    recorded = {entry.key: entry.value for entry in written.metadata_props}
    assert recorded["ekgfx.fp32_nodes"] == "steep/Gemm"
    weights = {value.name: value.data_type for value in written.graph.initializer}
    assert (weights["narrow.weight"], weights["steep.weight"], weights["head.weight"]) == (HALF, FLOAT, HALF)
    # Clipped to 65504 the weight would take its row's output to a third of what it is.
    assert check_parity(model, half, inputs).relative < 2e-3


def test_infinite_masks_are_no_overflow(tmp_path):
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(x < 0, float("-inf")).softmax(-1)

    inputs = torch.randn(4, 8)
    path = to_onnx(Masked(), inputs, tmp_path / "net.onnx", fp16=True)
    assert "ekgfx.fp32_nodes" not in {entry.key for entry in onnx.load(path).metadata_props}
    assert check_parity(Masked(), path, inputs).relative < 2e-3


def test_inner_graphs_stay_in_fp32():
    model = ir.from_onnx_text(
        """
        <ir_version: 10, opset_import: ["" : 18]>
        net (float[2, 3] x, bool flag) => (float[2, 3] y, float[2, 3] z) {
            a = Mul (x, x)
            y = If (flag) <
                then_branch = yes () => (float[2, 3] p) { p = Add (a, x) },
                else_branch = no () => (float[2, 3] q) { q = Sub (a, x) }
            >
            z = Relu (a)
        }
        """
    )
    proto = ir.to_proto(to_half(model))
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.array([[1, 2, 3], [-4, 5, 6]], np.float32)
    for flag, sign in ((True, 1), (False, -1)):
        y, z = session.run(None, {"x": x, "flag": np.array(flag)})
        assert (y.dtype, z.dtype) == (np.float32, np.float32)
        assert np.array_equal(y, x * x + sign * x)
        assert np.array_equal(z, x * x)


def test_weights_out_of_range():
    values = np.array([0.0, -0.0, 1.0, 1e6, -1e6, np.inf, -np.inf, 1e-12, -1e-12, np.nan], np.float32)
    half = narrowed(values)
    assert half.dtype == np.float16
    tiny = np.float16(6e-8)
    expected = [0, 0, 1, 65504, -65504, np.inf, -np.inf, tiny, -tiny, np.nan]
    assert np.array_equal(half, np.array(expected, np.float16), equal_nan=True)


class Chaotic(nn.Module):
    """The logistic map, forty times: every step doubles an error."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.sigmoid()
        for _ in range(40):
            x = 3.99 * x * (1 - x)
        return x


def test_rounded_weights_amplify_what_rounded_pixels_do_not():
    """Errors of pixels average out in a pool, those of weights do not: fp16 files of such gates were called wrong."""
    torch.manual_seed(0)

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plus, self.minus = torch.full((64,), 200.0), torch.full((64,), 200.0)

        def forward(self, x: Tensor) -> Tensor:
            pooled = (x + 2).mean((2, 3))
            return pooled * ((pooled * self.plus - pooled * self.minus).mean(1, keepdim=True)).sigmoid()

    class Trained(Fixed):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.plus, self.minus = nn.Parameter(torch.full((64,), 200.0)), nn.Parameter(torch.full((64,), 200.0))

    inputs = torch.randn(2, 64, 16, 16) / 10
    assert amplification(Fixed(), inputs, 2**-11) < 2**-11
    assert amplification(Trained(), inputs, 2**-11) > 10 * 2**-11


def test_a_model_is_left_as_it_was_whose_module_is_used_in_several_places():
    torch.manual_seed(0)
    once = nn.Linear(8, 8)
    model = nn.Sequential(once, nn.ReLU(), nn.Sequential(once, nn.Linear(8, 4)))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moves = amplification(model, torch.randn(3, 8), 2**-11)
    assert 2**-13 < moves < 2**-8
    assert len(list(model.parameters())) == 4
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_amplified_rounding_is_told_from_an_error(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(4, 8)
    assert amplification(nn.Linear(8, 8), inputs, 2**-11) < 2**-9
    assert amplification(Chaotic(), inputs, 2**-24) > 0.1
    path = to_onnx(Chaotic(), inputs, tmp_path / "net.onnx", fp16=True)
    with pytest.raises(ExportError, match=r"amplifies rounding: weights and inputs that move by 5e-04"):
        check_parity(Chaotic(), path, inputs)
