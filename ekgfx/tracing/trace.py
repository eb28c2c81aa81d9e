"""The front door: from an nn.Module to everything that can be known about pruning it.

traced = ekgfx.trace(model, torch.randn(1, 3, 224, 224))
print(traced.groups)                    # what can be pruned together
traced.cost(plan)                       # what a plan leaves, without running anything
traced.subnetwork(plan)(images)         # what the pruned network computes, without cutting anything
"""

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.data.batches import Inputs
from ekgfx.errors import EkgfxError, EkgfxWarning, TraceError
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph import sizes, unseen
from ekgfx.graph.asserted import checks_hold
from ekgfx.graph.axis_graph import AxisGraph, Example
from ekgfx.graph.draws import NothingDropped
from ekgfx.graph.hints import by_operators
from ekgfx.graph.opaque import Leaves, as_operators, find_leaves, record
from ekgfx.graph.quiet import quiet
from ekgfx.graph.returns import Returns, as_choice, tensors_returned
from ekgfx.graph.untouched import State, differing, put, state_of, untouched
from ekgfx.graph.ways import Way
from ekgfx.tracing.another_size import unlike
from ekgfx.tracing.observe import Observation, observe
from ekgfx.tracing.trace_errors import explained, unknown_sizes
from ekgfx.tracing.traceable import check_traceable
from ekgfx.tracing.traced import TracedModel


def trace(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    kwargs: dict[str, Any] | None = None,
    *,
    leaf: Sequence[str | type[nn.Module]] = (),
    also: Sequence[Any] = (),
    unused: Sequence[str] = (),
    outputs: str | int | Sequence[str | int] | None = None,
) -> TracedModel:
    """Trace a model in evaluation mode, and in training mode where it calls other functions there.

    What only the second one runs (an auxiliary head) is cut where the trunk is, and keeps its own channels. Weights
    that neither reads stay whole with every dimension that may meet them; an `EkgfxWarning` names them.

    Args:
        model: any module that `torch.export` can follow; it is left as it was, also where its forward keeps something.
        example_inputs: one tensor, a tuple of positional arguments, or a mapping of arguments by name. The batch is the
            leading size that all tensors share; where some are tables or single numbers, the one that every output
            begins with, too. (A batch of one is doubled, so that it can be told from other sizes of one.) Moved to the
            model's device.
        kwargs: keyword arguments.
        leaf: modules that run as they are, by name, glob (`*` also matches dots) or class: their Python may depend on
            values. All positions of their inputs, outputs and parameters stay.
        outputs: which of the model's outputs matter: keys, fields or indices ("logits", 0, "aux.0"), or globs. The
            others come out as well, but narrower where what they show is cut. By default all keep their positions, but
            for an object that the model takes as an argument of the same name: the cache of a decoder.
        also: further calls that the pruned model must stand, each of them one of: a tensor or a tuple of positional
            arguments; a dict of keyword arguments, with the example inputs; `(args, kwargs)`; the name of a method of
            the model, alone (with the example inputs) or followed by its arguments: `("project", features)`.
        unused: parameters or modules, by name or glob, that nothing uses: what was not seen of them holds nothing back.

    Returns:
        The traced model: its channel groups, what a plan costs, and the network that it leaves.

    Raises:
        TraceError: the model's forward cannot be turned into a graph; the message says where. A call of `also` cannot,
            or `unused` names what is used.

    Example:
        >>> traced = ekgfx.trace(model, images)
        >>> print(traced.groups)
        >>> traced = ekgfx.trace(model, images, also=[(images[:1],)], leaf=["head.select"])  # doctest: +SKIP
    """
    traced = silently_traced(model, example_inputs, kwargs, leaf=leaf, also=also, unused=unused, outputs=outputs)
    for note in traced.notes:
        warnings.warn(note, EkgfxWarning, stacklevel=2)
    return traced


