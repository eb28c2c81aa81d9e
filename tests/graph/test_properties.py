"""Random networks, random plans: every cut is exact."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import ekgfx
from ekgfx.surgery.check import check_pruned, perturb
from ekgfx.surgery.masked import check_masked
from tests.support.networks import RandomNet, specs
from tests.support.plans import random_plan

RELAXED = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True, "database": None}


def check(spec: tuple) -> None:
    torch.manual_seed(0)
    model = RandomNet(*spec).double().eval()
    perturb(model)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    traced = ekgfx.trace(model, x)
    assert not traced.unknown_ops
    plan = random_plan(traced, 1)
    assert check_masked(traced, plan, (x,)) < 1e-9
    pruned = ekgfx.prune(model, plan, traced)
    assert check_pruned(traced, plan, pruned, (torch.randn(3, 3, 4, 4, dtype=torch.float64),)) < 1e-9


@settings(max_examples=30, **RELAXED)
@given(specs())
def test_cuts_of_random_networks_are_exact(spec: tuple) -> None:
    check(spec)


@pytest.mark.sweep
@settings(max_examples=500, **RELAXED)
@given(specs())
def test_cuts_of_500_random_networks_are_exact(spec: tuple) -> None:
    check(spec)
