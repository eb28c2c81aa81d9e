"""What an activation does not pass on is not asked of the operator before it."""

import math
import sys

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.repair.clamped import Clamp, asked, find_clamp
from ekgfx.repair.rearranged import weight_nodes
from ekgfx.repair.walk import Walk, by_depth

RELU, RELU6 = Clamp((), None, 0.0, math.inf), Clamp((), None, 0.0, 6.0)


@pytest.mark.parametrize(
    ("clamp", "wanted", "found", "lacks"),
    [
        (RELU, 3.0, 1.0, 2.0),
        (RELU, 3.0, -1.0, 4.0),
        (RELU, -1.0, -5.0, 0.0),
        (RELU, -5.0, -1.0, 0.0),
        (RELU, -5.0, 2.0, -2.0),
        (RELU6, 8.0, 7.0, 0.0),
        (RELU6, 8.0, 4.0, 2.0),
        (RELU6, 5.0, 7.0, -2.0),
    ],
)
@pytest.mark.parametrize(("gain", "rest"), [(1.0, 0.0), (2.0, 0.5), (-0.5, 1.0)])
def test_what_is_beyond_the_bound_in_both_networks_is_not_lacking(
    clamp: Clamp, wanted: float, found: float, lacks: float, gain: float, rest: float
) -> None:
    """wanted, found: what the activation gets, gain · output + rest."""
    t, y = ((torch.tensor([[[value]]], dtype=torch.float64) - rest) / gain for value in (wanted, found))
    r, shown = asked(clamp, t - y, t, torch.full_like(t, gain), torch.full_like(t, rest))
    assert r.item() == pytest.approx(lacks / gain) and shown.item() is bool(lacks)


def test_outputs_that_nothing_is_passed_on_of_are_asked_for_all() -> None:
    t, r = torch.tensor([[[-1.0, -1.0]]]), torch.tensor([[[3.0, 3.0]]])
    lacks, shown = asked(RELU, r, t, torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1, 2))
    assert lacks.tolist() == [[[0.0, 3.0]]] and shown.tolist() == [[[False, True]]]


class Clip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clip(max=4)


class Block(nn.Module):
    def __init__(self, act: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.stem, self.conv, self.act, self.twice = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), act, twice
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.conv(x)) + x
        return self.act(y) + y if self.twice else self.act(y)


@pytest.mark.parametrize(
    ("block", "bounds"),
    [
        (Block(nn.ReLU()), (0.0, math.inf)),
        (Block(nn.ReLU6()), (0.0, 6.0)),
        (Block(nn.Hardtanh(-2, 3)), (-2.0, 3.0)),
        (Block(nn.Hardswish()), (-3.0, math.inf)),
        (Block(nn.Threshold(0.5, -1.0)), (0.5, math.inf)),
        (Block(Clip()), (-math.inf, 4.0)),
        (Block(nn.SiLU()), None),
        (Block(nn.GELU()), None),
        (Block(nn.ReLU(), twice=True), None),
    ],
)
def test_an_activation_is_found_behind_a_norm_and_a_sum(block: nn.Module, bounds: tuple[float, float] | None) -> None:
    traced = ekgfx.trace(block.eval(), torch.randn(2, 3, 4, 4))
    constant = set(weight_nodes(SubNetwork(traced, {}).graph))
    order = {node: i for i, node in enumerate(by_depth(traced, constant))}
    stem, conv = (o.node for o in traced.operations if "conv" in str(o.target))
    found = find_clamp(traced, conv, constant, order)
    assert (None if found is None else (found.low, found.high)) == bounds
    assert found is None or (found.other is stem and len(found.chain) == 1)
    assert find_clamp(traced, stem, constant, order) is None  # two read it


class Behind(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)
        self.act = act
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(2))
            self.second.weight.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.first(x)))


@pytest.mark.parametrize(
    ("act", "slope", "share"), [(nn.Identity(), 5.0, 1 / 17), (nn.ReLU(), 4.0, 0.0)], ids=["nothing", "ReLU"]
)
def test_a_slope_by_hand(act: nn.Module, slope: float, share: float) -> None:
    """The second input is 3x where the first, x, is positive, else 5x; so the output is 4x, else 6x. Without the second
    input, least squares give 5x, which lacks 1 on either side (and x lacks 3 and 5: (9 + 25) / 2 = 17). Where ReLU
    follows, 5x lacks −1 on the positive side and nothing on the other. Half of the positions are shown, so twice the
    half unit that the whole Gram matrix gives is taken back: 4x, which lacks nothing where ReLU shows it."""
    side = torch.arange(1, 6, dtype=torch.float64)
    x = torch.stack([-side, side], 1).flatten() / 7
    fit, held = torch.cat([x, 1.05 * x]), torch.tensor([-0.31, 0.31, -0.43, 0.43], dtype=torch.float64)
    ordered = torch.cat([torch.cat([fit[4 * i : 4 * i + 4], held[i : i + 1]]) for i in range(4)] + [fit[16:]])
    inputs = torch.stack([ordered, torch.where(ordered > 0, 3 * ordered, 5 * ordered)], 1)
    model = Behind(act).double().eval()
    traced = ekgfx.trace(model, inputs[:2])
    (group,) = traced.groups
    plan = ekgfx.Plan({group: (0,)})
    pruned = ekgfx.prune(model, plan, traced)
    *_, second = ekgfx.repair(pruned, traced, plan, inputs).layers
    assert pruned.second.weight.item() == pytest.approx(slope, abs=1e-6)
    assert second.after / second.before == pytest.approx(share, abs=1e-6)


def test_rows_that_there_is_no_memory_for_are_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(nn.ReLU()), nn.Conv2d(8, 4, 1)).double().eval()
    images = torch.randn(40, 3, 6, 6, dtype=torch.float64)
    traced = ekgfx.trace(model, images[:2])
    plan = ekgfx.Plan({next(iter(traced.groups)): (0, 2, 3, 5, 7)})
    weights, looks = [], []
    computed = Walk._computed
    monkeypatch.setattr(Walk, "_computed", lambda *args: looks.append(args[3]) or computed(*args))
    for room in (10**6, 20_000, 0):
        monkeypatch.setattr(sys.modules[Walk.__module__], "KEPT", room)
        pruned = ekgfx.prune(model, plan, traced)
        assert ekgfx.repair(pruned, traced, plan, images, batch_size=8).kept
        weights.append(pruned[0].conv.weight.clone())
        looks.append(None)
    assert all(torch.equal(weights[0], other) for other in weights)
    ends = [i for i, look in enumerate(looks) if look is None]
    counts = [end - start for start, end in zip([-1, *ends], ends, strict=False)]
    assert counts[0] < counts[1] < counts[2]
