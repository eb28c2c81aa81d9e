"""Forwards that check values on their way, and decide nothing else by them: they are traced, and go on checking."""

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import TraceError
from tests.support.zeroed import distance, zeroed


class Checked(nn.Module):
    """Padded sequences with their lengths; `decides` takes another way by values."""

    def __init__(self, decides: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.decides = nn.Linear(4, 8), nn.Linear(8, 2), decides

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        assert lengths.max().item() <= x.shape[1]
        assert lengths.min() > 0, f"an empty sequence: {lengths}"
        if x.isnan().any() or (lengths > 9).any():
            raise ValueError("not a number, or too long")
        if not (lengths == lengths.long()).all():
            raise TypeError("lengths are whole")
        if self.decides and x.sum() > 0:
            x = -x
        inside = torch.arange(x.shape[1]) < lengths[:, None]
        return self.down((self.up(x).relu() * inside[..., None]).sum(1))


def padded(batch: int, length: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, 4, dtype=torch.float64), torch.arange(batch) % length + 1


def test_what_only_raises_is_no_decision() -> None:
    torch.manual_seed(0)
    traced = ekgfx.trace(Checked().double(), padded(2))
    assert {group.name: group.size for group in traced.groups.values()} == {"up": 8}
    assert not [node for node in traced.graph.nodes if "item" in str(node.target)]
    plan = ekgfx.Plan({"up": (0, 3, 4)})
    pruned = ekgfx.prune(traced.model, plan, traced, graphs="forbid")
    assert distance(pruned, zeroed(traced, plan), padded(3, 7)) < 1e-12
    x, lengths = padded(2)
    for wrong, error in ((lengths + 5, AssertionError), (lengths - 1, AssertionError)):
        with pytest.raises(error):
            pruned(x, wrong)
    with pytest.raises(ValueError, match="not a number"):
        pruned(x * torch.nan, lengths)


def test_an_example_that_does_not_pass_a_check_is_refused() -> None:
    x, lengths = padded(2)
    with pytest.raises(TraceError, match=r"does not run on the example inputs: .*`assert lengths.max\(\).item\(\)"):
        ekgfx.trace(Checked().double(), (x, lengths + 9))


class Falling(nn.Module):
    """What it raises it catches itself, and goes another way."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        try:
            if x.sum() > 0:
                raise ValueError("positive")
        except ValueError:
            x = -x
        return self.lin(x)


def test_an_error_that_is_caught_decides() -> None:
    with pytest.raises(TraceError, match=r"`if x.sum\(\) > 0:`: what Python does there depends on"):
        ekgfx.trace(Falling(), torch.randn(2, 4))


def test_a_decision_by_values_has_no_graph_still() -> None:
    with pytest.raises(TraceError, match=r"`if self.decides and x.sum\(\) > 0:`: what Python does there depends on"):
        ekgfx.trace(Checked(decides=True).double(), padded(2))
