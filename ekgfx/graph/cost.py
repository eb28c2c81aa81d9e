"""What a network costs, as an expression: multiply-accumulates and parameters of any plan, without running it.

The MACs of an operator are a sum of products of dimension sizes, so its rule writes them as tuples of expressions; with
the kept counts of the axes put in, they are the MACs of the pruned operator.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import mul

from ekgfx.axes import Axis, Expr, count
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.propagation import Operation

Products = list[tuple[Expr, ...]]


@dataclass(frozen=True)
class Cost:
    """MACs per sample (multiplications of convolutions, linear layers, attention, matrix products) and parameters."""

    macs: int
    params: int


def mac_table(graph: AxisGraph) -> dict[str, Products]:
    """Node name → MACs of the operator as products of expressions, for every operator that costs any."""
    return {op.name: products for op in graph.operations if (products := mac_products(graph, op))}


def mac_products(graph: AxisGraph, operation: Operation) -> Products:
    """The MACs of one operator over the whole batch, as products of expressions (empty: it costs none)."""
    return list(operation.effect.macs or ())


def value_of(products: Products, counts: Mapping[Axis, int]) -> int:
    """The value of a sum of products when the axes keep `counts` positions."""
    return sum(reduce(mul, (count(e, counts) for e in product), 1) for product in products)


def cost_of(graph: AxisGraph, table: Mapping[str, Products], counts: Mapping[Axis, int]) -> Cost:
    """The cost per sample when every axis keeps `counts[axis]` positions; `table` is the graph's `mac_table`."""
    counts = {**counts, graph.batch: 1}
    macs = sum(value_of(products, counts) for products in table.values())
    dims = graph.weight_dims()
    params, seen = 0, set()
    for name, parameter in graph.model.named_parameters():
        if id(parameter) in seen or name in graph.gone:
            continue
        seen.add(id(parameter))
        params += value_of([dims[name]], counts) if name in dims else parameter.numel()
    return Cost(macs, params)