def silently_traced(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    kwargs: dict[str, Any] | None = None,
    *,
    leaf: Sequence[str | type[nn.Module]] = (),
    also: Sequence[Any] = (),
    unused: Sequence[str] = (),
    outputs: str | int | Sequence[str | int] | None = None,
) -> TracedModel:
    """As `trace`, for those who say themselves what `notes` hold."""
    check_traceable(model)
    args, named = Inputs.of(example_inputs)
    args, named = Inputs(args, {**named, **(kwargs or {})}).onto(model)
    example = _at_least_two(model, Way(), (args, named))
    calls = [_further(model, entry, example, number) for number, entry in enumerate(also, 1)]
    traced = _traced(model, [(Way(), example), *calls], find_leaves(model, leaf), unused, as_choice(outputs))
    sizes.settle(traced, lambda: SubNetwork(traced, {}))
    return traced


def retrace(model: nn.Module, source: TracedModel, state: State | None = None) -> TracedModel:
    """Trace a model that was made from a traced one in the same ways, so that their operators can be compared.

    state: what modules are given for the time of the tracing: caches that were filled since the first one, say, as they
    were then (`TracedModel.changed`).

    Raises:
        TraceError: as `trace`.
    """
    first, *others = (
        _graph(model, graph.way, graph.example, list(source.leaves), graph.decomposed, state, _choice(graph))
        for graph in source.graphs
    )
    graphs = [AxisGraph(model, **other) for other in others]
    again = TracedModel(model, **{**first, "others": graphs, "unused": source.unused})
    again.trains = source.trains
    for new, old in zip(again.graphs, source.graphs, strict=True):
        if old.sizes_assumed:
            sizes.assume(new)
    return again


def _choice(graph: AxisGraph) -> tuple[str, ...]:
    return () if graph.returns is None else graph.returns.choice


def _further(model: nn.Module, entry: Any, example: Example, number: int) -> tuple[Way, Example]:
    """A further call as `trace` takes it: its way and its arguments."""
    method = "forward"
    if isinstance(entry, str):
        entry = (entry, *example) if isinstance(example[0], tuple) else entry
    if isinstance(entry, tuple | list) and entry and isinstance(entry[0], str):
        method, *given = entry
        if not callable(getattr(model, method, None)):
            raise TraceError(f"also names {method!r}, which is no method of {type(model).__name__}")
        entry = given[0] if len(given) == 1 else tuple(given)
    if isinstance(entry, dict):
        args, kwargs = example[0], {**example[1], **entry}
    elif isinstance(entry, Tensor):
        args, kwargs = (entry,), {}
    elif isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[1], dict):
        args, kwargs = (tuple(entry[0]) if isinstance(entry[0], tuple | list) else (entry[0],)), entry[1]
    elif isinstance(entry, tuple | list):
        args, kwargs = tuple(entry), {}
    else:
        raise TraceError(
            f"also takes tensors, tuples of arguments, dicts of keyword arguments, names of methods, not {entry!r:.80}"
        )
    way = Way(method, number=number)
    return way, _at_least_two(model, way, (args, dict(kwargs)))


def _traced(
    model: nn.Module,
    calls: Sequence[tuple[Way, Example]],
    names: list[str],
    unused: Sequence[str],
    outputs: tuple[str, ...],
) -> TracedModel:
    """The model in each of the ways, and in training mode where that is another one."""
    made: list[Any] = []
    notes: list[str] = []
    seen: list[Observation] = []
    trains = False
    for way, example in calls:
        made.append(_graph(model, way, example, names, outputs=outputs))
        training = replace(way, training=True)
        there, here = observe(model, training, *example), observe(model, way, *example)
        seen += [here] if way.method == "forward" else []
        trains |= way == Way() and there.error is None
        if there.error is not None:
            notes.append(f"{training} was not traced: {_short(there.error)}")
        elif not there.same(here):
            try:
                made.append(_graph(model, training, example, names, outputs=outputs, notes=notes))
            except TraceError as error:
                notes.append(f"{training} was not traced: {error}")
    first, *others = made
    graphs = [AxisGraph(model, **other) for other in others]
    traced = TracedModel(model, **{**first, "others": graphs, "unused": unused})
    said = unseen.notes(model, traced.only, traced.unseen, traced.dead, traced.prunable_parameters(), traced.could_be)
    sized = unlike(traced, seen, lambda way, example: _graph(model, way, example, names, outputs=outputs))
    traced.notes, traced.trains = (*notes, *said, *sized), trains
    return traced


