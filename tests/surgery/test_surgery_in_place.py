"""Cutting a model itself: what a cut copy computes, while no weights exist twice."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import ekgfx
from ekgfx.rewriting.patched import forward_of
from ekgfx.surgery.check import perturb, relative_error
from tests.rewriting.test_replaced import Shares
from tests.support.models import HAND_DERIVED, example
from tests.support.plans import random_plan


@pytest.mark.parametrize("cls", HAND_DERIVED, ids=lambda cls: cls.__name__)
def test_a_model_cut_in_place_is_what_a_cut_copy_is(cls: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = cls().double().eval()
    perturb(model)
    traced = ekgfx.trace(model, example(cls))
    plan, parameters = random_plan(traced, 1), dict(model.named_parameters())
    expected = ekgfx.prune(model, plan, traced)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    assert ekgfx.prune(model, plan, traced, inplace=True) is model
    assert all(new is parameters[name] for name, new in model.named_parameters())  # as an optimizer holds them
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
    assert {n: t.tolist() for n, t in model.state_dict().items()} == {
        n: t.tolist() for n, t in expected.state_dict().items()
    }
    inputs = example(cls, batch=3)
    assert relative_error(model(*inputs), expected(*inputs)) == 0


def test_modules_that_cannot_express_the_cut_get_a_forward_in_place() -> None:
    torch.manual_seed(0)
    model = Shares().double().eval()
    perturb(model)
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    stream = next(group for group in traced.groups.values() if group.size == 8)
    plan = ekgfx.Plan({stream.name: (0, 2, 3, 5, 6)})
    expected = ekgfx.prune(copy.deepcopy(model), plan, traced)(x)
    assert ekgfx.prune(model, plan, traced, inplace=True) is model
    assert all(forward_of(block) for block in model.blocks)
    assert relative_error(model(x), expected) < 1e-12


PEAK = """
import sys, torch, ekgfx
from torch import nn

def megabytes(of):
    return int(next(line for line in open("/proc/self/status") if line.startswith(of)).split()[1]) / 1000

model = nn.Sequential(*(nn.Linear(2000, 2000) for _ in range(8)))  # of 16 MB each
traced = ekgfx.trace(model, torch.randn(2, 2000))
plan = ekgfx.Plan({name: tuple(range(1800)) for name in traced.groups})
ekgfx.prune(nn.Sequential(*(nn.Linear(2, 2) for _ in range(8))), ekgfx.Plan({}), None, torch.randn(2, 2))  # warm
before = megabytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
ekgfx.prune(model, plan, traced, inplace=sys.argv[1] == "inplace")
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_no_more_than_one_parameter_exists_twice() -> None:
    """81% of eight times 16 MB are kept: in a copy 104 MB more; in place the largest parameter, cut along one dimension
    and then along the other: 27 MB at most."""

    def peak(where: str) -> float:
        exact = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed goes back at once
        script = [sys.executable, "-c", PEAK, where]
        return float(subprocess.run(script, capture_output=True, text=True, check=True, env=exact).stdout)

    assert peak("inplace") < 35 and 100 < peak("copy") < 140
