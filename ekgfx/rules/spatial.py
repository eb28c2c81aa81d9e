"""Operators over space: pooling, interpolation, padding. Channels pass, space is frozen."""

from ekgfx.axes import ONE, Dims, Expr, Prod, Sum, fixed
from ekgfx.rules.registry import Call, Effect, rule


def _over_space(call: Call, x: Dims, rank: int) -> Dims:
    lead = x[: len(x) - rank]
    call.freeze(*x[len(lead) :], why="space")
    return (*lead, *(ONE if n == 1 else call.space(n) for n in call.shape[len(lead) :]))


def _pooling(rank: int, *ops: str) -> None:
    @rule(*ops)
    def pooling(call: Call) -> Effect:
        x = call.tensors()[0]
        among = _among_channels(call, x, rank)
        out = _over_space(call, x, rank) if among is None else among
        return Effect([out] * len(call.shapes) if len(call.shapes) > 1 else out, statistics=among is not None)


def _among_channels(call: Call, x: Dims, rank: int) -> Dims | None:
    """A window that slides over the channels of (N, 1, channels, *space) position by position, as local response
    normalization has it: a mean over the neighbours among the kept ones. None for any other pooling.

    Around the channels lie the positions where no window has its middle, padding in general: they stay.
    """
    channels, others = x[len(x) - rank], x[len(x) - rank + 1 :]
    if len(x) <= rank or x[-rank - 1].size > 1 or fixed(channels) or not call.op.startswith("aten.avg_pool"):
        return None
    window, stride, padding = (
        each if len(each := call[name] or call["kernel_size"]) > 1 else each * rank
        for name in ("kernel_size", "stride", "padding")
    )
    if window[1:] != [1] * len(others) or stride != [1] * rank or any(padding) or call["ceil_mode"]:
        return None
    before, middle, after = (call.fresh(n) for n in (window[0] // 2, call.shape[-rank], (window[0] - 1) // 2))
    call.unify(channels, Sum((before, middle, after)))
    call.freeze(before, after, why="where windows end")
    return (*x[:-rank], middle, *others)


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


@rule("aten.max_unpool2d.default", "aten.max_unpool3d.default")
def max_unpool(call: Call) -> Effect:
    """Values go back to where a pooling found them: positions of space, in each channel's own."""
    x, rank = call["self"], len(call["output_size"])
    for a, b in zip(x, call["indices"], strict=True):
        call.unify(a, b)
    return Effect(_over_space(call, x, rank))


@rule("torchvision.roi_align.default", "torchvision.roi_pool.default")
def regions(call: Call) -> Effect:
    """input (N, C, *space), boxes (K, 5) with the number of their image in front → (K, C, *size)."""
    x, boxes = call["input"], call["rois"]
    call.freeze(*x[2:], *boxes[1:], why="space")
    out = (boxes[0], x[1], *call.constants(call.shape[2:], "size of a region"))
    return Effect([out] * len(call.shapes) if len(call.shapes) > 1 else out)


@rule("torchvision.ps_roi_align.default", "torchvision.ps_roi_pool.default")
def position_sensitive_regions(call: Call) -> Effect:
    """As above, with a channel for every position of a region: input (N, C·size, *space) → (K, C, *size)."""
    x, boxes = call["input"], call["rois"]
    channels = call.fresh(call.shape[1])
    call.unify(x[1], Prod((channels, call.constant(x[1].size // channels.size, "positions of a region"))))
    call.freeze(*x[2:], *boxes[1:], why="space")
    return Effect([(boxes[0], channels, *call.constants(call.shape[2:], "size of a region"))] * len(call.shapes))


@rule("aten.affine_grid_generator.default")
def affine_grid(call: Call) -> Effect:
    """theta (N, n, n + 1), `size` (N, C, *space) → (N, *space, n)."""
    theta, size = call["theta"], call["size"]
    call.freeze(*theta[1:], why="a map of coordinates")
    out = (theta[0], *map(call.space, size[2:]), call.constant(len(size) - 2, "coordinates"))
    return Effect(out, sizes={"size": [theta[0], call.constant(size[1]), *out[1:-1]]})


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