def _graph(
    model: nn.Module,
    way: Way,
    example: Example,
    names: list[str],
    decompose: bool = False,
    state: State | None = None,
    outputs: tuple[str, ...] = (),
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """What an `AxisGraph` of the model in one of its ways is made from, beside the model. notes: grows by what a user
    should know of how."""
    with untouched(model), way.entered(model):
        put(model, state or {})
        try:
            try:
                leaves, returns, program = _exported(model, names, example, outputs, way == Way())
            except (TraceError, _NoGraphError):
                if not _fills_caches(model, *example) and not way.training:
                    raise
                with NothingDropped() if way.training else contextlib.nullcontext() as drawing:
                    leaves, returns, program = _exported(model, names, example, outputs, way == Way())
                if notes is not None and drawing is not None and drawing.lines:
                    notes.append(_all_kept(way, [*drawing.lines]))
        except _NoGraphError as error:  # the last one: which parts have a graph takes long to find out
            raise explained(model, error.failure, *example, alone=way == Way()) from error.failure
        return {
            "program": program,
            "example": example,
            "leaves": leaves,
            "decompose": decompose,
            "state": state_of(model),
            "returns": returns,
            "way": way,
            "others": None,
        }


def _all_kept(way: Way, lines: Sequence[str]) -> str:
    """What to say where layers are left out by chance."""
    return (
        f"{way} was traced with every layer that is left out by chance there (a single random number decides, at "
        f"{'; '.join(lines[:3])})"
    )


class _NoGraphError(Exception):
    """torch.export failed. It raises many types, all of them about the user's model."""

    def __init__(self, failure: Exception) -> None:
        super().__init__(str(failure))
        self.failure = failure


def _exported(
    model: nn.Module, names: list[str], example: Example, outputs: tuple[str, ...], strict: bool
) -> tuple[Leaves, Returns, torch.export.ExportedProgram]:
    checks: list[str] = []
    with untouched(model):
        try:
            leaves = record(model, names, *example)
            returned = tensors_returned(model, outputs, strict)
            operators, hints = as_operators(model, leaves), by_operators()
            with torch.no_grad(), operators, returned as returns, hints, checks_hold(checks), quiet():
                program = torch.export.export(model, *example, strict=False)
            if checks:
                with torch.no_grad():
                    model(*example[0], **example[1])  # whether they hold on the example
        except EkgfxError:
            raise
        except Exception as error:
            raise _NoGraphError(error) from error
        problem = unknown_sizes(model, program)
        if problem is not None:
            raise problem
        return leaves, returns[-1], program


def _fills_caches(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Run the model; whether it has kept something that it did not have. What has no graph may then be in a cache: the
    anchors of a detector, say, which are made anew for each new size of image."""
    before = state_of(model)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception:  # noqa: BLE001  whatever the user's forward raises; why the export failed is said
        return False
    return bool(differing(state_of(model), before))


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _at_least_two(model: nn.Module, way: Way, example: Example) -> Example:
    """The example, a batch of one doubled. Where only some tensors begin with one, a run tells if that is a batch."""
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor)]
    single = [t.ndim > 0 and len(t) == 1 for t in tensors]
    doubled: Example = pytree.tree_map_only(
        Tensor, lambda t: torch.cat([t, t]) if t.ndim and len(t) == 1 else t, example
    )
    if not any(single) or all(single):
        return doubled
    args, kwargs = doubled
    try:
        with untouched(model), way.entered(model), torch.no_grad():
            returned = [t for t in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(t, Tensor)]
    except Exception:  # noqa: BLE001  whatever the user's forward raises
        return example
    return doubled if returned and all(t.ndim and len(t) == 2 for t in returned) else example
