"""Cut a model for real: the same class with smaller tensors, checked against what the graph predicts."""

import itertools
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ekgfx.attributes import Choice, correct
from ekgfx.axes import Axis
from ekgfx.calibrate import calibrate as calibrated
from ekgfx.carried import carry, like
from ekgfx.declared import attributes_of, declare
from ekgfx.errors import EkgfxError, EkgfxWarning, PruneError
from ekgfx.graph import AxisGraph
from ekgfx.graphed import replace_modules
from ekgfx.leaf import evaluation_mode
from ekgfx.plan import Plan, as_plan, remember, rounds_of
from ekgfx.signature import Part, parts_of
from ekgfx.sliced import SubNetwork, slice_tensor, slice_weights, slices
from ekgfx.trace import TracedModel, check_traced, retrace, trace
from ekgfx.unseen import keep_apart
from ekgfx.untouched import State, deep_copy
from ekgfx.verify import compare_outputs, compare_shapes, trains
from ekgfx.ways import Way, undisturbed

Kept = Mapping[Axis, Tensor]

MOST_TRIALS = 16
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}


def prune(
    model: nn.Module,
    plan: Plan,
    traced: TracedModel | None = None,
    example_inputs: Any = None,
    *,
    verify: bool = True,
    inplace: bool = False,
    calibrate: Iterable[Any] | None = None,
) -> nn.Module:
    """The model that `plan` leaves: a new module of the same class; `model` itself is not changed.

    The result says by which plans it was made, in this round and in those before (`Plan.of`), and `save` records them.

    Args:
        model: the module to cut; its current weights are taken.
        plan: kept channels per group, or a search's result, or {group: kept channels}.
        traced: the traced model (of this module, or of another one built the same way).
        example_inputs: where no traced model is at hand, inputs to trace with, as `trace` takes them.
        verify: trace the result again in every way in which the model was traced, compare the shape of every operator
            with the prediction, and its output with the sliced graph's; run it forward and backward in training mode.
        inplace: cut `model` itself, one tensor after the other, and return it (a graph, where its class cannot express
            the cut): at no time do all weights exist twice. `traced` tells no more of it then; gradients are dropped.
        calibrate: un-augmented training batches in mixed order, to estimate BatchNorm's running statistics anew on
            (`ekgfx.calibrate`; all of them are read). None keeps the old ones, which no longer fit: train the result,
            or calibrate it, before it is evaluated.

    Raises:
        DataError: the batches to calibrate on cannot be used.
        PlanError: the plan, or the traced model, does not fit the model.
        PruneError: the result is not what was predicted.
    """
    plan, rounds = as_plan(plan), rounds_of(model)
    if traced is None:
        if example_inputs is None:
            raise PruneError(
                "prune needs the traced model or example inputs to trace with: pass traced= or example_inputs="
            )
        traced = trace(model, example_inputs, leaf=plan.leaf, unused=plan.unused, outputs=plan.outputs or None)
    check_traced(traced, "prune")
    source = traced if traced.model is model else traced.rebound(model)
    kept = source.groups.kept(plan)
    parts = parts_of(source, [name for name, _ in model.named_modules()]) if inplace and verify else None
    before, state = attributes_of(model), source.changed(model)
    ways = _repeatable(source) if verify else set()
    with torch.no_grad():
        if inplace:
            pruned, weights = model, _cut_in_place(source, kept, plan.rescale)
        else:
            weights = slice_weights(source, kept, rescale=plan.rescale)
            pruned = _cut(model, weights, source, kept)
        _recompute(pruned)
    predicted = _Prediction(source, plan, kept, weights, parts, state, ways)
    choices = correct(pruned, source, predicted.counts)
    declare(pruned, before, source, predicted.counts)
    pruned = _settle(pruned, choices, predicted) if verify else pruned
    if source.unseen:
        keep_apart(pruned, ((p.parameter, p.dim) for group in source.groups.values() for p in group.places))
    remember(pruned, (*rounds, replace(plan, structure=source.groups.digest, **source.options)))
    return pruned if calibrate is None else calibrated(pruned, calibrate)


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


@dataclass(frozen=True)
class _Prediction:
    """What a cut module must be: the sliced graph on `weights`, the cut tensors themselves.

    parts: what each module does, where it can no longer be observed, since the original has been cut itself.
    state: what modules have otherwise now than when they were traced, as it was then.
    ways: those in which the outputs of the original and of its graph were equal.
    """

    source: TracedModel
    plan: Plan
    kept: Mapping[Axis, Tensor]
    weights: Mapping[str, Tensor]
    parts: Mapping[str, Part | PruneError] | None
    state: State
    ways: Collection[Way]

    @property
    def counts(self) -> dict[Axis, int]:
        return {axis: len(index) for axis, index in self.kept.items()}

    def graph(self, way: Way) -> AxisGraph:
        return next(graph for graph in self.source.graphs if graph.way == way)

    def parts_of(self, paths: list[str], way: Way) -> list[Part]:
        """What the modules at these paths do in one way. Raises PruneError: that cannot be said of one of them."""
        if way != self.source.way and (self.parts is not None or any(map(self.source.operations_of.get, paths))):
            raise PruneError(f"{self.source.way} and {way} run other operators there")
        known = self.parts if self.parts is not None else parts_of(self.graph(way), paths)
        found = []
        for path in paths:
            if isinstance(part := known[path], PruneError):
                raise part
            found.append(part)
        return found


