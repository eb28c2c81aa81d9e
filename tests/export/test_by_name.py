"""Inputs by the names of a forward's parameters, as transformers' models are called."""

from pathlib import Path

import onnx
import pytest
import torch
from ekgfx.export import check_parity, to_onnx
from torch import Tensor, nn

from ekgfx.errors import ExportError


class Named(nn.Module):
    """Of three inputs the second can be left out, and the last is given by name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor, bias: Tensor | None = None, *, weights: Tensor) -> dict[str, Tensor]:
        x = self.table(tokens) if bias is None else self.table(tokens) + bias
        return {"logits": self.out((x * weights[..., None]).sum(1)), "sum": weights.sum(1)}


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"weights": torch.rand(3, 5), "tokens": torch.randint(11, (3, 5))}


def test_inputs_by_name(inputs: dict[str, Tensor], tmp_path: Path) -> None:
    model, path = Named().eval(), tmp_path / "net.onnx"
    to_onnx(model, inputs, path)
    graph = onnx.load(path).graph
    assert [slot.name for slot in graph.input] == ["weights", "tokens"]
    assert [slot.name for slot in graph.output] == ["logits", "sum"]
    other = {"tokens": torch.randint(11, (4, 5)), "weights": torch.rand(4, 5)}  # in another order
    found = check_parity(model, path, other)
    assert found.batches == (1, 4) and found.relative < 1e-5


def test_names_that_the_file_does_not_have(inputs: dict[str, Tensor], tmp_path: Path) -> None:
    model, path = Named().eval(), tmp_path / "net.onnx"
    to_onnx(model, inputs, path)
    with pytest.raises(ExportError, match="the file takes the inputs tokens, weights, but tokens, bias, weights were"):
        check_parity(
            model, path, {"tokens": inputs["tokens"], "bias": torch.zeros(3, 1, 8), "weights": inputs["weights"]}
        )
    with pytest.raises(ExportError, match="input bias is a NoneType; ONNX takes tensors only"):
        to_onnx(model, {**inputs, "bias": None}, path)  # type: ignore[dict-item]
