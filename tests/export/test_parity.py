"""Does the parity check see what it should? Every kind of damage is done to a real file."""

import math

import onnx
import pytest
import torch
from ekgfx.export import check_parity, to_onnx
from onnx import numpy_helper
from torch import nn

from ekgfx.errors import ExportError
from tests.export.nets import Classifier


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = Classifier()
    path = to_onnx(model, torch.randn(2, 3, 8, 8), tmp_path_factory.mktemp("parity") / "net.onnx")
    return model, path


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def change(path, weight: str, edit, to):
    """A copy of the file with one weight edited."""
    model = onnx.load(path)
    (tensor,) = [value for value in model.graph.initializer if value.name == weight]
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), tensor.name))
    onnx.save(model, to)
    return to


def test_figures_are_those_of_the_definition(exported, images, tmp_path):
    """A bias shifted by 0.25 shifts one output by exactly that."""
    model, path = exported

    def shift(values):
        values[3] += 0.25
        return values

    changed = change(path, "head.bias", shift, tmp_path / "net.onnx")
    parity = check_parity(model, changed, images, tolerance=10)
    with torch.no_grad():
        scales = {3: model.eval()(images).abs().max().item(), 1: model(images[:1]).abs().max().item()}
    for difference in parity.differences:
        assert difference.absolute == pytest.approx(0.25, rel=1e-5)
        assert difference.relative == pytest.approx(0.25 / scales[difference.batch], rel=1e-5)
    assert parity.relative == max(difference.relative for difference in parity.differences)
    assert parity.to_json()["absolute"] == pytest.approx(0.25, rel=1e-5)


def test_one_changed_weight_is_caught(exported, images, tmp_path):
    model, path = exported

    def flip(values):
        values.flat[abs(values).argmax()] *= -1
        return values

    changed = change(path, "head.weight", flip, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match=r"output 'output' at batch \d by .* more than 1e-04"):
        check_parity(model, changed, images)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_values_that_are_not_finite_are_caught(exported, images, tmp_path, poison):
    model, path = exported
    changed = change(path, "head.bias", lambda values: values + poison, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="by inf relative"):
        check_parity(model, changed, images)


def test_equal_infinities_are_no_difference(tmp_path):
    class Masked(nn.Module):
        def forward(self, x):
            return x.masked_fill(x < 0, -math.inf)

    inputs = torch.tensor([[1.0, -1.0], [2.0, -3.0]])
    path = to_onnx(Masked(), inputs, tmp_path / "net.onnx")
    assert check_parity(Masked(), path, inputs).absolute == 0


def test_fixed_batch_size_is_caught(exported, images, tmp_path):
    model, path = exported
    fixed = onnx.load(path)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(fixed, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="cannot run at batch 1"):
        check_parity(model, tmp_path / "net.onnx", images)


def test_batch_size_built_into_the_graph_is_caught(tmp_path):
    """The shapes agree, the values do not: a file that scales by its example's batch size."""

    class Scaled(nn.Module):
        def __init__(self, by_batch: bool) -> None:
            super().__init__()
            self.by_batch = by_batch

        def forward(self, x):
            return x * (x.shape[0] if self.by_batch else 2.0)

    inputs = torch.randn(2, 4)
    path = to_onnx(Scaled(False), inputs, tmp_path / "net.onnx")
    with pytest.raises(ExportError, match="at batch 1"):
        check_parity(Scaled(True), path, inputs)


def test_file_of_another_model_is_caught(exported, images):
    path = exported[1]
    wider = Classifier()
    wider.head = nn.Linear(8, 7)
    with pytest.raises(ExportError, match=r"shape \[3, 5\].* \[3, 7\]"):
        check_parity(wider, path, images)


def test_truncated_and_missing_files_are_refused(exported, images, tmp_path):
    model, path = exported
    short = tmp_path / "short.onnx"
    short.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExportError, match="short.onnx cannot run on cpu"):
        check_parity(model, short, images)
    with pytest.raises(ExportError, match="no ONNX file at"):
        check_parity(model, tmp_path / "none.onnx", images)


def test_model_keeps_its_mode(exported, images):
    model, path = exported
    model.train()
    check_parity(model, path, images)
    assert model.training
    assert model.drop.training


def test_a_model_that_gives_no_numbers_is_told_of_and_not_its_file(images, tmp_path):
    """As one whose weight was never set: memory may hold anything."""
    model = Classifier()
    path = to_onnx(model, images, tmp_path / "net.onnx")
    with torch.no_grad():
        model.head.weight[0] = 3e38
    with pytest.raises(ExportError, match=r"the model itself gives NaN .* largest weight is head.weight \(3.0e\+38\)"):
        check_parity(model, path, torch.cat([images, images * torch.inf]))
