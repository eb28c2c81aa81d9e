"""What a network costs, as an expression: multiply-accumulates and parameters of any plan, without running it.

The MACs of an operator are a sum of products of dimension sizes, so they are written as tuples of expressions; with the
kept counts of the axes put in, they are the MACs of the pruned operator.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Any

from ekgfx.axes import ONE, Axis, Expr, axes, count
from ekgfx.graph import AxisGraph, Operation

Products = list[tuple[Expr, ...]]


@dataclass(frozen=True)
class Cost:
    """MACs per sample (multiplications of convolutions, linear layers, attention, matrix products) and parameters."""

    macs: int
    params: int


def _convolution(a: dict[str, Any], out: tuple[Expr, ...]) -> Products:
    return [(*out, *a["weight"][1:])]


def _transposed_convolution(a: dict[str, Any], out: tuple[Expr, ...]) -> Products:
    return [(*a["input"], *a["weight"][1:])]


def _linear(a: dict[str, Any], out: tuple[Expr, ...]) -> Products:
    return [(*out, a["weight"][-1])]


def _product(a: dict[str, Any], out: tuple[Expr, ...]) -> Products:
    first = next(
        a[name] for name in ("mat1", "batch1", "self", "input") if name in a and (name != "self" or "mat1" not in a)
    )
    return [(*out, first[-1])]


def _attention(a: dict[str, Any], out: tuple[Expr, ...]) -> Products:
    lead = (*out[:-1], a["key"][-2])
    return [(*lead, a["query"][-1]), (*lead, out[-1])]


def _einsum(a: dict[str, Any], out: tuple[Expr, ...]) -> Products:
    letters: dict[str, Expr] = {}
    for term, dims in zip(a["equation"].replace(" ", "").partition("->")[0].split(","), a["tensors"], strict=True):
        if "." in term:
            return [(*out, *dims[-1:])]
        letters.update(zip(term, dims, strict=True))
    return [tuple(letters.values())]


def _recurrent(a: dict[str, Any], out: tuple[Expr, ...]) -> Products:
    return [(*out[:-1], *weight) for weight in a["params"] if len(weight) == 2]


def _leaf(a: dict[str, Any], out: tuple[Expr, ...]) -> Products:
    """What was counted when the module ran on the example, for a batch of any size."""
    batch = next((t[0] for t in a["inputs"] if t and any(axis.batch for axis in axes(t[0]))), ONE)
    return [(batch, Axis(a["macs"] // batch.size))] if a["macs"] else []


MACS: dict[str, Callable[[dict[str, Any], tuple[Expr, ...]], Products]] = {
    **{f"aten.conv{n}d.{form}": _convolution for n in (1, 2, 3) for form in ("default", "padding")},
    "aten.conv_transpose1d.default": _transposed_convolution,
    "aten.conv_transpose2d.input": _transposed_convolution,
    "aten.conv_transpose3d.input": _transposed_convolution,
    "aten.linear.default": _linear,
    **{f"aten.{name}.default": _product for name in ("matmul", "mm", "bmm", "mv", "addmm", "baddbmm")},
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.einsum.default": _einsum,
    **{f"aten.{name}.input": _recurrent for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
    "ekgfx.leaf.default": _leaf,
}


def mac_table(graph: AxisGraph) -> dict[str, Products]:
    """Node name → MACs of the operator as products of expressions, for every operator that costs any."""
    return {op.name: products for op in graph.operations if (products := mac_products(graph, op))}


def mac_products(graph: AxisGraph, operation: Operation) -> Products:
    """The MACs of one operator over the whole batch, as products of expressions (empty: it costs none)."""
    formula = MACS.get(str(operation.target))
    if formula is None:
        return []
    dims = {name: graph.symbolic(value) for name, value in operation.args.items()}
    out = graph.dims[operation.name]
    return formula(dims, out[0] if isinstance(out, list) else out)


def evaluate(products: Products, counts: Mapping[Axis, int]) -> int:
    """The value of a sum of products when the axes keep `counts` positions."""
    return sum(reduce(mul, (count(e, counts) for e in product), 1) for product in products)


def cost_of(graph: AxisGraph, table: Mapping[str, Products], counts: Mapping[Axis, int]) -> Cost:
    """The cost per sample when every axis keeps `counts[axis]` positions; `table` is the graph's `mac_table`."""
    counts = {**counts, graph.batch: 1}
    macs = sum(evaluate(products, counts) for products in table.values())
    dims = graph.weight_dims()
    params, seen = 0, set()
    for name, parameter in graph.model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        params += evaluate([dims[name]], counts) if name in dims else parameter.numel()
    return Cost(macs, params)
