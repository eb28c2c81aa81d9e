"""The calls of an uncut model as its forwards are rewritten from them, and what a cut makes of the sizes in them.

The recording keeps the modules' boundaries, the trace knows the axes: each recorded operator is found in the trace.
"""

import contextlib
import difflib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ekgfx.axes import Axis, Expr, Prod, count, resolve
from ekgfx.errors import EkgfxError
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.draws import NothingDropped
from ekgfx.graph.nodes import bind
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.graph.propagation import Operation
from ekgfx.graph.sizes import GIVEN_SIZES
from ekgfx.rewriting.calls import Calls, ModuleCall, calls_of, hollow, whole
from ekgfx.rewriting.marks import Values
from ekgfx.rewriting.modes import others_in_training
from ekgfx.rewriting.terms import Recorded, same_values
from ekgfx.rewriting.told import decisions_of
from ekgfx.surgery.check import operator_name, takes_all
from ekgfx.tracing.traced import TracedModel


def record(
    source: TracedModel,
    graph: AxisGraph,
    twin: nn.Module | None = None,
    exported: bool = True,
    most: str = "sizes",
) -> Recorded:
    """The calls of the uncut model, in evaluation and (with floats of another type, so that one sees which types follow
    the model's) in training. graph: one of its graphs, whose example inputs are given. twin: the uncut model without
    its weights, where that of `source` has been cut itself. exported, most: as in `calls_of`."""
    model, entire = twin or hollow(source.model), twin is None
    known = not exported and entire  # of a model that was cut itself there is no run
    floats = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    with evaluation_mode(model):
        seen = decisions_of(source.model, graph.way, graph.example) if known else []
        evaluation = calls_of(model, graph.example, source.leaves, exported, seen, most)
    other = torch.float32 if floats in (torch.bfloat16, torch.float16) else torch.bfloat16
    training, ways = None, [None, NothingDropped()]  # as it is traced
    seen = decisions_of(source.model, replace(graph.way, training=True), graph.example) if known else []
    for dtype in (other, floats):
        twin = hollow(model, dtype)
        twin.train()
        example = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.dtype == floats else t, graph.example)  # noqa: B023
        for drawing in tuple(ways):
            with contextlib.suppress(EkgfxError, RuntimeError):
                training = calls_of(twin, example, source.leaves, exported, seen, evaluation.free, drawing)
                break
            if drawing is not None and not drawing.lines:
                ways.remove(drawing)
        if training is not None:
            break
    others: frozenset[str] = frozenset()
    if training is None:
        every = frozenset(name for name, _ in model.named_modules())
        others = others_in_training(source.model, graph.way, graph.example) if entire else every
    return Recorded(model, evaluation, training, floats, dtype, others)


class TracedWidths:
    """What the cut makes of the sizes in recorded calls: their operators are found in the trace, which knows. graph:
    that of `source` which was recorded."""

    def __init__(self, source: TracedModel, graph: AxisGraph, counts: Mapping[Axis, int], recorded: Recorded) -> None:
        self.counts = counts
        self.operations: dict[fx.Node, Operation] = {}
        self.dims: dict[fx.Node, Any] = {}
        training = (other for other in source.graphs if other.way == replace(graph.way, training=True))
        pairs = ((recorded.evaluation, graph), (recorded.training, next(training, graph)))
        for calls, graph in pairs:
            if calls is not None:
                self.operations |= aligned(graph, calls)
                given = [
                    v for v in calls.root.passed.flat if isinstance(v, fx.Node) and isinstance(v.meta["val"], Tensor)
                ]
                if len(given) == len(graph.inputs):
                    self.dims |= {node: graph.dims[name] for node, name in zip(given, graph.inputs, strict=True)}
                self._follow(calls.root, graph)

    def _follow(self, call: ModuleCall, source: AxisGraph) -> None:
        """Every value in a call, and what it is passed on as, with its dimensions."""
        self._pass(call.passed, call.given)
        for step in call.steps:
            if isinstance(step, ModuleCall):
                self._follow(step, source)
            elif step in self.operations:
                name = self.operations[step].name
                self.dims[step] = source.dims.get(name, source.tensors.get(name))
            elif whole(step):
                self.dims[step] = self.dims.get(cast(fx.Node, step.args[0]))
            elif step.target is operator.getitem and isinstance(self.dims.get(cast(fx.Node, step.args[0])), list):
                self.dims[step] = self.dims[cast(fx.Node, step.args[0])][step.args[1]]
        self._pass(call.returned, call.results)

    def _pass(self, before: Values | None, after: Values | None) -> None:
        if before is not None and after is not None:
            for old, new in zip(before.flat, after.flat, strict=True):
                if isinstance(new, fx.Node) and isinstance(old, fx.Node) and old in self.dims:
                    self.dims[new] = self.dims[old]

    def knows(self, call: ModuleCall) -> bool:
        return any(node in self.operations for _, node in call.operators())

    def lost(self, node: fx.Node) -> bool:
        if node in self.operations:
            return False
        read = [self.dims.get(each) for each in node.all_input_nodes if isinstance(each.meta.get("val"), Tensor)]
        return any(not isinstance(dims, tuple) or any(count(d, self.counts) != d.size for d in dims) for dims in read)

    def argument(self, node: fx.Node, name: str, position: int | None, old: int) -> int:
        expr = self._expression(node, name, position, old)
        return old if expr is None else count(expr, self.counts)

    def _expression(self, node: fx.Node, name: str, position: int | None, old: int) -> Expr | None:
        operation = self.operations.get(node)
        sizes = operation.effect.sizes if operation is not None else {}
        expr = sizes.get(name, sizes.get({"shape": "size", "size": "shape"}.get(name, name)))  # of reshape, and of view
        if isinstance(expr, Sequence):
            expr = expr[position] if position is not None and position < len(expr) else None
        return None if expr is None or count(expr, {}) != old else resolve(expr)

    def batches(self, node: fx.Node, name: str, position: int | None, old: int) -> int:
        _, times = self._held(node, name, position, old, lambda axis: axis.batch)
        return times

    def of_input(self, node: fx.Node, name: str, position: int | None, old: int) -> tuple[int, int] | None:
        given = operator_name(node.target).split(".")[1] in GIVEN_SIZES
        axis, times = self._held(
            node,
            name,
            position,
            old,
            lambda axis: not axis.batch and (axis.example or (given and axis.frozen is not None)),
        )
        return None if axis is None or axis.size == 1 else (axis.size, times)

    def _held(
        self, node: fx.Node, name: str, position: int | None, old: int, asked: Callable[[Axis], bool]
    ) -> tuple[Axis | None, int]:
        """The axis of a kind that the size holds which an operator is given, and how often; None and 0 where it holds
        none, or more than one."""
        expr = self._expression(node, name, position, old)
        factors = expr.factors if isinstance(expr, Prod) else () if expr is None else (expr,)
        found = [factor for factor in factors if isinstance(factor, Axis) and asked(factor)]
        if len(found) != 1:
            return None, 0
        return found[0], math.prod(count(factor, self.counts) for factor in factors if factor is not found[0])

    def input_dims(self, node: fx.Node) -> dict[int, int]:
        dims = self.dims.get(node)
        exprs = map(resolve, dims) if isinstance(dims, tuple) else ()
        return {d: e.size for d, e in enumerate(exprs) if isinstance(e, Axis) and e.example and not e.batch}

    def batch_dim(self, node: fx.Node) -> int | None:
        dims = self.dims.get(node)
        exprs = map(resolve, dims) if isinstance(dims, tuple) else ()
        return next((d for d, e in enumerate(exprs) if isinstance(e, Axis) and e.batch), None)

    def length(self, node: fx.Node, dim: int, old: int) -> int:
        dims = self.dims.get(node)
        return count(dims[dim], self.counts) if isinstance(dims, tuple) and dims[dim].size == old else old


