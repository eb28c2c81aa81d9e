"""Which operator of a cut module is the first to compute something else than the sliced graph.

Shapes and arguments do not tell everything: Python may make a tensor's numbers of a width, or shift by one.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ekgfx.axes import Axis
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.propagation import Operation
from ekgfx.graph.ways import undisturbed
from ekgfx.surgery.check import Reader

ROUNDING = {torch.float64: 1e-10, torch.float32: 1e-5}


def diverging(
    graph: AxisGraph, kept: Mapping[Axis, Tensor], weights: Mapping[str, Tensor], again: AxisGraph
) -> Operation | None:
    """The operator of the sliced graph whose value is the first that is not that of the cut module.

    again: the cut module, traced anew; it runs the same operators. None where no value differs, or one cannot be run.
    """
    ours, theirs = _Noting(graph, kept, weights=weights), _Noting(again, {})
    for network in (ours, theirs):
        missing = contextlib.suppress(Exception)  # what was noted until then may be enough
        with missing, torch.no_grad(), graph.way.entered(again.model), undisturbed(again.model):
            network.run(*graph.example)
    for old, new in zip(Reader(graph).operations, Reader(again).operations, strict=False):
        wanted, found = ours.noted.get(old.name, []), theirs.noted.get(new.name, [])
        if any(not a.agrees(b) for a, b in zip(wanted, found, strict=False)):
            return old
    return None


class _Noting(SubNetwork):
    """Notes a number of every value: equal values have equal ones, others hardly ever."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.noted: dict[str, list[_Note]] = {}

    def compute(self, operation: Operation, *args: Any) -> Any:
        value = super().compute(operation, *args)
        self.noted[operation.name] = [_note(t) for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]
        return value


@dataclass(frozen=True)
class _Note:
    """number: the sum of a tensor, weighted differently at every place. rounding: by how much it may be off."""

    number: float
    rounding: float

    def agrees(self, other: "_Note") -> bool:
        if math.isnan(self.number) or math.isnan(other.number):
            return math.isnan(self.number) and math.isnan(other.number)
        return self.number == other.number or abs(self.number - other.number) <= self.rounding


def _note(value: Tensor) -> _Note:
    numbers = (torch.view_as_real(value) if value.is_complex() else value).flatten().double()
    weighted = numbers * torch.linspace(1, 2, len(numbers), dtype=torch.float64, device=value.device)
    rounding = ROUNDING.get(value.dtype, 0.05) if value.is_floating_point() or value.is_complex() else 0.0
    return _Note(weighted.sum().item(), rounding * weighted.abs().sum().item())
