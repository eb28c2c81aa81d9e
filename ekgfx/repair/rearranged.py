"""Which entries of which parameters an operator's weight consists of.

A weight need not be a parameter as it stands: it may be transposed, reshaped, a part of a packed one or a concatenation
of several. As long as every entry is one of a parameter's, a new weight can be written back.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ekgfx.axes import axes
from ekgfx.execution.subnetwork import GraphRunner
from ekgfx.graph.axis_graph import AxisGraph

MOVES = frozenset(
    f"aten.{name}"
    for name in (  # noqa: SIM905  a list of so many strings is no easier to read
        "view.default reshape.default _unsafe_view.default flatten.using_ints unflatten.int contiguous.default "
        "clone.default alias.default detach.default lift_fresh_copy.default permute.default transpose.int t.default "
        "mT.default numpy_T.default movedim.int movedim.intlist swapaxes.default unsqueeze.default squeeze.default "
        "squeeze.dim squeeze.dims split.Tensor split_with_sizes.default chunk.default unbind.int select.int "
        "slice.Tensor narrow.default cat.default concat.default stack.default roll.default flip.default"
    ).split()
)
"""Operators whose every output entry is one of an input's."""


@dataclass(frozen=True)
class Rearranged:
    """A tensor of entries of parameters. names: the parameters'; index: for every entry its place in all of them, one
    after the other, flat; None for one parameter as it stands."""

    names: tuple[str, ...]
    index: Tensor | None = None

    def read(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The tensor."""
        if self.index is None:
            return weights[self.names[0]]
        return torch.cat([weights[name].flatten() for name in self.names])[self.index]

    def written(self, weights: Mapping[str, Tensor], value: Tensor) -> dict[str, Tensor]:
        """The parameters, with `value` in the places of the tensor."""
        if self.index is None:
            return {name: like(weights[name], value) for name in self.names}
        flat = torch.cat([weights[name].flatten() for name in self.names])
        flat[self.index.flatten()] = value.flatten().to(flat)
        parts = flat.split([weights[name].numel() for name in self.names])
        return {name: like(weights[name], part) for name, part in zip(self.names, parts, strict=True)}

    def overlaps(self, other: "Rearranged") -> bool:
        """Whether the two share an entry of a parameter."""
        if not set(self.names) & set(other.names):
            return False
        if self.names != other.names or self.index is None or other.index is None:
            return True
        return bool(torch.isin(self.index, other.index).any())

    def same(self, other: "Rearranged") -> bool:
        """Whether the two are one and the same tensor."""
        if self.names != other.names or (self.index is None) != (other.index is None):
            return False
        return self.index is None or other.index is None or torch.equal(self.index, other.index)


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """A value as a tensor of the shape, type and memory format of another."""
    return torch.empty_like(tensor, requires_grad=False).copy_(value.reshape(tensor.shape))


def weight_nodes(graph: AxisGraph) -> list[fx.Node]:
    """The nodes that are computed from weights and constants alone, in order; they are the same for every input."""
    found: dict[fx.Node, None] = {}
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            if node.name in graph.weights or node.name in graph.constants:
                found[node] = None
        elif (
            node.op == "call_function"
            and node.all_input_nodes
            and all(source in found for source in node.all_input_nodes)
            and not _depends_on_batch(graph, node)
        ):
            found[node] = None
    return list(found)


def _depends_on_batch(graph: AxisGraph, node: fx.Node) -> bool:
    return any(axis.batch for dims in graph.tensors.get(node.name, ()) for dim in dims for axis in axes(dim))


def rearranged(runner: GraphRunner, node: fx.Node) -> Rearranged | None:
    """What a node's value consists of; None where it is not a rearrangement of parameters."""
    graph, todo = runner.graph, [node]
    chain: set[fx.Node] = set()
    while todo:
        each = todo.pop()
        if each.op == "placeholder":
            name = graph.weights.get(each.name)
            if name is None or not runner.weights[name].is_floating_point():
                return None
        elif each.op != "call_function" or not (each.target is operator.getitem or str(each.target) in MOVES):
            return None
        chain.add(each)
        todo += [source for source in each.all_input_nodes if source not in chain]
    ordered = [each for each in graph.graph.nodes if each in chain]
    names = tuple(dict.fromkeys(graph.weights[each.name] for each in ordered if each.op == "placeholder"))
    if node.op == "placeholder":
        return Rearranged(names)
    numbered, start = dict[str, Tensor](), 0
    for name in names:
        weight = runner.weights[name]
        numbered[name] = torch.arange(start, start + weight.numel(), dtype=torch.float64, device=weight.device)
        numbered[name], start = numbered[name].view(weight.shape), start + weight.numel()
    values: dict[str, Any] = {n.name: numbered[graph.weights[n.name]] for n in ordered if n.op == "placeholder"}
    runner.follow([each for each in ordered if each.op != "placeholder"], {}, values, {})
    return Rearranged(names, values[node.name].long().contiguous())