def aligned(source: AxisGraph, calls: Calls) -> dict[fx.Node, Operation]:
    """Recorded operator → the operation of the trace that it is."""

    def sign(module: str, node: fx.Node) -> tuple[Any, ...]:
        """What tells an operator from its neighbours: a graph without mutation has more slices of a tensor that is
        written to in parts."""
        return module, operator_name(node.target), _shape(node), _number(bind(node).get("start"))

    # A slice that takes all stands in the one or the other alone: `x[:, :8]` records one for every `:`.
    nodes = [
        (path, node)
        for path, node in calls.root.operators()
        if isinstance(node.target, torch._ops.OpOverload) and not whole(node)
    ]
    operations = [operation for operation in source.operations if not takes_all(operation)]
    mine = [sign(operation.module, operation.node) for operation in operations]
    theirs = [sign(path, node) for path, node in nodes]
    pairs = list(_matching(mine, theirs))
    # What a tensor that was written to is viewed as stands in the trace where it is read first.
    i = j = 0
    for a, b in [*pairs, (len(mine), len(theirs))]:
        anywhere = ([sign[1:] for sign in signs] for signs in (mine[i:a], theirs[j:b]))
        pairs += [(i + k, j + m) for k, m in _matching(*anywhere)]
        i, j = a + 1, b + 1
    return {nodes[b][1]: operations[a] for a, b in pairs}


def same_operators(one: Recorded, other: Recorded) -> bool:
    """Whether two recordings of a model run the same, up to which of their sizes are symbolic."""

    def runs(calls: Calls | None) -> list[Any]:
        found = [] if calls is None else [*calls.root.operators()]
        return [
            (
                path,
                operator_name(node.target),
                _shape(node),
                *(v for v in bind(node).values() if isinstance(v, float | bool)),
            )
            for path, node in found
            if isinstance(node.target, torch._ops.OpOverload) and not whole(node)
        ]

    def held(recorded: Recorded) -> list[Tensor]:
        every = (recorded.evaluation, recorded.training)
        return [constant for calls in every if calls is not None for constant in calls.constants.values()]

    constants, others = held(one), held(other)
    return (
        runs(one.evaluation) == runs(other.evaluation)
        and runs(one.training) == runs(other.training)
        and len(constants) == len(others)
        and all(map(same_values, constants, others))
    )


def _matching(a: list[Any], b: list[Any]) -> Iterator[tuple[int, int]]:
    """The places of what is alike in two lists, in the order of both."""
    blocks: list[Any] = [(0, 0, len(a))]
    if a != b:
        blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    return ((i + k, j + k) for i, j, size in blocks for k in range(size))


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's (first) output for the example inputs."""
    tensors = [value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
    return tuple(map(_number, tensors[0].shape)) if tensors else ()


def _number(value: Any) -> Any:
    """An argument or a size, as the number that it is for the example inputs where it is one."""
    value = value.meta.get("val") if isinstance(value, fx.Node) else value
    return value.node.hint if isinstance(value, torch.SymInt) else value
