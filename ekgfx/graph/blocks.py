"""Residual blocks: sums of a tensor and of what was computed from it. Without its branch, such a block is an identity.

A sum is found wherever one summand depends on the other (or, where several branches are added one after the other, on
a summand of the other). What computes nothing without the branch goes with it. An activation of the sum that was
applied to the block's input already (a ReLU of a ReLU) changes nothing, and goes as well.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.cost import mac_products, value_of
from ekgfx.graph.propagation import Operation

ADD = "aten.add.Tensor"
IDEMPOTENT = frozenset({"aten.relu.default", "aten.hardtanh.default", "aten.relu6.default", "aten.clamp.default"})
"""Activations that change nothing the second time."""
CHOOSING = frozenset({"aten.max_pool1d.default", "aten.max_pool2d.default", "aten.max_pool3d.default"})
"""Operators whose values are some of those that they read."""


@dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
        name: the module that it is; where a module holds several, the one with most of the branch's MACs.
        module: the innermost module whose forward runs all of it.
        join: the sum's node. trunk: the argument of it that stays. output: the node in whose place the block's input
            stands: the sum, or the activation of it that changes nothing.
        gone: operators that nothing wants without the branch, the sum (and activation) included.
        weights: parameters and buffers that only these read.
        macs: MACs per sample that go.
    """

    name: str
    module: str
    join: str
    trunk: str
    output: str
    gone: frozenset[str]
    weights: tuple[str, ...]
    macs: int


def find_blocks(graph: AxisGraph) -> tuple[Block, ...]:
    """The residual blocks of one graph, in its order."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    found = []
    for operation in graph.operations:
        trunk = _trunk(operation, order) if str(operation.target) == ADD else None
        if trunk is not None:
            output = _idempotent(graph, operation, operation.args[trunk])
            gone = _without(graph, output, operation.args[trunk])
            weights = _read_by(graph, gone)
            macs = sum(
                value_of(mac_products(graph, op), {graph.batch: 1}) for op in graph.operations if op.node in gone
            )
            if weights or macs:
                found.append((operation, trunk, output, gone, weights, macs))
    modules = [_common([graph.operation(node).module for node in gone]) for *_, gone, _, _ in found]  # type: ignore[union-attr]
    names = _names(graph, modules, [gone for *_, gone, _, _ in found])
    return tuple(
        Block(
            name=name,
            module=module,
            join=operation.name,
            trunk=trunk,
            output=output.name,
            gone=frozenset(node.name for node in gone),
            weights=weights,
            macs=macs,
        )
        for name, module, (operation, trunk, output, gone, weights, macs) in zip(names, modules, found, strict=True)
    )


def _trunk(operation: Operation, order: Mapping[fx.Node, int]) -> str | None:
    """The argument of a sum that the other one was computed from; None where neither was."""
    a, b = operation.args["self"], operation.args["other"]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or a is b:
        return None
    sides = [("self", a, b)] + [("other", b, a)] * (operation.args["alpha"] == 1)
    fitting = [(name, kept, branch) for name, kept, branch in sides if _alike(kept, operation.node)]
    for name, kept, branch in fitting:
        if _depends(branch, {kept}, order):
            return name
    for name, kept, branch in fitting:
        if _depends(branch, set(_summands(kept)), order):
            return name
    return None


def _alike(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values have one shape and type."""
    a, b = one.meta.get("val"), other.meta.get("val")
    return isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype)


def _summands(node: fx.Node) -> Iterator[fx.Node]:
    """A value, and those of its shape that it is the sum of."""
    ahead = [node]
    while ahead:
        value = ahead.pop()
        yield value
        if str(value.target) == ADD:
            ahead += [source for source in value.all_input_nodes if _alike(source, value)]


def _depends(node: fx.Node, on: set[fx.Node], order: Mapping[fx.Node, int]) -> bool:
    """Whether a value is computed from one of others that are none of weights."""
    first = min(order[other] for other in on)
    seen, ahead = {node}, [node]
    while ahead:
        for source in ahead.pop().all_input_nodes:
            if source in on:
                return True
            if source not in seen and order[source] > first:
                seen.add(source)
                ahead.append(source)
    return False


def _idempotent(graph: AxisGraph, join: Operation, trunk: fx.Node) -> fx.Node:
    """The sum, or the activation that alone reads it, where the trunk comes out of the same activation."""
    users = list(join.node.users)
    after, before = graph.operation(users[0]) if len(users) == 1 else None, graph.operation(trunk)
    while before is not None and str(before.target) in CHOOSING:
        before = graph.operation(before.args["self"])
    if after is None or before is None or after.target != before.target or str(after.target) not in IDEMPOTENT:
        return join.node
    return after.node if _settings(after) == _settings(before) else join.node


def _settings(operation: Operation) -> dict[str, Any]:
    return {name: value for name, value in operation.args.items() if not isinstance(value, fx.Node)}


def _without(graph: AxisGraph, output: fx.Node, trunk: fx.Node) -> list[fx.Node]:
    """The operators that nothing wants where `trunk` stands in the place of `output`, in order."""
    gone: dict[fx.Node, None] = {output: None}
    ahead = [output]
    while ahead:
        for source in ahead.pop().all_input_nodes:
            wanted = source.op != "call_function" or source is trunk or any(user not in gone for user in source.users)
            if not wanted and source not in gone:
                gone[source] = None
                ahead.append(source)
    return [operation.node for operation in graph.operations if operation.node in gone]


def _read_by(graph: AxisGraph, gone: Sequence[fx.Node]) -> tuple[str, ...]:
    """The weights that are read, and by these operators alone."""
    known = set(gone)
    placeholders = dict.fromkeys(node for each in gone for node in each.all_input_nodes if node.name in graph.weights)
    return tuple(graph.weights[node.name] for node in placeholders if all(user in known for user in node.users))


def _common(modules: Sequence[str]) -> str:
    """The innermost module that all are in."""
    first, *others = [name.split(".") if name else [] for name in modules]
    for other in others:
        first = first[: next((i for i, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), len(other))]
    return ".".join(first)


def _names(graph: AxisGraph, modules: Sequence[str], gone: Sequence[Sequence[fx.Node]]) -> list[str]:
    """A module's own name where it is one block, from what it is given to what it returns; else that of its part with
    most of the branch's MACs."""
    names = []
    for module, nodes in zip(modules, gone, strict=True):
        whole = bool(module) and modules.count(module) == 1 and _holds_all(graph, module, set(nodes))
        names.append(module if whole else _largest_part(graph, module, nodes))
    count, seen = Counter(names), Counter[str]()
    for i, name in enumerate(names):
        if count[name] > 1:
            names[i] = f"{name}#{seen[name]}"
            seen[name] += 1
    return names


def _holds_all(graph: AxisGraph, module: str, nodes: set[fx.Node]) -> bool:
    """Whether all operators of a module that read weights are among these."""
    inside = (op for op in graph.operations if f"{op.module}.".startswith(f"{module}."))
    return all(op.node in nodes for op in inside if any(n.name in graph.weights for n in op.node.all_input_nodes))


def _largest_part(graph: AxisGraph, module: str, nodes: Sequence[fx.Node]) -> str:
    work: Counter[str] = Counter()
    inside = f"{module}." if module else ""
    for node in nodes:
        operation = graph.operation(node)
        assert operation is not None
        if operation.module.startswith(inside) and operation.module != module:
            part = inside + operation.module.removeprefix(inside).partition(".")[0]
            work[part] += 1 + value_of(mac_products(graph, operation), {graph.batch: 1})
    return max(work, key=work.__getitem__) if work else module or nodes[-1].name
