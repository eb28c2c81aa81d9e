"""Random programs, random plans: every cut is exact.

pytest -m sweep tests/test_programs.py        # 500 different networks; EKGFX_FUZZ_SEED chooses which
"""

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

import ekgfx
from ekgfx.verify import check_masked, check_pruned, perturb

from .programs import Program, Spec, example, specs

CALM = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


def check(spec: Spec) -> str | None:
    """Cut a program at random, exactly; returns its structure, or None where its outputs are no numbers."""
    torch.manual_seed(0)
    model = Program(*spec).double().eval()
    perturb(model)
    traced = ekgfx.trace(model, example(spec[0], 2))
    assert not traced.unknown_ops
    inputs = (example(spec[0], 3),)
    torch.testing.assert_close(traced.subnetwork()(*inputs), model(*inputs), rtol=1e-9, atol=1e-9, equal_nan=True)
    for number in range(3):
        rng = random.Random(number)
        sizes = {name: group.size for name, group in traced.groups.items()}
        plan = ekgfx.Plan({n: tuple(sorted(rng.sample(range(s), rng.randint(1, s)))) for n, s in sizes.items()})
        assert check_masked(traced, plan, inputs) < 1e-9
    pruned = ekgfx.prune(model, plan, traced)
    assert check_pruned(traced, plan, pruned, inputs) < 1e-9
    if not all(output.isfinite().all() for output in model(*inputs)):
        return None
    return " ".join(f"{o.target}{o.node.args}" for o in traced.operations)


SEEN: set[str] = set()


def fuzz(networks: int, examples: int, number: int) -> None:
    """Checks that many networks that were not checked before. `number` seeds the draw."""
    before = len(SEEN)

    @seed(number)
    @settings(max_examples=examples, **CALM)
    @given(specs())
    def run(spec: Spec) -> None:
        if len(SEEN) < before + networks:
            structure = check(spec)
            SEEN.update([structure] if structure else [])

    run()
    assert len(SEEN) == before + networks, f"only {len(SEEN) - before} different networks in {examples} examples"


def test_cuts_of_random_programs_are_exact() -> None:
    fuzz(50, 80, number=0)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(5))
def test_cuts_of_500_random_programs_are_exact(part: int) -> None:
    """In five parts, so that a failure in one leaves the others; a network counts once over all."""
    fuzz(100, 160, number=1000 * int(os.environ.get("EKGFX_FUZZ_SEED", "1")) + part)
