"""Random programs, random plans: every cut is exact.

pytest -m sweep tests/graph/test_programs.py        # 500 different networks; EKGFX_FUZZ_SEED chooses which
"""

import os
import random
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from torch import Tensor, nn

import ekgfx
from ekgfx.axes import axes
from ekgfx.surgery.check import check_pruned, perturb, relative_error
from ekgfx.surgery.masked import check_masked
from tests.support.programs import Program, Spec, example, specs
from tests.support.zeroed import zeroed

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


def through_the_module(spec: Spec) -> str | None:
    """Cut a program at random in float32, and run the pruned module itself: in training mode, at another batch size and
    at another size of the input. Returns its structure, or None where nothing of it could be compared.

    What it must compute is what the program's own Python does with zeroed weights. Where a value depends on which
    positions take part (a norm over channels), that is another network: it is compared with its sliced graph, at the
    example's size.
    """
    torch.manual_seed(0)
    model = Program(*spec).eval()
    perturb(model)
    traced = ekgfx.trace(model, example(spec[0], 2, torch.float32))
    rng = random.Random(0)
    sizes = {name: group.size for name, group in traced.groups.items()}
    plan = ekgfx.Plan({n: tuple(sorted(rng.sample(range(s), rng.randint(1, s)))) for n, s in sizes.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruned = ekgfx.prune(model, plan, traced)
    inputs = example(spec[0], 3, torch.float32)
    alike = computes_alike(traced, plan)
    twin = zeroed(traced, plan)
    if not alike:
        assert check_pruned(traced, plan, pruned, (inputs,)) < 1e-2
    compared = not alike
    of_kept = takes_statistics_of_cut(traced, plan)
    for training in (False, True):
        for x in (inputs, wider(inputs)):
            wanted = outcome(twin.train(training), x)
            found = outcome(pruned.train(training), x)
            if wanted is None:
                continue  # the program's own Python cannot do that either
            assert found is not None, "the pruned module fails where the program's own Python does not"
            assert [t.shape for t in found] == [t.shape for t in wanted]
            if alike and not (training and of_kept) and all(t.isfinite().all() and t.abs().max() < 1e6 for t in wanted):
                assert relative_error(found, wanted) < 1e-2
                compared = True
    return " ".join(f"{o.target}{o.node.args}" for o in traced.operations) if compared else None


def computes_alike(traced: ekgfx.TracedModel, plan: ekgfx.Plan) -> bool:
    """Whether zeroed weights are as good as none, to rounding."""
    args, _ = traced.example
    with torch.no_grad():
        return relative_error(traced.subnetwork(plan)(*args), zeroed(traced, plan)(*args)) < 1e-4


def takes_statistics_of_cut(traced: ekgfx.TracedModel, plan: ekgfx.Plan) -> bool:
    """Whether a batch norm takes its statistics in training over a dimension that is cut: over what is kept."""
    kept = traced.groups.kept(plan)
    return any(
        axis in kept
        for operation in traced.operations
        if "batch_norm" in str(operation.target)
        for d, dim in enumerate(operation.call["input"])
        for axis in axes(dim)
        if d != 1
    )


def wider(x: Tensor) -> Tensor:
    """Inputs of twice the last size; tokens and words of twice as many."""
    return torch.cat([x, x], 1 if x.ndim in (2, 3) and x.shape[1] == 4 else -1)


def outcome(network: nn.Module, x: Tensor) -> list[Tensor] | None:
    """What it returns, always with the same random numbers; None where it raises. Its buffers stay."""
    state = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            return list(network(x))
    except (RuntimeError, ValueError):
        return None
    finally:
        network.load_state_dict(state)


SEEN: set[str] = set()


def fuzz(networks: int, examples: int, number: int, check: Callable[[Spec], str | None] = check) -> None:
    """Checks that many networks that were not checked before. `number` seeds the draw."""
    before = len(SEEN)

    @seed(number)
    @settings(max_examples=examples, **CALM)
    @given(specs())
    def run(spec: Spec) -> None:
        if len(SEEN) < before + networks:
            structure = check(spec)
            SEEN.update([f"{check.__name__} {structure}"] if structure else [])

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


def test_pruned_random_programs_train_and_take_other_sizes() -> None:
    fuzz(10, 40, 7, through_the_module)


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(5))
def test_200_pruned_random_programs_train_and_take_other_sizes(part: int) -> None:
    fuzz(40, 160, 1000 * int(os.environ.get("EKGFX_FUZZ_SEED", "1")) + 7 + part, through_the_module)
