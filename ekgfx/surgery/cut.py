"""Cut a model for real: the same class with smaller tensors, checked against what the graph predicts."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ekgfx.axes import Axis
from ekgfx.base.units import several
from ekgfx.errors import EkgfxWarning, PruneError
from ekgfx.execution.subnetwork import slice_tensor, slice_weights, slices
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.graph.plan import Plan, as_plan, remember, rounds_of
from ekgfx.graph.unseen import keep_apart
from ekgfx.graph.untouched import deep_copy
from ekgfx.rewriting.calls import hollow
from ekgfx.rewriting.patched import replaced
from ekgfx.surgery.calibrate import estimated
from ekgfx.surgery.carried import carry, like
from ekgfx.surgery.comparison import Prediction, repeatable
from ekgfx.surgery.configured import configuration_of, configure, numbers_of
from ekgfx.surgery.declared_widths import attributes_of, declare
from ekgfx.surgery.dropped import REASON as DROPPED
from ekgfx.surgery.dropped import drop
from ekgfx.surgery.integers import correct, guess
from ekgfx.surgery.memory import TOLD as NO_CACHE
from ekgfx.surgery.memory import switched_off, without_memory
from ekgfx.surgery.settle import settle
from ekgfx.surgery.undescribed import told
from ekgfx.tracing.trace import trace
from ekgfx.tracing.traced import TracedModel, check_traced

Kept = Mapping[Axis, Tensor]


def prune(
    model: nn.Module,
    plan: Plan,
    traced: TracedModel | None = None,
    example_inputs: Any = None,
    *,
    verify: bool = True,
    inplace: bool = False,
    calibrate: Iterable[Any] | None = None,
    graphs: Literal["warn", "forbid", "allow"] = "warn",
) -> nn.Module:
    """The model that `plan` leaves: a new module of the same class; `model` itself is not changed.

    The result says by which plans it was made, in this round and in those before (`Plan.of`), and `save` records them.

    Args:
        model: the module to cut; its current weights are taken.
        plan: kept channels per group, or a search's result, or {group: kept channels}.
        traced: the traced model (of this module, or of another one built the same way).
        example_inputs: where no traced model is at hand, inputs to trace with, as `trace` takes them.
        verify: trace the result again in every way in which the model was traced, compare every operator with the
            prediction, and the output with the sliced graph's; run it forward and backward in training mode. What
            differs says which integers of the user's modules must change. Without it they are guessed by their values,
            and no forward is replaced.
        inplace: cut `model` itself, one tensor after the other, and return it: at no time do all weights exist twice.
            `traced` tells no more of it then; gradients are dropped.
        calibrate: un-augmented training batches in mixed order, to correct BatchNorm's running statistics on by what
            the cut changed (`ekgfx.calibrate`; all of them are read; with `inplace`, where nothing is left to compare
            with, they are estimated anew). None keeps the old ones, which no longer fit: train the result, or calibrate
            it, before it is evaluated.
        graphs: where a module's own Python cannot express the cut (`view(-1, 16 * 5 * 5)`), a forward made from the
            traced graph takes its place: "warn" says so once, "allow" does not, "forbid" raises. `replaced` lists them.
            "warn" also says where no values of the model's configuration (`model.config`) describe the cut; else the
            result's configuration holds those that do.

    Raises:
        DataError: the batches to calibrate on cannot be used.
        PlanError: the plan, or the traced model, does not fit the model.
        PruneError: the result is not what was predicted, or a forward would have to be replaced and graphs="forbid".

    Returns:
        The pruned module, in the mode and on the device of `model`.

    Example:
        >>> result = ekgfx.search(traced, batches, flops=0.55)
        >>> pruned = ekgfx.prune(model, result.plan, traced, calibrate=batches)
    """
    plan, rounds = as_plan(plan), rounds_of(model)
    if traced is None:
        if example_inputs is None:
            raise PruneError(
                "prune needs the traced model or example inputs to trace with: pass traced= or example_inputs="
            )
        traced = trace(model, example_inputs, leaf=plan.leaf, unused=plan.unused, outputs=plan.outputs or None)
    check_traced(traced, "prune")
    entire = traced if traced.model is model else traced.rebound(model)
    how = _How(verify, inplace, graphs != "forbid")
    try:
        pruned, said = _pruned(model, plan, entire, how)
    except PruneError:
        if inplace or not verify or graphs == "forbid":
            raise
        with switched_off(model):
            without = without_memory(entire)
            if without is None:
                raise
            pruned, said = _pruned(model, plan, without, how)
        entire = without
        warnings.warn(NO_CACHE, EkgfxWarning, stacklevel=2)  # with graphs="allow", too: that speaks of forwards alone
    if graphs == "warn":
        _tell(pruned)
        for sentence in said:
            warnings.warn(sentence, EkgfxWarning, stacklevel=2)
    source = entire.left_by(plan)
    if source.unseen:
        keep_apart(pruned, ((p.parameter, p.dim) for group in source.groups.values() for p in group.places))
    remember(pruned, (*rounds, replace(plan, structure=source.groups.digest, **source.options)))
    if calibrate is not None:
        estimated(pruned, calibrate, *(() if inplace else (entire, entire.groups.kept(plan))))
    return pruned


@dataclass(frozen=True)
class _How:
    """How a model is cut: checked, in place, and whether a forward may be replaced."""

    verify: bool
    inplace: bool
    may_replace: bool


@torch.inference_mode(mode=False)  # else what is made in a caller's could never be trained
def _pruned(model: nn.Module, plan: Plan, entire: TracedModel, how: _How) -> tuple[nn.Module, list[str]]:
    """The cut model, settled, and what to tell of its configuration."""
    source, kept = entire.left_by(plan), entire.groups.kept(plan)
    twin = hollow(model) if how.inplace and (how.verify or plan.dropped) else None
    before, state = attributes_of(model), source.changed(model)
    ways = repeatable(entire) if how.verify else set()
    config = configuration_of(entire, plan) if plan.kept or plan.dropped else None
    with torch.no_grad():
        if how.inplace:
            pruned, weights = model, _cut_in_place(source, kept, plan.rescale)
        else:
            weights = slice_weights(source, kept, rescale=plan.rescale)
            pruned = _cut(model, weights, source, kept)
        _recompute(pruned)
    predicted = Prediction(source, plan, kept, weights, before, twin, state, ways)
    if plan.dropped:
        drop(pruned, source, predicted.counts, twin)
    correct(pruned, source, predicted.counts)
    if not how.verify:
        guess(pruned, source, predicted.counts, before)
    declare(pruned, before, source, predicted.counts)
    said = configure(pruned, config)
    if how.verify:
        settle(pruned, predicted, numbers_of(entire, plan), may_replace=how.may_replace)
        said = configure(pruned, config, entire)
    return pruned, [sentence for sentence in (said, told(pruned)) if sentence]


def needs_forward(traced: TracedModel) -> list[str]:
    """Groups that cannot be cut without replacing a module's forward, found by cutting some of every group at once,
    and, where that fails, of ever fewer."""
    names = [name for name, group in traced.groups.items() if group.size > 1]
    sizes = {name: traced.groups[name].size for name in names}

    def plan(some: Sequence[str]) -> Plan:  # parts that differ, so that no two widths stay equal by chance
        kept = {name: max(1, sizes[name] - sizes[name] // 4 - names.index(name) % 3) for name in some}
        return Plan({name: tuple(range(n)) for name, n in kept.items()}, **traced.options)

    def failing(some: Sequence[str]) -> list[str]:
        try:
            prune(traced.model, plan(some), traced, graphs="forbid")
        except PruneError:
            if len(some) == 1:
                return list(some)
            half = len(some) // 2
            found = failing(some[:half])
            rest = [name for name in some[:half] if name not in found]
            found += failing(some[half:])
            left = [*rest, *(name for name in some[half:] if name not in found)]
            return found if found or not left else left  # only together
        return []

    return failing(names) if names else []


def _tell(pruned: nn.Module) -> None:
    """Say once which modules' forward was replaced."""
    found = [replacement for replacement in replaced(pruned) if not replacement.reason.startswith(DROPPED)]
    if found:
        shown = "; ".join(map(str, found[:3])) + (f"; and {len(found) - 3} more" if len(found) > 3 else "")
        warnings.warn(
            f"the forward of {several(len(found), 'module')} was replaced, since the user's Python cannot "
            f"express the cut (ekgfx.replaced(pruned) lists them): {shown}",
            EkgfxWarning,
            stacklevel=3,
        )


