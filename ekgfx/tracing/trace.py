"""The front door: from an nn.Module to everything that can be known about pruning it.

traced = ekgfx.trace(model, torch.randn(1, 3, 224, 224))
print(traced.groups)                    # what can be pruned together
traced.cost(plan)                       # what a plan leaves, without running anything
traced.subnetwork(plan)(images)         # what the pruned network computes, without cutting anything
"""

import contextlib
import copy
import io
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from html import escape
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.base.units import human
from ekgfx.data.batches import Inputs
from ekgfx.errors import EkgfxError, EkgfxWarning, PlanError, TraceError
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph import sizes, unseen
from ekgfx.graph.axis_graph import AxisGraph, Example
from ekgfx.graph.cost import Cost, Products, cost_of, evaluate, mac_table
from ekgfx.graph.dropped import Blocks, blocks_of, without
from ekgfx.graph.groups import Groups, find_groups, left_of
from ekgfx.graph.hints import masks_taken_as_they_are
from ekgfx.graph.opaque import Leaves, as_operators, find_leaves, record
from ekgfx.graph.plan import Plan
from ekgfx.graph.returns import Returns, as_choice, tensors_returned
from ekgfx.graph.untouched import State, differing, put, state_of, untouched
from ekgfx.graph.ways import Way, seeded
from ekgfx.rules.registry import passing
from ekgfx.tracing.observe import observe
from ekgfx.tracing.trace_errors import explained, unknown_sizes

MOST_WITHOUT = 64
"""Sets of blocks without which a model is remembered: a step of a search asks for one after the other."""


