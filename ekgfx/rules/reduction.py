"""Operators that sum up or rank positions along a dimension."""

from ekgfx.axes import ONE, Dims
from ekgfx.rules.registry import Call, Effect, rule


def _reduced(call: Call) -> list[int]:
    rank, dim = len(call["self"]), call.args.get("dim")
    if dim is None or dim == []:
        return list(range(rank))
    return [d % rank for d in (dim if isinstance(dim, list) else [dim])]


def _without(dims: Dims, gone: list[int], keepdim: bool) -> Dims:
    return tuple(ONE if d in gone else e for d, e in enumerate(dims) if keepdim or d not in gone)


@rule(
    "aten.mean.dim",
    "aten.mean.default",
    "aten.sum.dim_IntList",
    "aten.sum.default",
    "aten.var.dim",
    "aten.var.correction",
    "aten.var.default",
    "aten.std.dim",
    "aten.std.correction",
    "aten.var_mean.correction",
    "aten.var_mean.dim",
    "aten.linalg_vector_norm.default",
    "aten.norm.ScalarOpt_dim",
    "aten.amax.default",
    "aten.amin.default",
    "aten.max.dim",
    "aten.min.dim",
    "aten.max.default",
    "aten.min.default",
    "aten.prod.dim_int",
    "aten.logsumexp.default",
    "aten.argmax.default",
    "aten.argmin.default",
    "aten.any.dim",
    "aten.all.dim",
)
def reduce(call: Call) -> Effect:
    """The result is taken over all positions of the reduced dimensions: they freeze."""
    x, gone = call["self"], _reduced(call)
    call.freeze(*(x[d] for d in gone), why="reduced over")
    out = _without(x, gone, bool(call.args.get("keepdim", False)))
    return Effect([out] * len(call.shapes) if len(call.shapes) > 1 else out)


@rule(
    "aten.softmax.int",
    "aten._softmax.default",
    "aten.log_softmax.int",
    "aten._log_softmax.default",
    "aten.cumsum.default",
    "aten.cumprod.default",
    "aten.sort.default",
    "aten.argsort.default",
)
def along(call: Call) -> Effect:
    """Every result position depends on all positions of that dimension: it freezes."""
    x, dim = call["self"], call["dim"]
    call.freeze(x[dim])
    return Effect([x] * len(call.shapes) if len(call.shapes) > 1 else x)


@rule("aten.topk.default")
def topk(call: Call) -> Effect:
    x, dim = call["self"], call["dim"] % len(call["self"])
    call.freeze(x[dim])
    out = tuple(call.constant(call.shape[dim]) if d == dim else e for d, e in enumerate(x))
    return Effect([out] * len(call.shapes))
