"""Recurrent layers: hidden units are groups, derived by hand and cut exactly."""

import random

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.surgery.check import check_pruned, perturb
from ekgfx.surgery.masked import check_masked


class Sequence(nn.Module):
    """Embed each step, run over the sequence, read every step out."""

    def __init__(self, kind: type[nn.RNNBase], layers: int, bidirectional: bool, batch_first: bool, **options: int):
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.rnn = kind(10, 8, layers, batch_first=batch_first, bidirectional=bidirectional, **options)
        self.read = nn.Linear(options.get("proj_size", 8) * (2 if bidirectional else 1), 5)
        self.swap = not batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x, _ = self.rnn(x.transpose(0, 1) if self.swap else x)
        return self.read(x.transpose(0, 1) if self.swap else x)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True)])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_hidden_units_are_one_group(
    kind: type[nn.RNNBase], layers: int, bidirectional: bool, batch_first: bool
) -> None:
    model = Sequence(kind, layers, bidirectional, batch_first).double().eval()
    perturb(model)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    assert {name: group.size for name, group in traced.groups.items()} == {"embed": 10, "rnn.weight_ih_l0": 8}
    suffixes = [f"l{n}{way}" for n in range(layers) for way in (("", "_reverse") if bidirectional else ("",))]
    expected = {f"rnn.{kind_}_{s}:0" for s in suffixes for kind_ in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    expected |= {f"rnn.weight_hh_{s}:1" for s in suffixes} | {"read.weight:1"}
    expected |= {f"rnn.weight_ih_{s}:1" for s in suffixes if s.startswith("l1")}
    assert {f"{p.parameter}:{p.dim}" for p in traced.groups["rnn.weight_ih_l0"].places} == expected
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind.__name__]
    below = [10] + [16] * (layers - 1)
    ways = 2 if bidirectional else 1
    cells = sum(7 * gates * 8 * (width + 8) * ways for width in below)
    assert traced.cost().macs == 7 * 6 * 10 + cells + 7 * 8 * ways * 5

    rng = random.Random(0)
    plan = ekgfx.Plan({name: tuple(sorted(rng.sample(range(g.size), 3))) for name, g in traced.groups.items()})
    assert check_masked(traced, plan, (x,)) < 1e-12
    pruned = ekgfx.prune(model, plan, traced)
    assert type(pruned.rnn) is kind and pruned.rnn.hidden_size == 3 and pruned.rnn.input_size == 3
    assert check_pruned(traced, plan, pruned, (torch.randn(3, 7, 6, dtype=torch.float64),)) < 1e-12


@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (2, True)])
def test_projected_units_are_a_group_of_their_own(layers: int, bidirectional: bool) -> None:
    model = Sequence(nn.LSTM, layers, bidirectional, True, proj_size=4).double().eval()
    perturb(model)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    assert sorted(group.size for group in traced.groups.values()) == [4, 8, 10]
    ways = 2 if bidirectional else 1
    cells = sum(7 * (4 * 8 * (width + 4) + 4 * 8) * ways for width in [10] + [4 * ways] * (layers - 1))
    assert traced.cost().macs == 7 * 6 * 10 + cells + 7 * 4 * ways * 5
    plan = ekgfx.Plan({group.name: range(1, group.size, 2) for group in traced.groups.values()})
    assert check_masked(traced, plan, (x,)) < 1e-12
    pruned = ekgfx.prune(model, plan, traced)
    assert (pruned.rnn.input_size, pruned.rnn.hidden_size, pruned.rnn.proj_size) == (5, 4, 2)
    assert check_pruned(traced, plan, pruned, (torch.randn(3, 7, 6, dtype=torch.float64),)) < 1e-12
