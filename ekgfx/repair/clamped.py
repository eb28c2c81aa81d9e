"""What an activation does not pass on is not asked of an operator.

Where an output goes, through affine operators and perhaps a residual sum, into an activation that is constant beyond a
bound, as ReLU is below zero, it does not matter how far beyond the bound it is. So where the target is beyond it, an
output lacks only what it is short of the bound. That is no linear equation any more, but a convex one: its minimum is
approached by solving the linear one anew for what is lacking so.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.repair.rearranged import MOVES
from ekgfx.repair.targets import LEAST_GAIN, Stream, affine_chain, known_summand, through

Bounds = tuple[float, float]


def _given(low: str, high: str) -> Callable[[Mapping[str, Any]], Bounds | None]:
    def bounds(args: Mapping[str, Any]) -> Bounds | None:
        ends = (args.get(low), args.get(high))
        if not all(end is None or isinstance(end, int | float) for end in ends):
            return None
        return -math.inf if ends[0] is None else float(ends[0]), math.inf if ends[1] is None else float(ends[1])

    return bounds


FLAT: dict[str, Callable[[Mapping[str, Any]], Bounds | None]] = {
    "aten.relu.default": lambda args: (0.0, math.inf),
    "aten.relu6.default": lambda args: (0.0, 6.0),
    "aten.hardtanh.default": _given("min_val", "max_val"),
    "aten.clamp.default": _given("min", "max"),
    "aten.clip.default": _given("min", "max"),
    "aten.threshold.default": _given("threshold", ""),
    "aten.clamp_min.default": _given("min", ""),
    "aten.clamp_max.default": _given("", "max"),
    "aten.hardsigmoid.default": lambda args: (-3.0, 3.0),
    "aten.hardswish.default": lambda args: (-3.0, math.inf),
}
"""Activations that are constant below the first bound and above the second."""


@dataclass(frozen=True)
class Clamp:
    """The affine operators from an output to an activation, what is added to them (None: nothing), and the bounds."""

    chain: tuple[fx.Node, ...]
    other: fx.Node | None
    low: float
    high: float


def find_clamp(graph: AxisGraph, node: fx.Node, constant: set[fx.Node], order: Mapping[fx.Node, int]) -> Clamp | None:
    """The activation that alone reads an operator's output, where that is position by position; None: there is none,
    or a summand is not known yet."""
    chain, end = affine_chain(graph, node, constant)
    other = known_summand(graph, end, chain[-1] if chain else node, node, constant, order)
    if other is not None and end is not None:
        end = next(iter(end.users)) if len(end.users) == 1 else None
    operation = None if end is None else graph.operation(end)
    if operation is None or any(str(step.target) in MOVES for step in chain):
        return None
    bounds = FLAT.get(str(operation.target), lambda args: None)(operation.args)
    return None if bounds is None else Clamp(tuple(chain), other, *bounds)


def line(
    clamp: Clamp, node: fx.Node, network: SubNetwork, y: Tensor, constants: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """The gain and the rest of what the activation gets, gain · output + rest, like an output `y`."""
    rest, gain = torch.zeros_like(y[:1]), torch.ones_like(y[:1])
    if clamp.chain:
        zero, one = (through(Stream(clamp.chain, node), node, network, end, constants, {}) for end in (rest, gain))
        gain, rest = one - zero, zero
    return gain.expand_as(y), rest.expand_as(y) if clamp.other is None else rest + values[clamp.other.name]


def asked(clamp: Clamp, r: Tensor, t: Tensor, gain: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """What outputs t − r lack of what they should be, t, as far as the activation passes it on; and where it does.
    Positions that a gain of about zero leads to are asked for all."""
    enough = gain.abs() > LEAST_GAIN * gain.square().mean().sqrt()
    wanted, found = gain * t + rest, gain * (t - r) + rest
    below, above = wanted <= clamp.low, wanted >= clamp.high
    bound = torch.where(below, found.clamp(max=clamp.low), found.clamp(min=clamp.high))
    lacks = torch.where(enough & (below | above), (bound - found) / torch.where(enough, gain, 1), r)
    hidden = enough & ((below & (found <= clamp.low)) | (above & (found >= clamp.high)))
    return lacks, ~hidden