class TracedModel(AxisGraph):
    """A traced model: its axis graphs, and the questions that can be asked of it.

    notes: what a user should know of what was not seen, one sentence each.
    trains: the model was seen to run in training mode.
    dropped: residual blocks that are identities here.
    """

    notes: tuple[str, ...] = ()
    trains: bool = False
    dropped: frozenset[str] = frozenset()

    @property
    def outputs(self) -> tuple[str, ...]:
        """The places of the outputs that matter; none named where all do."""
        return () if self.returns is None else self.returns.choice

    @cached_property
    def groups(self) -> Groups:
        """The channel groups; one for every free axis of a parameter, with all places that it cuts."""
        return find_groups(self, self._mac_table)

    def __repr__(self) -> str:
        cost = self.cost()
        return (
            f"TracedModel({type(self.model).__name__}: {len(self.groups)} groups, {human(cost.macs)} MACs, "
            f"{human(cost.params)} parameters)"
        )

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{self.groups._repr_html_()}"

    @cached_property
    def unknown_costs(self) -> dict[str, int]:
        """Operator without a rule → how many parameters more would lie in tensors that some group cuts, if it passed
        positions on: what a rule for it can bring. What others hold as well is not counted."""
        here = self.prunable_parameters()
        return {op: self.assuming({op: passing}).prunable_parameters() - here for op in self.unknown_ops}

    def cost(self, plan: Plan | None = None) -> Cost:
        """MACs per sample and parameters of the (sub-)network, from the expressions alone."""
        left = self.left_by(plan)
        counts = {axis: len(kept) for axis, kept in self.groups.kept(plan).items()}
        return cost_of(left, left._mac_table, counts)

    @property
    def entire(self) -> "TracedModel":
        """The same model with the blocks that were dropped."""
        return self.whole if isinstance(self.whole, TracedModel) else self

    @cached_property
    def blocks(self) -> Blocks:
        """The residual blocks that a plan may drop, by name."""
        return blocks_of(self)

    def left_by(self, plan: Plan | None) -> "TracedModel":
        """The same model without the blocks that a plan drops; itself where it drops none.

        Raises PlanError where the model has no such block.
        """
        names = frozenset(plan.dropped) if plan is not None else frozenset()
        if names <= self.dropped:
            return self
        if names not in self._without:
            left = without(self, self.blocks, names)
            left.dropped = names
            vars(left)["groups"] = left_of(self.groups, left)
            if len(self._without) >= MOST_WITHOUT:
                self._without.pop(next(iter(self._without)))
            self._without[names] = left
        return self._without[names]

    def bypassed(self, plan: Plan) -> dict[str, str]:
        """Operators that return one of their arguments where a plan drops blocks, with that argument's name."""
        found: dict[str, str] = {}
        for block in (self.blocks[name][0] for name in self.left_by(plan).dropped):
            if block is not None:
                found |= {block.output: "self", block.join: block.trunk}
        return found

    @cached_property
    def _without(self) -> dict[frozenset[str], "TracedModel"]:
        """What was left by the plans that were asked for last."""
        return {}

    def layer_macs(self, plan: Plan | None = None) -> dict[str, int]:
        """Module → MACs per sample of the operators in it (not in its submodules), in the order of the graph."""
        left = self.left_by(plan)
        counts = {axis: len(kept) for axis, kept in self.groups.kept(plan).items()}
        counts[self.batch] = 1
        total: dict[str, int] = {}
        for operation in self.operations:
            if operation.name in self._mac_table:
                macs = evaluate(left._mac_table.get(operation.name, []), counts)
                total[operation.module] = total.get(operation.module, 0) + macs
        return total

    @property
    def options(self) -> dict[str, Any]:
        """What a plan must know of how the model was traced."""
        also = len({graph.way.number for graph in self.others} - {0})
        return {"leaf": tuple(self.leaves), "unused": self.unused, "also": also, "outputs": self.outputs}

    def changed(self, model: nn.Module) -> State:
        """What the modules of `model` (this one, or another built the same way) have otherwise than these had when they
        were traced: caches filled since then, or for other sizes."""
        return differing(state_of(model), self.state)

    def rebound(self, model: nn.Module) -> "TracedModel":
        """The same graphs over the weights of another module that was built the same way.

        Raises PlanError where the other has not all of the weights, or has them in other shapes.
        """
        other = copy.copy(self)
        vars(other).pop("_without", None)
        other.model, other.others = model, tuple(map(copy.copy, self.others))
        for graph in other.others:
            graph.model = model
        named = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
        for name, dims in self.weight_dims().items():
            shape, found = tuple(dim.size for dim in dims), named.get(name)
            if found is None or tuple(found.shape) != shape:
                has = "no" if found is None else f"{tuple(found.shape)} as"
                raise PlanError(
                    f"the traced model is another one than this {type(model).__name__}, which has {has} {name!r} "
                    f"(traced: {shape}); trace the model that is pruned"
                )
        return other

    @cached_property
    def _mac_table(self) -> dict[str, Products]:
        return mac_table(self)

    def subnetwork(self, plan: Plan | None = None, *, batch_stats: bool = False, rescale: bool = False) -> SubNetwork:
        """The network that `plan` leaves, as the graph on sliced weights; see `SubNetwork`."""
        return SubNetwork(self.left_by(plan), self.groups.kept(plan), batch_stats=batch_stats, rescale=rescale)


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
        example_inputs: one tensor, a tuple of positional arguments, or a mapping of arguments by name; if all tensors
            share their leading size it is the batch (a batch of one is doubled, so that the batch can be told from
            other sizes of one). Moved to the model's device.
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

    Raises:
        TraceError: the model's forward cannot be turned into a graph; the message says where. A call of `also` cannot,
            or `unused` names what is used.

    Example:
        >>> traced = trace(model, images, also=[{"task": "depth"}, ("project", features)])
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
    if not isinstance(model, nn.Module):
        raise TraceError(f"trace takes a torch.nn.Module, not a {type(model).__name__}")
    args, named = Inputs.of(example_inputs)
    args, named = Inputs(args, {**named, **(kwargs or {})}).onto(model)
    example = _at_least_two((args, named))
    calls = [_further(model, entry, example, number) for number, entry in enumerate(also, 1)]
    traced = _traced(model, [(Way(), example), *calls], find_leaves(model, leaf), unused, as_choice(outputs))
    sizes.settle(traced, lambda: SubNetwork(traced, {}))
    return traced