def _cut(model: nn.Module, weights: Mapping[str, Tensor], source: TracedModel, kept: Kept) -> nn.Module:
    """A deep copy in which the cut tensors stand in place of the originals, which are not copied first."""
    memo: dict[int, Any] = {}
    for name, cut in weights.items():
        full = source.tensor(name)
        if cut is not full:
            memo[id(full)] = like(full, cut)
    pruned: nn.Module = deep_copy(model, memo)
    for name, dims in source.weight_dims().items():
        full = source.tensor(name)
        carry(full, memo[id(full)], partial(slice_tensor, dims=dims, kept=kept), memo)
    return pruned


def _cut_in_place(source: TracedModel, kept: Kept, rescale: bool) -> dict[str, Tensor]:
    """Every parameter and buffer holds what is kept of it from now on; returns them by name."""
    weights, dims = {}, source.weight_dims()
    for name, full, cut in slices(source, kept, rescale=rescale):
        if cut is not full:
            for attribute, value in list(vars(full).items()):
                if isinstance(value, Tensor) and value.shape == full.shape:
                    setattr(full, attribute, slice_tensor(value, dims[name], kept))
            full.data, full.grad = cut, None
        weights[name] = full
    return weights


def _recompute(pruned: nn.Module) -> None:
    """Bring what modules keep of earlier computations from their weights up to date."""
    with evaluation_mode(pruned):  # some drop it here
        for module in pruned.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, WeightNorm | SpectralNorm):
                    hook(module, ())
