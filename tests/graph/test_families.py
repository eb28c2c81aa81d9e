"""Every family's groups are those derived by hand, and every cut is exact: masked = sliced = pruned."""

import random
from collections import Counter

import pytest
import torch
from torch import nn

import ekgfx
from ekgfx.surgery.check import check_pruned, perturb
from ekgfx.surgery.masked import check_masked
from tests.support.costs import counted_macs, said_macs
from tests.support.families import attention, channels, convolutions, mixing, whole  # noqa: F401  (importing registers them)
from tests.support.families.base import FAMILIES, Family, expected


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.build.__name__)
def test_groups_are_those_derived_by_hand_and_cuts_are_exact(family: Family) -> None:
    torch.manual_seed(0)
    model = family.build().double().eval()
    perturb(model)
    traced = ekgfx.trace(model, family.example(2))
    assert traced.unknown_ops == {}
    groups = traced.groups.values()
    found = Counter((g.size, frozenset(f"{p.parameter}:{p.dim}" for p in g.places)) for g in groups)
    assert found == expected(model, family.groups)

    inputs = family.example(3, seed=1)
    for seed in range(4):
        rng = random.Random(seed)
        kept = {g.name: tuple(sorted(rng.sample(range(g.size), rng.randint(1, g.size - 1)))) for g in groups}
        plan = ekgfx.Plan(kept)
        assert check_masked(traced, plan, inputs) <= family.tolerance
    pruned = ekgfx.prune(model, plan, traced)
    kept = dict(pruned.named_modules())
    replaced = {name for name, module in model.named_modules() if type(kept.get(name)) is not type(module)}
    assert all(name == family.by_graph or name.startswith(f"{family.by_graph}.") for name in replaced)
    assert check_pruned(traced, plan, pruned, inputs) <= family.tolerance
    assert traced.uncounted_ops == {}
    assert said_macs(traced, ekgfx.Plan(), 3) == counted_macs(model, inputs)
    assert said_macs(traced, plan, 3) == counted_macs(pruned, inputs)
    trains(pruned, inputs)


def test_norms_without_parameters_know_their_width() -> None:
    (family,) = (f for f in FAMILIES if f.build.__name__ == "norms_without_parameters")
    model = family.build().double().eval()
    pruned = ekgfx.prune(model, ekgfx.Plan({"stem": (0, 3, 4)}), example_inputs=family.example(2))
    assert (pruned.body[0].num_features, pruned.body[1].num_channels) == (3, 3)


def trains(pruned: nn.Module, inputs: tuple) -> None:
    """One step of gradient descent reaches every parameter."""
    output = pruned.train()(*inputs)
    sum(t.square().mean() for t in (output if isinstance(output, list | tuple) else [output])).backward()
    assert all(p.grad is not None for p in pruned.parameters())
    torch.optim.SGD(pruned.parameters(), 1e-3).step()