def check_traced(value: object, caller: str) -> None:
    """TraceError where `value` is no traced model, but the model itself, say."""
    if not isinstance(value, TracedModel):
        raise TraceError(
            f"{caller} takes a traced model, not a {type(value).__name__}: traced = ekgfx.trace(model, example_inputs)"
        )


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
    again = TracedModel(model, **{**first, "others": [AxisGraph(model, **other) for other in others]})
    for new, old in zip(again.graphs, source.graphs, strict=True):
        if old.batch_assumed:
            sizes.assume_batch(new)
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
    return Way(method, number=number), _at_least_two((args, dict(kwargs)))


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
    trains = False
    for way, example in calls:
        made.append(_graph(model, way, example, names, outputs=outputs))
        training = replace(way, training=True)
        there, here = observe(model, training, *example), observe(model, way, *example)
        trains |= way == Way() and there.error is None
        if there.error is not None:
            notes.append(f"{training} was not traced: {_short(there.error)}")
        elif not there.same(here):
            try:
                made.append(_graph(model, training, example, names, outputs=outputs))
            except TraceError as error:
                notes.append(f"{training} was not traced: {error}")
    first, *others = made
    graphs = [AxisGraph(model, **other) for other in others]
    traced = TracedModel(model, **{**first, "others": graphs, "unused": unused})
    said = unseen.notes(model, traced.only, traced.unseen, traced.dead, traced.prunable_parameters(), traced.could_be)
    traced.notes, traced.trains = (*notes, *said), trains
    return traced


def _graph(
    model: nn.Module,
    way: Way,
    example: Example,
    names: list[str],
    decompose: bool = False,
    state: State | None = None,
    outputs: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What an `AxisGraph` of the model in one of its ways is made from, beside the model."""
    with untouched(model), seeded(model), way.entered(model):
        put(model, state or {})
        try:
            leaves, returns, program = _exported(model, names, example, outputs, way == Way())
        except TraceError:
            if not _fills_caches(model, *example):
                raise
            leaves, returns, program = _exported(model, names, example, outputs, way == Way())
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


def _exported(
    model: nn.Module, names: list[str], example: Example, outputs: tuple[str, ...], strict: bool
) -> tuple[Leaves, Returns, torch.export.ExportedProgram]:
    with untouched(model):
        try:
            leaves = record(model, names, *example)
            returned = tensors_returned(model, outputs, strict)
            with torch.no_grad(), as_operators(model, leaves), returned as returns, masks_taken_as_they_are(), _quiet():
                program = torch.export.export(model, *example, strict=False)
        except EkgfxError:
            raise
        except Exception as error:  # torch.export raises many types, all of them about the user's model
            raise explained(model, error, *example) from error
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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What PyTorch logs and prints about an export that fails is in the exception as well: it goes no further."""
    printed, known = io.StringIO(), logging.root.manager.loggerDict.values()
    loggers = [
        logger for logger in known if isinstance(logger, logging.Logger) and f"{logger.name}.".startswith("torch.")
    ]
    handlers = {handler for logger in loggers for handler in logger.handlers}  # PyTorch gives most of them their own

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING

    for handler in handlers:
        handler.addFilter(passes)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(printed):
            # What a forward keeps is put back; recurrent layers look at a list of their own parameters in each.
            warnings.filterwarnings(
                "ignore", message=r"The tensor attributes? self\..*(was|were) assigned during export"
            )
            yield
        sys.stderr.write(printed.getvalue())  # what the user's own forward says
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _at_least_two(example: Example) -> Example:
    tensors = [t for t in pytree.tree_leaves(example) if isinstance(t, Tensor)]
    if not tensors or any(t.ndim == 0 or t.shape[0] != 1 for t in tensors):
        return example
    doubled: Example = pytree.tree_map_only(Tensor, lambda t: torch.cat([t, t]), example)
    return doubled
