"""Every comparison of a cut module with its prediction is needed: each test here fails where one is left out."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import PruneError

PLAN = ekgfx.Plan({"stem": (0, 2, 3)})


class Net(nn.Module):
    """4 → 6 → 2; `form` is what happens in between."""

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        self.form, self.stem, self.head = form, nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.form == "rows":
            return self.head(x) + x.reshape(-1, 6).sum()
        if self.form == "constant":
            x = x * torch.tensor(float(x.shape[-1]), dtype=x.dtype)
        return self.head(x)


def traced(form: str = "plain") -> ekgfx.TracedModel:
    torch.manual_seed(0)
    return ekgfx.trace(Net(form).double(), torch.randn(2, 4, dtype=torch.float64))


def test_costs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prediction is wrong by one multiplication, and by nothing else."""
    found = traced()
    right = found.cost

    def wrong(*arguments: Any) -> Any:
        cost = right(*arguments)
        return replace(cost, macs=cost.macs + 1)

    monkeypatch.setattr(found, "cost", wrong)
    with pytest.raises(PruneError, match=r"it costs .*macs=18, .*predicted were .*macs=19"):
        ekgfx.prune(found.model, PLAN, found)


def test_shapes_are_compared() -> None:
    """Two rows of 3 are one row of 6 with the same sum: cost and output say nothing."""
    found = traced("rows")
    assert found.groups["stem"].size == 6
    with pytest.raises(
        PruneError, match=r"cannot express the cut.*reshape in the model: predicted shape \(2, 3\), found \(1, 6\)"
    ):
        ekgfx.prune(found.model, PLAN, found, graphs="forbid")


def test_outputs_are_compared() -> None:
    """The width comes in as a tensor of the model's own: operators, shapes and cost are those predicted."""
    found = traced("constant")
    with pytest.raises(PruneError, match=r"its output in evaluation mode differs from the sliced graph's by \d"):
        ekgfx.prune(found.model, PLAN, found, graphs="forbid")
