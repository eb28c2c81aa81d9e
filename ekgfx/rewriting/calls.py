"""What every module call of a model runs: its arguments, its own operators, the calls that it makes, what it returns.

The graph of a trace knows operators, not calls. So the model is exported once more, on demand, with a mark where a
forward begins and where it ends, and with every size of the inputs symbolic where the model's Python allows it: an
integer that the user's Python derives from its inputs is an expression of them there, and one that it knows by itself
is a constant. Weights are not needed for that: a hollow twin is exported, whose tensors have shapes and no values.
"""

import contextlib
import inspect
import operator
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from ekgfx.base.lines import calling
from ekgfx.errors import PruneError
from ekgfx.graph.asserted import checks_hold
from ekgfx.graph.axis_graph import Example
from ekgfx.graph.functional import inlined
from ekgfx.graph.hints import by_operators
from ekgfx.graph.nodes import bind
from ekgfx.graph.opaque import Leaves, as_operators
from ekgfx.graph.quiet import quiet
from ekgfx.graph.returns import tensors_returned
from ekgfx.graph.tables import is_table
from ekgfx.graph.untouched import deep_copy, untouched
from ekgfx.rewriting.branches import Branch, branching
from ekgfx.rewriting.marks import MARK, Values, filled, marked
from ekgfx.rewriting.nested import NothingNested
from ekgfx.rewriting.told import told


@dataclass
class ModuleCall:
    """One call of the module at `path`.

    passed: its (args, kwargs), as nodes of the caller; given: the same, as the nodes that it reads. returned: its
    result; results: the same, as the nodes that the caller reads. steps: its own operators and the calls that it makes,
    in order. branches: what its own Python decided by sizes.
    """

    path: str
    passed: Values
    given: Values
    returned: Values | None = None
    results: Values | None = None
    steps: list["fx.Node | ModuleCall"] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)

    def all(self) -> Iterator["ModuleCall"]:
        """This call and all that are made in it."""
        yield self
        for step in self.steps:
            if isinstance(step, ModuleCall):
                yield from step.all()

    def operators(self) -> Iterator[tuple[str, fx.Node]]:
        """Every operator in it with the module that runs it, in order."""
        for step in self.steps:
            if isinstance(step, ModuleCall):
                yield from step.operators()
            else:
                yield self.path, step


@dataclass(frozen=True)
class Calls:
    """root: the call of the model itself. weights: placeholder → qualified name; constants: placeholder → tensor.
    free: how much of the inputs' sizes is symbolic: "sizes", "batch" or nothing. numbers: sizes of the batch and of
    space that the user's Python has made numbers of, as `len(x)` does. asked: whether it asks if it is exported.
    decided: module → what its own Python decided by values, as it did in the example: lines, each with the decision.
    """

    root: ModuleCall
    weights: dict[str, str]
    constants: dict[str, Tensor]
    free: str
    numbers: frozenset[int]
    asked: bool = False
    decided: Mapping[str, Collection[str]] = field(default_factory=dict)

    def of(self, path: str) -> list[ModuleCall]:
        """The calls of one module."""
        return [call for call in self.root.all() if call.path == path]


