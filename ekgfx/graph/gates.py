"""Where the importance of a group's channels is read: behind what leaves each channel to itself."""

from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem

from torch import Tensor, fx

from ekgfx.axes import Axis, axes, membership
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.propagation import Operation

CONVOLUTIONS = "aten.conv"
CHANNEL_NORMS = frozenset({"aten.batch_norm.default", "aten.instance_norm.default"})
"""Norms whose statistics are those of each channel alone."""


@dataclass(frozen=True)
class Gate:
    """An activation that carries a group once all that belongs to its producers (norm, activation, addition) is done.

    node: name of the graph node; dim: the dimension that carries the group; index: for every position along `dim` the
    channel of the group that it stands for, -1 for none.
    """

    node: str
    dim: int
    index: Tensor


def gates_of(graph: AxisGraph, axis: Axis, producers: list[Operation]) -> tuple[Gate, ...]:
    nodes = dict.fromkeys(end for operation in producers for end in _ends_of_chain(graph, axis, operation.node))
    gates = []
    for node in nodes:
        for d, dim in enumerate(graph.dims.get(node.name, ())):
            if axis in set(axes(dim)):
                gates.append(Gate(node.name, d, membership(dim, axis)))
                break
    return tuple(gates)


def _ends_of_chain(graph: AxisGraph, axis: Axis, node: fx.Node) -> Iterator[fx.Node]:
    """Follow a producer's value through operators that leave its channels apart, up to where others or several read it.

    Where all that reads it leads to norms of single channels, the ends are behind these: such a norm takes a
    channel's scale away, so that Σ (∂ℛ/∂y)·y, the derivative by that scale, is zero for all that comes before it.

    Of a producer with several outputs (a recurrent layer) it is the first that counts.
    """
    if node.name not in graph.dims:
        node = next((user for user in node.users if user.target is getitem and user.args[1] == 0), node)
    while len(node.users) == 1:
        (user,) = node.users
        operation = graph.operation(user)
        own = operation is not None and (operation.effect.carries or str(operation.target).startswith(CONVOLUTIONS))
        if not own or not _leaves_apart(graph, axis, node, user):
            break
        node = user
    norms = _norms_behind(graph, axis, node)
    for norm in norms:
        yield from _ends_of_chain(graph, axis, norm)
    if not norms:
        yield node


def _leaves_apart(graph: AxisGraph, axis: Axis, value: fx.Node, node: fx.Node) -> bool:
    """Whether each channel of a value goes on by itself in an operator that reads it. A convolution may have kernels of
    their own for the channels (a depthwise one, or one of as many groups)."""
    operation = graph.operation(node)
    if operation is None or node.name not in graph.dims:
        return False
    weight = operation.args.get("weight")
    if str(operation.target).startswith(CONVOLUTIONS) and isinstance(weight, fx.Node):
        summed = set(axes(graph.dims[weight.name][1]))
        return operation.args["input"] is value and axis not in summed
    return operation.effect.produces is None and any(axis in set(axes(dim)) for dim in graph.dims[node.name])


def _norms_behind(graph: AxisGraph, axis: Axis, node: fx.Node) -> list[fx.Node]:
    """The norms of single channels that a value leads to, channel by channel; none where it leads elsewhere, too."""
    norms, seen, left = dict[fx.Node, None](), {node}, [node]
    while left:
        value = left.pop()
        if not value.users:
            return []
        for user in value.users:
            if not _leaves_apart(graph, axis, value, user):
                return []
            if str(user.target) in CHANNEL_NORMS:
                norms[user] = None
            elif user not in seen:
                seen.add(user)
                left.append(user)
    return list(norms)
