"""Positions that the example does not reach, and a longer one does: those of a table behind what a slice takes of it.

`self.position[:, : x.shape[1]]` reads as many rows as the example has tokens. The rest looks like nobody's, and the
next sentence may read it.
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ekgfx.axes import axes, freeze
from ekgfx.graph.nodes import op_name

if TYPE_CHECKING:
    from ekgfx.graph.axis_graph import AxisGraph

SLICES = ("aten.slice.Tensor", "aten.narrow.default", "aten.split_with_sizes.default", "aten.split.sizes")
OVERWRITES = "aten.slice_scatter.default"


def hold_unreached(graphs: Sequence["AxisGraph"]) -> None:
    """Freeze what is left of a dimension of which a slice takes as much as the example is long, and what no operator
    makes anything of, though it reads other positions of the same weight."""
    for graph in graphs:
        for operation in graph.operations:
            name = op_name(operation.target)
            if name not in SLICES and name != OVERWRITES:
                continue
            source = graph.dims[operation.args["self"].name]
            at = operation.args["dim"] % len(source)
            written = name == OVERWRITES
            for part in [graph.dims[operation.args["src"].name]] if written else operation.effect.outputs:
                partial = part[at].size < source[at].size
                if partial and any(axis.example or axis.batch for axis in axes(part[at])):
                    freeze(source[at], "a slice of it is as long as the example")
    results = (dims for graph in graphs for operation in graph.operations for dims in operation.effect.outputs)
    made_of = {axis for dims in results for dim in dims for axis in axes(dim)}
    places = Counter(axis for dims in graphs[0].weight_dims().values() for dim in dims for axis in axes(dim))
    for name, dims in graphs[0].weight_dims().items():
        for dim in dims:
            within = list(axes(dim))
            for axis in within if len(within) > 1 else ():
                if places[axis] == 1 and axis not in made_of:
                    freeze(axis, f"the example does not reach these positions of {name}")
