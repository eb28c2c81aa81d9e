"""Cut a model for real: the same class with smaller tensors, checked against what the graph predicts."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.attributes import Choice, correct
from ekgfx.errors import EkgfxError, PruneError
from ekgfx.plan import Plan
from ekgfx.sliced import slice_weights
from ekgfx.trace import TracedModel, trace
from ekgfx.verify import check_pruned, compare_shapes

MOST_TRIALS = 16
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}


def prune(
    model: nn.Module,
    plan: Plan,
    traced: TracedModel | None = None,
    example_inputs: Any = None,
    *,
    verify: bool = True,
) -> nn.Module:
    """The model that `plan` leaves: a new module of the same class; `model` itself is not changed.

    Args:
        model: the module to cut; its current weights are taken.
        plan: kept channels per group.
        traced: the traced model (of this module, or of another one built the same way).
        example_inputs: where no traced model is at hand, inputs to trace with.
        verify: trace the result again, compare the shape of every operator with the prediction, and its output with the
            sliced graph's.

    Raises:
        PlanError: the plan does not fit the model.
        PruneError: the result is not what was predicted.
    """
    if traced is None:
        if example_inputs is None:
            raise PruneError(
                "prune needs the traced model or example inputs to trace with: pass traced= or example_inputs="
            )
        traced = trace(model, example_inputs)
    source = traced if traced.model is model else traced.rebound(model)
    kept = source.groups.kept(plan)
    pruned = _cut(model, slice_weights(source, kept, rescale=plan.rescale), source)
    choices = correct(pruned, source, {axis: len(index) for axis, index in kept.items()})
    if verify:
        _settle(pruned, choices, source, plan)
    return pruned


def _cut(model: nn.Module, weights: Mapping[str, Tensor], source: TracedModel) -> nn.Module:
    """A deep copy in which the cut tensors stand in place of the originals; nothing is copied in full first."""
    memo: dict[int, Any] = {}
    for name, cut in weights.items():
        full = source.tensor(name)
        if cut is not full:
            new = cut.detach().clone(memory_format=torch.preserve_format)
            memo[id(full)] = nn.Parameter(new, full.requires_grad) if isinstance(full, nn.Parameter) else new
    return copy.deepcopy(model, memo)


def _settle(pruned: nn.Module, choices: list[Choice], source: TracedModel, plan: Plan) -> None:
    """Find the values of the open choices with which the pruned module is what was predicted."""
    problems = []
    for trial in itertools.islice(_assignments(pruned, choices), MOST_TRIALS):
        for choice, value in trial.items():
            choice.take(pruned, value)
        try:
            problems.append(_problem(pruned, source, plan))
        except EkgfxError as error:
            problems.append(str(error))
        if not problems[-1]:
            return
    raise PruneError(f"the pruned {type(pruned).__name__} is not what was predicted: {problems[0]}")


def _assignments(pruned: nn.Module, choices: list[Choice]) -> Any:
    """Every way to settle the choices; modules of one class share theirs. The ways closest to 'all changed' come first."""
    kinds: dict[tuple, list[Choice]] = {}
    for choice in choices:
        kinds.setdefault((type(pruned.get_submodule(choice.module)), choice.attribute, choice.position), []).append(
            choice
        )
    ranks = [range(max(len(c.values) for c in members)) for members in kinds.values()]
    for ways in sorted(itertools.product(*ranks), key=sum) if len(ranks) < 8 else [(0,) * len(ranks)]:
        yield {
            c: c.values[min(way, len(c.values) - 1)]
            for way, members in zip(ways, kinds.values(), strict=True)
            for c in members
        }


def _problem(pruned: nn.Module, source: TracedModel, plan: Plan) -> str:
    args, kwargs = source.example
    again = trace(pruned, args, kwargs)
    difference = compare_shapes(source, plan, again)
    if difference is not None:
        return str(difference)
    error = check_pruned(source, plan, pruned, args, kwargs)
    dtype = next((p.dtype for p in pruned.parameters()), torch.float32)
    if not error <= TOLERANCE.get(dtype, 0.05):
        return f"its output differs from the sliced graph's by {error:.1e} (relative)"
    return ""
