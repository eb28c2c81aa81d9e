"""A weight of several uses: after each refit the network is gone on from the first use, and not from the start."""

import copy
import sys

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.repair.marks import Marks
from ekgfx.repair.walk import Walk


class Shared(nn.Module):
    """Two blocks that take turns, one before the other, and a head for each of their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*(nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8)))
        self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, found = self.stem(x), 0.0
        for _ in range(3):
            x = x + self.one(x.relu())
            x = x + self.two(x.relu()).relu()
            found = found + self.head(x.relu()).mean((2, 3))
        return found


def test_what_is_kept_changes_nothing_and_saves_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, images = Shared().double().eval(), torch.randn(30, 3, 6, 6, dtype=torch.float64)
    traced = ekgfx.trace(model, images[:2])
    plan = ekgfx.search(traced, flops=0.6, strategy="uniform", importance="magnitude").plan
    cut, advance, found = ekgfx.prune(model, plan, traced), Walk.advance, {}
    for room in (0, sys.modules[Marks.__module__].MOST):
        nodes: list[int] = []

        def counted(walk, frontier, end, nodes=nodes):
            nodes.append(max(end - frontier.done, 0))
            advance(walk, frontier, end)

        monkeypatch.setattr(Walk, "advance", counted)
        monkeypatch.setattr(sys.modules[Marks.__module__], "MOST", room)
        pruned = copy.deepcopy(cut)
        told = ekgfx.repair(pruned, traced, plan, images, batch_size=7)
        assert sum(layer.done == "refit" for layer in told.layers) >= 9
        found[room] = pruned.state_dict(), sum(nodes)
    (without, more), (within, fewer) = found.values()
    assert all(torch.equal(within[name], without[name]) for name in without)
    assert fewer < 0.8 * more
