"""Operators that sum up or rank positions along a dimension."""

from ekgfx.axes import ONE, fixed
from ekgfx.rules.pointwise import broadcast
from ekgfx.rules.registry import Call, Effect, rule


def _reduced(call: Call) -> list[int]:
    rank, dim = len(call["self"]), call.args.get("dim")
    if dim is None or dim == []:
        return list(range(rank))
    return [d % rank for d in (dim if isinstance(dim, list) else [dim])]


def _over(call: Call, statistics: bool = False, sums: bool = False) -> Effect:
    """What is left of the shape; whether a reduced dimension that can be cut makes it a statistic, or a sum."""
    x, gone, keepdim = call["self"], _reduced(call), bool(call.args.get("keepdim", False))
    out = tuple(ONE if d in gone else dim for d, dim in enumerate(x) if keepdim or d not in gone)
    cut = [d for d in gone if not fixed(x[d])]
    return Effect(
        [out] * len(call.shapes) if len(call.shapes) > 1 else out,
        statistics=statistics and bool(cut),
        sums=[("self", None, d) for d in cut if sums],
        summed=tuple(x[d] for d in gone) if sums else (),
        macs=(),
    )


@rule(
    "aten.mean.dim",
    "aten.mean.default",
    "aten.nanmean.default",
    "aten.var.dim",
    "aten.var.correction",
    "aten.var.default",
    "aten.std.dim",
    "aten.std.correction",
    "aten.std.default",
    "aten.var_mean.correction",
    "aten.var_mean.dim",
    "aten.std_mean.correction",
    "aten.std_mean.dim",
    "aten.linalg_vector_norm.default",
    "aten.linalg_norm.default",
    "aten.linalg_norm.ord_str",
    "aten.linalg_matrix_norm.default",
    "aten.linalg_matrix_norm.str_ord",
    "aten.norm.Scalar",
    "aten.norm.ScalarOpt_dim",
    "aten.norm.ScalarOpt_dim_dtype",
    "aten.frobenius_norm.dim",
    "aten.amax.default",
    "aten.amin.default",
    "aten.aminmax.default",
    "aten.max.default",
    "aten.min.default",
)
def statistic(call: Call) -> Effect:
    """Means, variances, norms and extremes, as hand-written normalizations use them: taken over the kept positions."""
    return _over(call, statistics=True)


@rule("aten.max.dim", "aten.min.dim", "aten.median.dim", "aten.nanmedian.dim")
def extreme(call: Call) -> Effect:
    """Values, and the positions where they are: a statistic, as long as nobody reads the positions."""
    if 1 in call.read:
        call.freeze(*(call["self"][d] for d in _reduced(call)), why="the position of a value in it is read")
    return _over(call, statistics=True)


@rule(
    "aten.sum.dim_IntList",
    "aten.sum.default",
    "aten.nansum.default",
    "aten.count_nonzero.dim_IntList",
    "aten.count_nonzero.default",
    "aten.any.dim",
    "aten.any.dims",
    "aten.any.default",
)
def summed(call: Call) -> Effect:
    """A sum is linear, so what is cut takes its part away and changes nothing else: the part of a zero is zero."""
    return _over(call, sums=True)


@rule("aten.cumsum.default")
def cumulated(call: Call) -> Effect:
    """Each position with the sum of those before it, of which the cut ones contribute nothing."""
    return Effect(call["self"], sums=[("self", None, call["dim"])], macs=())


@rule(
    "aten.prod.default",
    "aten.prod.dim_int",
    "aten.logsumexp.default",
    "aten.argmax.default",
    "aten.argmin.default",
    "aten.all.dim",
    "aten.all.dims",
    "aten.all.default",
)
def reduce(call: Call) -> Effect:
    """The result names a position, or a zero would change it: the reduced dimensions freeze."""
    call.freeze(*(call["self"][d] for d in _reduced(call)), why="reduced over")
    return _over(call)


@rule(
    "aten.softmax.int",
    "aten._softmax.default",
    "aten.log_softmax.int",
    "aten._log_softmax.default",
    "aten.logcumsumexp.default",
    "aten.cumprod.default",
    "aten.sort.default",
    "aten.sort.stable",
    "aten.argsort.default",
)
def along(call: Call) -> Effect:
    """Every result position depends on all positions of that dimension: it freezes."""
    x, dim = call["self"], call["dim"]
    call.freeze(x[dim])
    return Effect([x] * len(call.shapes) if len(call.shapes) > 1 else x)


@rule("aten.dist.default")
def dist(call: Call) -> Effect:
    """‖x − y‖ of all that they hold, which what is zero in both does not change."""
    broadcast(call, call["self"], call["other"])
    sums = [(name, None, d) for name in ("self", "other") for d, dim in enumerate(call[name]) if not fixed(dim)]
    if any(a.size != b.size for a, b in zip(call["self"], call["other"], strict=False)) or len(call["self"]) != len(
        call["other"]
    ):
        call.freeze(*call["self"], *call["other"], why="compared with one value")
    return Effect((), sums=sums, macs=())


@rule("aten.kthvalue.default")
def kthvalue(call: Call) -> Effect:
    """Which is the k-th depends on how many there are."""
    call.freeze(call["self"][call["dim"]])
    return _over(call)


@rule("aten.diff.default")
def diff(call: Call) -> Effect:
    """Differences of neighbours."""
    x, dim = call["self"], call["dim"] % len(call["self"])
    for dims in call.tensors():
        call.freeze(dims[dim], why="neighbours are subtracted")
    shorter = call.constant(call.shape[dim], "neighbours are subtracted")
    return Effect(tuple(shorter if d == dim else e for d, e in enumerate(x)))


@rule("aten.tril.default", "aten.triu.default")
def triangle(call: Call) -> Effect:
    call.freeze(*call["self"][-2:], why="a triangle of it is zero")
    return Effect(call["self"])


@rule("aten.topk.default")
def topk(call: Call) -> Effect:
    x, dim = call["self"], call["dim"] % len(call["self"])
    call.freeze(x[dim])
    out = tuple(call.constant(call.shape[dim]) if d == dim else e for d, e in enumerate(x))
    return Effect([out] * len(call.shapes))


@rule("aten.histc.default", "aten.bincount.default")
def histogram(call: Call) -> Effect:
    """Counts of values: every position is counted."""
    call.freeze(*call["self"], why="counted")
    return Effect(call.constants(call.shape))
