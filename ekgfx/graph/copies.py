"""Positions that are copies of one, which no layer computes: how many there are is known to the user's code alone."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ekgfx.axes import Axis, axes, freeze, resolve
from ekgfx.graph.nodes import op_name

if TYPE_CHECKING:
    from ekgfx.graph.axis_graph import AxisGraph

EXPANDING = ("aten.expand.default", "aten.broadcast_to.default")


def hold_copies(graphs: Sequence["AxisGraph"]) -> None:
    """Freeze what `expand` makes of one position where no weight computes it either: a cut would have to change a
    number in the forward (`x.expand(-1, 2)`), and nothing computes less for it."""
    computed: set[Axis] = set()
    for graph in graphs:
        for operation in graph.operations:
            if operation.effect.produces is not None:
                argument, expr = operation.effect.produces
                if graph.root_weight(operation.args[argument]) is not None:
                    computed |= set(axes(expr))
    for graph in graphs:
        for operation in graph.operations:
            if op_name(operation.target) in EXPANDING:
                for dim in operation.effect.outputs[0]:
                    axis = resolve(dim)
                    if isinstance(axis, Axis) and axis.size > 1 and not axis.frozen and axis not in computed:
                        freeze(axis, "copies of one position")
