"""What a residual sum lacks, asked of the branch that ends last.

Where an operator's output goes, through affine operators alone, into a sum with a tensor that is computed already, the
operator can answer for what that tensor lost as well: its target is its own dense output, plus the difference of the
two networks' tensors, taken back through the operators between.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ekgfx.execution.subnetwork import BATCH_NORM, SubNetwork
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.repair.rearranged import MOVES

SCALES = frozenset(f"aten.{name}.Tensor" for name in ("mul", "div", "add", "sub"))
"""Affine where the other operand is made of weights."""
LEAST_GAIN = 1e-2
"""Positions whose gain is below this share of the root mean square are not asked for more than their own output: the
little that they pass on would blow their weights up."""


@dataclass(frozen=True)
class Stream:
    """The affine operators from an output to a residual sum, and the other summand."""

    chain: tuple[fx.Node, ...]
    other: fx.Node


def find_stream(graph: AxisGraph, node: fx.Node, constant: set[fx.Node], order: Mapping[fx.Node, int]) -> Stream | None:
    """The sum that an operator's output goes into; None where there is none, or its other summand is not known yet."""
    chain, end = affine_chain(graph, node, constant)
    other = known_summand(graph, end, chain[-1] if chain else node, node, constant, order)
    return None if other is None else Stream(tuple(chain), other)


def known_summand(
    graph: AxisGraph,
    end: fx.Node | None,
    at: fx.Node,
    node: fx.Node,
    constant: set[fx.Node],
    order: Mapping[fx.Node, int],
) -> fx.Node | None:
    """What `end` adds to `at`, if it does, and if that is computed before `node`, and is of one shape with both."""
    operation = None if end is None else graph.operation(end)
    if end is None or operation is None or str(operation.target) != "aten.add.Tensor" or operation.args["alpha"] != 1:
        return None
    others = [source for source in end.all_input_nodes if source is not at and source not in constant]
    if len(others) != 1 or not order[others[0]] < order[node]:
        return None
    shape = end.meta["val"].shape
    return others[0] if others[0].meta["val"].shape == at.meta["val"].shape == shape else None


def affine_chain(graph: AxisGraph, node: fx.Node, constant: set[fx.Node]) -> tuple[list[fx.Node], fx.Node | None]:
    """The affine operators that alone read a node, one after the other; and what alone reads the last of them."""
    chain: list[fx.Node] = []
    at = node
    while len(at.users) == 1:
        (user,) = at.users
        operation = graph.operation(user)
        if operation is None:
            return chain, None
        others = [source for source in user.all_input_nodes if source is not at and source not in constant]
        name, args = str(operation.target), operation.args
        affine = (
            name in MOVES
            or (name == "aten.dropout.default" and not args["train"])
            or (operation.target is BATCH_NORM and not args["training"])
            or (name in SCALES and args["self"] is at)
            or (name in ("aten.mul.Tensor", "aten.add.Tensor") and args["other"] is at)
        )
        if others or not affine or not isinstance(user.meta.get("val"), Tensor):
            return chain, user
        chain.append(user)
        at = user
    return chain, None


def lacking(
    stream: Stream,
    node: fx.Node,
    network: SubNetwork,
    y: Tensor,
    missing: Tensor,
    values: Mapping[str, Any],
    inputs: Mapping[str, Any],
    gains: dict[Any, Tensor],
) -> Tensor:
    """What the sum lacks of its other summand (`missing`), taken back to the operator's output, which is like `y`.

    values: of the weight nodes. gains: what is known of the operators between, to be kept from batch to batch.
    """
    if not stream.chain:
        return missing
    if all(str(step.target) not in MOVES for step in stream.chain):  # position by position
        if missing.shape[1:] not in gains:
            gains[missing.shape[1:]] = _inverse(_unit(stream, node, network, missing[:1], values, inputs))
        return missing * gains[missing.shape[1:]]
    start = torch.zeros_like(y).requires_grad_()
    with torch.enable_grad():
        out = through(stream, node, network, start, values, inputs)
    known = gains.get(start.shape)
    if known is None:
        unit = _unit(stream, node, network, start.detach(), values, inputs)
        (squared,) = torch.autograd.grad(out, start, unit, retain_graph=True)
        known = gains[start.shape] = _inverse(squared.sqrt()).square()
    (back,) = torch.autograd.grad(out, start, missing)
    return back * known


def _unit(
    stream: Stream, node: fx.Node, network: SubNetwork, y: Tensor, values: Mapping[str, Any], inputs: Mapping[str, Any]
) -> Tensor:
    """The gains: what the operators between make of one, less what they make of zero."""
    ends = (through(stream, node, network, torch.full_like(y, end), values, inputs) for end in (1.0, 0.0))
    one, zero = ends
    return one - zero


def _inverse(gain: Tensor) -> Tensor:
    enough = gain.abs() > LEAST_GAIN * gain.square().mean().sqrt()
    return torch.where(enough, 1 / torch.where(enough, gain, 1), 0)


def through(
    stream: Stream, node: fx.Node, network: SubNetwork, y: Tensor, values: Mapping[str, Any], inputs: Mapping[str, Any]
) -> Tensor:
    """What the operators between make of `y`."""
    found = network.follow(stream.chain, inputs, {**values, node.name: y}, {})
    return found[stream.chain[-1].name]