def _settle(pruned: nn.Module, choices: list[Choice], predicted: _Prediction) -> nn.Module:
    """Make the cut module what was predicted: settle the open choices, then replace what cannot express it.

    A module whose Python cannot give the predicted shapes is replaced, with all of its class, by its part of the graph;
    where that does not help, its parent is, up to the model itself. What also runs in another way than the first one is
    not replaced for the sake of that.
    """
    first: _Problem | None = None
    for trial in itertools.islice(_assignments(pruned, choices), MOST_TRIALS):
        _take(pruned, trial)
        problem = _problem(pruned, predicted)
        if problem is None:
            return pruned
        first = first or problem
    _take(pruned, next(_assignments(pruned, choices)))
    problem = first
    classes = {name: type(module) for name, module in pruned.named_modules()}
    replaced = set[str]()
    stands_in = False  # some graph of the first way
    while problem is not None and "" not in replaced:
        path, way = problem.module, problem.way
        stands_in |= way == predicted.source.way
        while path and (path in replaced or not _replace(pruned, path, classes, predicted, replaced, way)):
            path = path.rpartition(".")[0]
        if not path and way == predicted.source.way:
            replaced.add("")
            pruned = replace_modules(pruned, predicted.parts_of([""], way), predicted.source, predicted.counts)
        elif not path:
            break
        problem = _problem(pruned, predicted)
    modules = pruned.named_modules()
    graphs = [n for n, m in modules if isinstance(m, torch.fx.GraphModule) and type(m) is not classes.get(n)]
    if problem is not None and problem.way != predicted.source.way and stands_in and graphs:
        places = ", ".join(path or "the model" for path in graphs)
        warnings.warn(
            f"graphs of {predicted.source.way} stand for {places}, and {problem.way} differs: {problem.text}",
            EkgfxWarning,
            stacklevel=3,
        )
    elif problem is not None:
        raise PruneError(f"the pruned {type(pruned).__name__} is not what was predicted: {problem.text}")
    return pruned


def _replace(
    pruned: nn.Module, path: str, classes: Mapping[str, type], predicted: _Prediction, replaced: set[str], way: Way
) -> bool:
    """Replace the module at `path` and all others of its class by their graphs; False if that cannot be done."""
    alike = [name for name, kind in classes.items() if kind is classes[path] and name not in replaced]
    if way != predicted.source.way:
        alike = [name for name in alike if name == path or not predicted.source.operations_of.get(name)]
    replaced.update(alike)
    try:
        replace_modules(pruned, predicted.parts_of(alike, way), predicted.graph(way), predicted.counts)
    except (PruneError, AttributeError):  # an inner module of one replaced before is no module any more
        return False
    return True


def _take(pruned: nn.Module, trial: dict[Choice, int]) -> None:
    for choice, value in trial.items():
        choice.take(pruned, value)


def _assignments(pruned: nn.Module, choices: list[Choice]) -> Any:
    """Every way to settle the choices, those closest to 'all changed' first; modules of one class share theirs."""
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


@dataclass(frozen=True)
class _Problem:
    """What is wrong with a cut module, the module in which it shows ('' if that is not known), and the way."""

    text: str
    module: str = ""
    way: Way = Way()  # noqa: RUF009  frozen


def _problem(pruned: nn.Module, predicted: _Prediction) -> _Problem | None:
    """Trace the cut module again and compare it with the prediction; None if all agrees."""
    source, plan = predicted.source, predicted.plan
    try:
        again = retrace(pruned, source, predicted.state)
        difference = compare_shapes(source, plan, again)
    except EkgfxError as error:
        failing = ((_failing_module(pruned, graph), graph.way) for graph in source.graphs)
        module, way = next(((module, way) for module, way in failing if module is not None), ("", source.way))
        return _Problem(str(error), module, way)
    if difference is not None:
        return _Problem(str(difference), difference.module, difference.way)
    if again.cost() != source.cost(plan):
        return _Problem(f"it costs {again.cost()}, predicted were {source.cost(plan)}")
    for graph in source.graphs:
        if graph.way.training and graph.way not in predicted.ways:
            continue
        weights = {n: t if isinstance(t, nn.Parameter) else t.clone() for n, t in predicted.weights.items()}
        off = compare_outputs(pruned, SubNetwork(graph, predicted.kept, weights=weights), *graph.example)
        if not off <= _tolerance(pruned):
            return _Problem(f"its output differs from the sliced graph's by {off:.1e} (relative)", way=graph.way)
    fault = _training_error(pruned, source) if source.trains else None
    if fault is None or (source.model is not pruned and _training_error(source.model, source) is not None):
        return None
    return _Problem(f"it does not train: {fault}", way=replace(source.way, training=True))


def _training_error(model: nn.Module, source: TracedModel) -> str | None:
    """What a step of training raises, if it does."""
    try:
        trains(model, source.way, *source.example)
    except torch.OutOfMemoryError:
        return None
    except Exception as error:  # noqa: BLE001  whatever the user's forward raises
        return f"{type(error).__name__}: {error}"
    return None


def _repeatable(source: TracedModel) -> set[Way]:
    """The training ways whose outputs are those of their graphs: their random numbers are drawn in the same order."""
    graphs = [graph for graph in source.others if graph.way.training]
    tolerance = _tolerance(source.model)
    off = {graph.way: compare_outputs(source.model, SubNetwork(graph, {}), *graph.example) for graph in graphs}
    return {way for way, error in off.items() if error <= tolerance}


def _tolerance(model: nn.Module) -> float:
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    return TOLERANCE.get(dtype, 0.05)


def _failing_module(model: nn.Module, graph: AxisGraph) -> str | None:
    """Name of the innermost module whose forward raises in the way of a graph, None if none does."""
    args, kwargs = graph.example
    running: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _, __, n=name: running.append(n)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    try:
        with torch.no_grad(), graph.way.entered(model), undisturbed(model):
            model(*args, **kwargs)
    except Exception:  # noqa: BLE001  whatever the user's forward raises; its place is what is wanted
        return running[-1] if running else ""
    finally:
        for handle in handles:
            handle.remove()
    return None
