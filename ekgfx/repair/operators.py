"""Which operators of a graph can be refitted, and why the others cannot."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from ekgfx.axes import axes
from ekgfx.execution.subnetwork import BATCH_NORM, SubNetwork, resize
from ekgfx.graph import opaque as leaf
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.propagation import Operation
from ekgfx.repair.forms import FORMS, Form
from ekgfx.repair.rearranged import Rearranged, rearranged, weight_nodes

RECURRENT = ("aten.lstm", "aten.gru", "aten.rnn")


@dataclass(frozen=True)
class Offset:
    """Where an offset of the outputs can be kept. sign: -1 where it is subtracted, as a norm's mean is."""

    place: Rearranged
    sign: int = 1


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """An operator that can be refitted. input, weight, bias: the nodes; entries: what the weight consists of."""

    operation: Operation
    name: str
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    entries: Rearranged
    form: Form
    offset: Offset | None

    @property
    def node(self) -> fx.Node:
        return self.operation.node


@dataclass(frozen=True)
class Skipped:
    """An operator that is left as it is, and why."""

    name: str
    reason: str


def find_operators(
    network: SubNetwork, among: Collection[str] | None = None
) -> tuple[list[LinearOperator], list[Skipped]]:
    """The operators of a sub-network (of these names) that can be refitted, in order, and those that cannot be."""
    graph = network.graph
    constant = set(weight_nodes(graph))
    values = network.follow(weight_nodes(graph), {}, {}, {})
    found: list[LinearOperator] = []
    skipped: list[Skipped] = []
    for operation in graph.operations:
        if operation.effect.macs and operation.node not in constant and (among is None or operation.name in among):
            made = _operator(network, operation, constant, values)
            if isinstance(made, LinearOperator):
                found.append(made)
            elif made is not None:
                skipped.append(Skipped(operation.module or operation.name, made))
    others = _other_readers(graph, found, constant)
    kept = []
    for operator in found:
        reason = _conflict(operator, found, others)
        if reason is None:
            kept.append(operator)
        else:
            skipped.append(Skipped(operator.name, reason))
    return _with_common_offsets(kept), skipped


def _operator(
    network: SubNetwork, operation: Operation, constant: set[fx.Node], values: Mapping[str, Any]
) -> LinearOperator | str | None:
    """The operator; or why it cannot be refitted; or None, where that is no loss."""
    graph, op = network.graph, str(operation.target)
    if operation.target is leaf.OPERATOR:
        return "it runs as a leaf"
    if op.startswith(RECURRENT):
        return "a recurrent layer: its output is not linear in its weights"

    def is_weight(name: str) -> bool:
        return operation.args.get(name) in constant

    tensors = {n: v for n, v in operation.args.items() if isinstance(v, fx.Node)}
    if not any(node in constant for node in tensors.values()):
        summed = (axis for each in operation.effect.sums for axis in _summed(graph, operation, *each))
        cut = any(axis in network.kept for axis in summed)
        return "a product of activations: no weight can answer for what is cut of its sum" if cut else None
    if op not in FORMS:
        return f"no form is known for {op}"
    args = resize(operation, dict(operation.args), network.kept)
    args |= {n: values[v.name] if v in constant else v.meta["val"] for n, v in tensors.items()}
    use = FORMS[op](args, is_weight)
    if use is None:
        return f"{op} with such arguments is not known"
    weight, source = operation.args[use.weight], operation.args[use.input]
    if weight not in constant or source in constant:
        return "its weight is computed from activations"
    entries = rearranged(network, weight)
    if entries is None:
        return "its weight is computed from parameters"
    name = entries.names[0].removesuffix(".weight")
    bias = operation.args.get(use.bias) if use.bias else None
    if bias is not None and bias not in constant:
        return "its bias is computed from activations"
    offset = _offset(network, operation, bias, constant, entries.names)
    return LinearOperator(operation, name, source, weight, bias, entries, use.form, offset)


def _summed(graph: AxisGraph, operation: Operation, name: str, which: int | None, dim: int) -> Iterable[Any]:
    node = operation.args[name] if which is None else operation.args[name][which]
    return axes(graph.tensors[node.name][0][dim]) if isinstance(node, fx.Node) else ()


