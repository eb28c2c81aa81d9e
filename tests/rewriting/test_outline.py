"""Outlines of runs: they reject wrong integers sooner than a trace, and never right ones."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.graph.ways import Way
from ekgfx.surgery import comparison, uncut
from ekgfx.surgery.assignments import nearest_first
from ekgfx.surgery.outline import otherwise, outline_of
from tests.support.zeroed import distance, zeroed


class Block(nn.Module):
    """Knows all of its widths from a configuration that others share."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.up, self.down = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.up(x).reshape(len(x), 2, self.config.hidden // 2)
        return x + self.down(parts.relu().reshape(-1, self.config.hidden)).view(len(x), self.config.width)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(width=12, hidden=16, classes=2, heads=2, layers=2, context=16)
        self.stem, self.head = nn.Linear(5, 12), nn.Linear(12, 3)
        self.blocks = nn.Sequential(Block(self.config), Block(self.config))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


@pytest.mark.parametrize("alike", [True, False])
def test_few_choices_of_integers_are_traced(monkeypatch: pytest.MonkeyPatch, alike: bool) -> None:
    """A configuration can say the cut where both blocks are cut alike, and cannot where they are not."""
    torch.manual_seed(0)
    model = Net().double().eval()
    x = torch.randn(2, 5, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    plan = ekgfx.Plan({"stem": range(9), "blocks.0.up#1": (1, 2, 6), "blocks.1.up#1": (1, 2, 6) if alike else (0, 7)})
    count = [0]
    own = comparison.retrace

    def counted(*args: object, **kwargs: object) -> ekgfx.TracedModel:
        count[0] += 1
        return own(*args, **kwargs)

    monkeypatch.setattr(comparison, "retrace", counted)
    pruned = ekgfx.prune(model, plan, traced, graphs="allow")
    assert count[0] <= 3, f"{count[0]} traces"
    assert bool(ekgfx.replaced(pruned)) is not alike
    assert distance(pruned, zeroed(traced, plan), (torch.randn(4, 5, dtype=torch.float64),)) < 1e-12


class Stubborn(nn.Module):
    """It has its width as an attribute, and writes it out besides: no integer makes it right."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 16
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).reshape(-1, 2, self.hidden // 2).relu().reshape(-1, 16))


def test_what_helped_no_block_is_not_tried_for_its_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that went wrong says the same of every choice that differs in what had not begun by then."""

    def runs(blocks: int) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(Stubborn() for _ in range(blocks))).double().eval()
        traced = ekgfx.trace(model, torch.randn(2, 12, dtype=torch.float64))
        plan = ekgfx.Plan({name: range(group.size // 2) for name, group in traced.groups.items()})
        count = [0]
        own = uncut.failing

        def counted(*args: object) -> object:
            count[0] += 1
            return own(*args)

        with monkeypatch.context() as patch:
            patch.setattr(uncut, "failing", counted)
            pruned = ekgfx.prune(model, plan, traced)
        assert len(ekgfx.replaced(pruned)) == blocks
        assert distance(pruned, zeroed(traced, plan), (torch.randn(4, 12, dtype=torch.float64),)) < 1e-12
        return count[0]

    assert 0 < runs(6) <= runs(2) + 1


def test_the_modules_that_differ_are_named() -> None:
    torch.manual_seed(0)
    example = ((torch.randn(2, 5),), {})
    one, other = Net().eval(), Net().eval()
    steps = outline_of(one, Way(), example)
    assert steps and otherwise(steps, outline_of(other, Way(), example) or []) == {}
    assert {step.module for step in steps} == {"stem", "head", "blocks.0", "blocks.0.up", "blocks.0.down"} | {
        "blocks.1",
        "blocks.1.up",
        "blocks.1.down",
    }
    other.blocks[1].up, other.blocks[1].down = nn.Linear(12, 20), nn.Linear(20, 12)
    other.blocks[1].config = SimpleNamespace(width=12, hidden=20)
    assert otherwise(outline_of(other, Way(), example) or [], steps).keys() == {"blocks.1", "blocks.1.up"}
    one.config.hidden = 7
    assert outline_of(one, Way(), example) is None, "it raises"
    assert not one._forward_hooks and not one.stem._forward_pre_hooks


class Knowing(nn.Module):
    """Knows many numbers, two of them widths, which are equal before the cut and differ after it."""

    def __init__(self) -> None:
        super().__init__()
        self.buckets = self.context = self.experts = self.limit = self.period = self.size = self.span = 16
        self.inner, self.width = 16, 16
        self.stem, self.up = nn.Linear(5, 16), nn.Linear(16, 16)
        self.down, self.head = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).reshape(-1, self.width)
        return self.head(x + self.down(self.up(x).relu().view(-1, self.inner)).relu())


def test_two_of_many_equal_numbers_are_found() -> None:
    torch.manual_seed(0)
    model = Knowing().double().eval()
    traced = ekgfx.trace(model, torch.randn(2, 5, dtype=torch.float64))
    plan = ekgfx.Plan({"stem": range(10), "up": range(1, 16, 2)})
    pruned = ekgfx.prune(model, plan, traced)
    assert not ekgfx.replaced(pruned)
    assert (pruned.width, pruned.inner) == (10, 8)
    assert {pruned.buckets, pruned.context, pruned.experts, pruned.limit, pruned.period, pruned.size, pruned.span} == {
        16
    }
    assert distance(pruned, zeroed(traced, plan), (torch.randn(4, 5, dtype=torch.float64),)) < 1e-12


def test_choices_come_nearest_first() -> None:
    assert list(nearest_first([2, 3])) == [(0, 0), (0, 1), (1, 0), (0, 2), (1, 1), (1, 2)]
    assert list(nearest_first([])) == [()]
