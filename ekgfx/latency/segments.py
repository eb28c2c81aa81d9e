"""Timed segments: every layer with weights (or matrix product) together with what is computed after it.

Runtimes fuse a convolution with the norm, the activation and the addition behind it, and time what they fused as one.
So the operators of a graph are divided into segments: one begins with each operator that costs MACs, and takes in all
that follows it up to the next ones. Where several come together, as in a residual sum, what follows belongs to the one
that began last: only then can it be computed. The time of a segment depends on the sizes of what it reads and writes
and on its MACs, which are expressions of the axes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from ekgfx.axes import Axis, axes
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.cost import Products, mac_products, value_of
from ekgfx.graph.propagation import Operation

START = ""
"""The segment of what is computed before the first layer with weights."""


@dataclass(frozen=True)
class Segment:
    """name: the module of its weighted layer, as profiles name it. macs: of the whole batch; read and written: elements
    that enter it from other segments and that its operators produce; signature: segments of one signature do the same
    work at the same widths."""

    name: str
    macs: Products
    read: Products
    written: Products
    signature: str

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes that its sizes depend on."""
        return tuple(dict.fromkeys(_axes(self.macs + self.read + self.written)))

    @cached_property
    def read_axes(self) -> frozenset[Axis]:
        """The axes of what it reads."""
        return frozenset(_axes(self.read))

    @cached_property
    def written_axes(self) -> frozenset[Axis]:
        """The axes of what it writes."""
        return frozenset(_axes(self.written))

    def sizes(self, counts: Mapping[Axis, int]) -> tuple[int, int, int]:
        """MACs, elements read and elements written when the axes keep `counts` positions."""
        return value_of(self.macs, counts), value_of(self.read, counts), value_of(self.written, counts)


def find_segments(graph: AxisGraph) -> dict[str, Segment]:
    """The segments of a graph by name, in the order in which they begin."""
    place: dict[fx.Node, str] = {}
    members: dict[str, list[Operation]] = {START: []}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        operation = graph.operation(node)
        before = latest((place[source] for source in node.all_input_nodes if source in place), list(members))
        starts = operation is not None and mac_products(graph, operation)
        place[node] = _name(graph, operation) if starts and operation is not None else before
        if operation is not None:
            members.setdefault(place[node], []).append(operation)
    return {name: _segment(graph, name, operations, place) for name, operations in members.items()}


def latest(segments: Iterable[str], begun: Sequence[str]) -> str:
    """The one of `segments` that began last, START where there is none. begun: all so far, in the order in which they
    began."""
    return max(segments, key=begun.index, default=START)


def _name(graph: AxisGraph, operation: Operation) -> str:
    """The module that holds the operator's weight, as the exporter names its node; else the module that runs it."""
    weight = graph.root_weight(operation.args.get("weight"))
    if weight is not None and weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    return operation.module


def _segment(graph: AxisGraph, name: str, operations: list[Operation], place: Mapping[fx.Node, str]) -> Segment:
    macs: Products = []
    read: dict[str, tuple] = {}
    written: Products = []
    kinds = []
    for operation in operations:
        products = mac_products(graph, operation)
        macs += products
        written += _tensors(graph, operation.node)
        for source in operation.node.all_input_nodes:
            if source.name in graph.inputs or place.get(source, name) != name:
                read.update((source.name, dims) for dims in _tensors(graph, source))
        weights = [graph.dims[s.name] for s in operation.node.all_input_nodes if s.name in graph.weights]
        shapes = [tuple(dim.size for dim in dims) for dims in (*_tensors(graph, operation.node), *weights)]
        kinds.append(f"{operation.target}{shapes}")
    return Segment(
        name, macs, list(read.values()), written, f"{[tuple(dim.size for dim in d) for d in read.values()]}{kinds}"
    )


def _tensors(graph: AxisGraph, node: fx.Node) -> list[tuple]:
    return [tuple(dims) for dims in graph.tensors.get(node.name, ())]


def _axes(products: Products) -> Iterator[Axis]:
    return (axis for product in products for expr in product for axis in axes(expr))