def _offset(
    network: SubNetwork, operation: Operation, bias: Any, constant: set[fx.Node], names: Iterable[str]
) -> Offset | None:
    """The operator's own bias; else what is added to its output alone; else the mean of a norm that follows alone.

    names: of the parameters that the weight is made of.
    """
    graph = network.graph
    if isinstance(bias, fx.Node):
        place = rearranged(network, bias)
        uses = [node for name in names for node in readers(graph, name, constant)]
        return Offset(place) if place is not None and _only_reader(graph, place, uses, constant) else None
    users = list(operation.node.users)
    following = graph.operation(users[0]) if len(users) == 1 else None
    if following is None:
        return None
    if following.target is BATCH_NORM and not following.args["training"]:
        node, sign = following.args["running_mean"], -1
    elif str(following.target) == "aten.add.Tensor" and following.args["alpha"] == 1:
        node, sign = next((following.args[n] for n in ("self", "other") if following.args[n] in constant), None), 1
    else:
        return None
    if not isinstance(node, fx.Node) or node not in constant:
        return None
    place = rearranged(network, node)
    if place is None or not _only_reader(graph, place, [following.node], constant):
        return None
    return Offset(place, sign)


def _only_reader(graph: AxisGraph, place: Rearranged, nodes: list[fx.Node], constant: set[fx.Node]) -> bool:
    """Whether the parameters are read by these operators alone."""
    return all(set(readers(graph, name, constant)) <= set(nodes) for name in place.names)


def readers(graph: AxisGraph, parameter: str, constant: set[fx.Node]) -> list[fx.Node]:
    """The operators on activations that read a parameter, as it stands or through others on weights."""
    todo = [n for n in graph.graph.nodes if n.op == "placeholder" and graph.weights.get(n.name) == parameter]
    found, seen = [], set(todo)
    while todo:
        for user in todo.pop().users:
            if user not in constant:
                found.append(user)
            elif user not in seen:
                seen.add(user)
                todo.append(user)
    return found


def _other_readers(graph: AxisGraph, found: list[LinearOperator], constant: set[fx.Node]) -> dict[str, list[fx.Node]]:
    """Parameter → its readers that are none of the operators in `found`."""
    ours = {operator.node for operator in found}
    others: dict[str, list[fx.Node]] = defaultdict(list)
    for name in {name for operator in found for name in operator.entries.names}:
        others[name] = [node for node in readers(graph, name, constant) if node not in ours]
    return others


def _conflict(operator: LinearOperator, found: list[LinearOperator], others: Mapping[str, list[fx.Node]]) -> str | None:
    """Why the weight must not be changed for this operator's sake, if so."""
    for name in operator.entries.names:
        if others[name]:
            return f"its weight is read by {others[name][0].name} as well"
    for other in found:
        alike = other.entries.same(operator.entries) and other.form == operator.form
        if not alike and other is not operator and other.entries.overlaps(operator.entries):
            return f"its weight is used by {other.node.name} in another way"
    return None


def _with_common_offsets(found: list[LinearOperator]) -> list[LinearOperator]:
    """Operators that share a weight have an offset only where they share its place as well."""

    def common(operator: LinearOperator) -> bool:
        own = operator.offset
        return own is not None and all(
            other.offset is not None and other.offset.place.same(own.place)
            for other in found
            if other.entries.same(operator.entries)
        )

    return [operator if common(operator) else replace(operator, offset=None) for operator in found]


def shifted(
    operator: LinearOperator, weights: Mapping[str, Tensor], change: Tensor, offset: Tensor | None
) -> dict[str, Tensor]:
    """The parameters that change where `change` is added to the weight and `offset` to the output."""
    weight = operator.entries.read(weights)
    matrix = operator.form.matrix(weight).to(change) + change
    new = operator.entries.written(weights, operator.form.weight(matrix, weight))
    if offset is not None and operator.offset is not None:
        place = operator.offset
        whole = {**weights, **new}
        old = place.place.read(whole)
        new |= place.place.written(whole, old.to(offset) + place.sign * offset.reshape(old.shape))
    return new
