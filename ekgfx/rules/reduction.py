"""Operators that sum up or rank positions along a dimension."""

from ekgfx.axes import ONE, Dims, fixed
from ekgfx.rules.registry import Call, Effect, rule


def _reduced(call: Call) -> list[int]:
    rank, dim = len(call["self"]), call.args.get("dim")
    if dim is None or dim == []:
        return list(range(rank))
    return [d % rank for d in (dim if isinstance(dim, list) else [dim])]


@rule(
    "aten.mean.dim",
    "aten.mean.default",
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
)
def statistic(call: Call) -> Effect:
    """Means, variances, norms and extremes, as hand-written normalizations use them: taken over the kept positions."""
    return _over(call, call["self"], statistics=True)


@rule(
    "aten.sum.dim_IntList",
    "aten.sum.default",
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
    """The result grows with the number of positions, or names one of them: the reduced dimensions freeze."""
    x = call["self"]
    call.freeze(*(x[d] for d in _reduced(call)), why="reduced over")
    return _over(call, x, statistics=False)


def _over(call: Call, x: Dims, statistics: bool) -> Effect:
    gone, keepdim = _reduced(call), bool(call.args.get("keepdim", False))
    out = tuple(ONE if d in gone else dim for d, dim in enumerate(x) if keepdim or d not in gone)
    statistics = statistics and not all(fixed(x[d]) for d in gone)
    return Effect([out] * len(call.shapes) if len(call.shapes) > 1 else out, statistics=statistics)


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