def hollow(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A deep copy whose parameters and buffers have shapes and no values (memory that is never touched on a CPU).

    dtype: what their floating types become, in place of what they are.
    """
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        kind = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, dtype=kind, requires_grad=False)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    twin: nn.Module = deep_copy(model, memo)
    return twin


def calls_of(
    model: nn.Module,
    example: Example,
    leaves: Leaves,
    exported: bool = True,
    decisions: Sequence[bool] = (),
    most: str = "sizes",
    drawing: contextlib.AbstractContextManager[Any] | None = None,
) -> Calls:
    """The calls that one forward of a (hollow) model makes, in the modes that its modules are in.

    exported: what Python is told that asks whether it is exported. decisions: what a run decided by values, where it
    is told that it is not. most: how much of the inputs' sizes is left free at most, as in `Calls.free`: what could not
    be had in another mode is not tried again, for it takes long. drawing: is open meanwhile.

    Raises:
        PruneError: the forward cannot be exported.
    """
    args, kwargs = _others_of_the_same(example)
    problem: Exception | None = None
    for free, shapes in _dynamic(model, args, kwargs, most):
        recorded: list[tuple[str, bool, list[Any], pytree.TreeSpec] | Branch] = []
        asked: list[None] = []
        decided: dict[str, dict[str, None]] = {}
        running: list[str] = []
        operators, returned = as_operators(model, leaves), tensors_returned(model, ())
        marks = marked(model, recorded, running)

        def deciding(decision: bool) -> None:
            decided.setdefault(running[-1] if running else "", {})[f"{calling()} is {decision}"] = None  # noqa: B023

        with (
            untouched(model),  # what its forward keeps would have no values
            torch.no_grad(),
            operators,
            returned,
            by_operators(),
            marks,
            checks_hold([]),
            told(exported, asked, decisions, deciding),
            branching(recorded.append),
            NothingNested() if free == "sizes" else contextlib.nullcontext(),
            drawing or contextlib.nullcontext(),
            quiet(),
        ):
            try:
                program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
                return replace(_read(model, program, recorded, free), asked=bool(asked), decided=decided)
            except Exception as error:  # noqa: BLE001  torch.export raises many types; fewer free sizes may pass
                problem = error
    raise PruneError(f"the calls of {type(model).__name__} could not be recorded: {problem}") from problem


def _others_of_the_same(example: Example) -> Example:
    """The example in tensor objects of its own: the exporter writes on those that it is given which of their sizes are
    free, and where it fails, that stays on them for every later export."""
    memo: dict[int, Tensor] = {}
    others: Example = pytree.tree_map_only(Tensor, lambda t: memo.setdefault(id(t), t.detach()), example)
    return others


def _dynamic(model: nn.Module, args: tuple, kwargs: dict[str, Any], most: str) -> Iterator[tuple[str, Any]]:
    """Which sizes of the inputs are left to the exporter, most first."""
    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    ways = ("sizes", "batch", "")
    for free in ways[ways.index(most) : 2]:
        last = None if free == "sizes" else 1
        yield (
            free,
            pytree.tree_map(
                lambda v: _free(v.shape[:last]) if isinstance(v, Tensor) else None,  # noqa: B023
                dict(bound),
            ),
        )
    yield "", None


def _free(shape: Sequence[int]) -> dict[int, Any]:
    """The dimensions that the exporter may leave free; it takes sizes of 1 as they are, and warns of them if asked."""
    return {number: Dim.AUTO for number, size in enumerate(shape) if size > 1}


def _read(model: nn.Module, program: torch.export.ExportedProgram, recorded: list[Any], free: str) -> Calls:
    graph, weights, constants = inlined(program.graph_module), {}, {}
    placeholders = graph.find_nodes(op="placeholder")
    numbers: set[int] = set()
    for spec, node in zip(program.graph_signature.input_specs, placeholders, strict=True):
        name = node.name
        if spec.kind is InputKind.USER_INPUT and isinstance(node.meta["val"], Tensor):
            sizes = node.meta["val"].shape
            numbers.update(size for size in (*sizes[:1], *sizes[2:]) if isinstance(size, int) and size > 1)
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            weights[name] = spec.target
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constant = program.constants[spec.target]
            if is_table(model, spec.target, constant):
                weights[name] = spec.target
            else:
                constants[name] = constant
    top: list[Any] = []
    running: list[ModuleCall] = []
    marks, taken = iter(recorded), set[fx.Node]()
    for node in graph.nodes:
        if node in taken or node.op != "call_function":
            continue
        if node.target is not MARK:
            if _does(node):
                running[-1].steps.append(node)
            continue
        while isinstance(mark := next(marks), Branch):
            running[-1].branches.append(mark)
        path, begins, kinds, spec = mark
        inside = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        taken.update(inside.values())
        before, after = (
            Values(tuple(filled(kinds, tensors, node.args[1])), spec)
            for tensors in (node.args[0], [inside.get(i) for i in range(len(node.args[0]))])
        )
        if begins:
            call = ModuleCall(path, before, after)
            (running[-1].steps if running else top).append(call)
            running.append(call)
        else:
            call = running.pop()
            call.returned, call.results = before, after
    return Calls(top[0], weights, constants, free, frozenset(numbers))


def whole(node: fx.Node) -> bool:
    """Whether a node takes all of a tensor by a slice, as `x[:, None]` does where sizes are symbolic."""
    if node.target is not torch.ops.aten.slice.Tensor:
        return False
    args = bind(node)
    return args["start"] in (0, None) and args["end"] in (sys.maxsize, None) and args["step"] == 1


def _does(node: fx.Node) -> bool:
    """Whether a node computes or changes a tensor: sizes are read where they are wanted, and checks of them are left
    out."""
    value = node.meta.get("val")
    if any(isinstance(v, Tensor) for v in pytree.tree_leaves(value)):
        return True
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
