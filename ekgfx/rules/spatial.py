"""Operators over space: pooling, interpolation, padding. Channels pass, space is frozen."""

from ekgfx.axes import ONE, Dims, Expr, Sum, fixed
from ekgfx.rules.registry import Call, Effect, rule


def _over_space(call: Call, x: Dims, rank: int) -> Dims:
    lead = x[: len(x) - rank]
    call.freeze(*x[len(lead) :], why="space")
    return (*lead, *(ONE if n == 1 else call.constant(n, "space") for n in call.shape[len(lead) :]))


def _pooling(rank: int, *ops: str) -> None:
    @rule(*ops)
    def pooling(call: Call) -> Effect:
        x = call.tensors()[0]
        out = _over_space(call, x, rank)
        return Effect([out] * len(call.shapes) if len(call.shapes) > 1 else out)


for _rank in (1, 2, 3):
    _pooling(
        _rank,
        f"aten.avg_pool{_rank}d.default",
        f"aten.max_pool{_rank}d.default",
        f"aten.max_pool{_rank}d_with_indices.default",
        f"aten.adaptive_avg_pool{_rank}d.default",
        *([f"aten._adaptive_avg_pool{_rank}d.default"] if _rank > 1 else []),
        f"aten.adaptive_max_pool{_rank}d.default",
    )
_pooling(
    1,
    "aten.upsample_nearest1d.vec",
    "aten.upsample_linear1d.vec",
    "aten.upsample_nearest1d.default",
    "aten.upsample_linear1d.default",
)
_pooling(
    2,
    *(f"aten.upsample_{mode}2d.{form}" for mode in ("nearest", "bilinear", "bicubic") for form in ("vec", "default")),
    *(f"aten._upsample_{mode}2d_aa.{form}" for mode in ("bilinear", "bicubic") for form in ("vec", "default")),
    *(f"aten._upsample_nearest_exact2d.{form}" for form in ("vec", "default")),
)
_pooling(
    3,
    "aten.upsample_nearest3d.vec",
    "aten.upsample_trilinear3d.vec",
    "aten.upsample_nearest3d.default",
    "aten.upsample_trilinear3d.default",
)


@rule("aten.grid_sampler.default", "aten.grid_sampler_2d.default", "aten.grid_sampler_3d.default")
def grid_sampler(call: Call) -> Effect:
    x, grid = call["input"], call["grid"]
    call.unify(x[0], grid[0])
    call.freeze(*x[2:], *grid[1:], why="space")
    return Effect((x[0], x[1], *grid[1:-1]))


@rule(
    "aten.pad.default",
    "aten.constant_pad_nd.default",
    "aten.reflection_pad2d.default",
    "aten.replication_pad2d.default",
)
def pad(call: Call) -> Effect:
    """Constant padding: any number of the padded positions may go, Sum(before, dim, after), and `pad` is recomputed.

    A fixed dimension (space) keeps its padding. Other modes copy positions, and a negative amount crops: frozen.
    """
    x, amounts = call["self"], call["pad" if "pad" in call.args else "padding"]
    constant = call.args.get("mode", "constant" if "value" in call.args else "other") == "constant"
    out: list[Expr] = list(x)
    sizes: list[Expr] = []
    for d, before, after in zip(range(len(x) - 1, -1, -1), amounts[::2], amounts[1::2], strict=False):
        if not (before or after):
            sizes += [Sum(()), Sum(())]
        elif constant and min(amounts) >= 0:
            new = [(call.constant if fixed(x[d]) else call.fresh)(n) for n in (before, after)]
            out[d] = Sum((new[0], x[d], new[1]))
            sizes += new
        else:
            call.freeze(x[d], why="padded")
            out[d] = call.constant(call.shape[d], "padded")
    return Effect(tuple(out), sizes={"pad": sizes} if constant and min(amounts) >= 0 else {})
