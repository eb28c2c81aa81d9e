"""Operators that rearrange positions: reshape, permute, expand, repeat and their kin."""

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul

from ekgfx.axes import ONE, Dims, Expr, Prod, axes, resolve
from ekgfx.rules.registry import Call, Effect, Shape, rule


def runs(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Group two shapes of equal product into the shortest runs of equal product, from the left.

    >>> list(runs((2, 12, 5), (2, 3, 4, 5)))
    [(slice(0, 1), slice(0, 1)), (slice(1, 2), slice(1, 3)), (slice(2, 3), slice(3, 4))]
    """
    i = j = 0
    while i < len(before) or j < len(after):
        start_i, start_j = i, j
        left = right = 1
        while True:
            if left <= right and i < len(before):
                left, i = left * before[i], i + 1
            elif j < len(after):
                right, j = right * after[j], j + 1
            else:
                left, i = left * before[i], i + 1
            if (left == right and j > start_j and i > start_i) or (i == len(before) and j == len(after)):
                break
        yield slice(start_i, i), slice(start_j, j)


def regroup(call: Call, dims: Dims, shape: Shape) -> Dims:
    """The dimensions of a row-major reshape of `dims` to `shape`."""
    if 0 in shape:
        return call.constants(shape, "empty")
    out: list[Expr] = []
    for source, target in runs([d.size for d in dims], shape):
        pieces = [ONE if n == 1 else call.fresh(n) for n in shape[target]]
        if _parted_by_the_example(dims[source], shape[target]):
            call.freeze(*dims[source], *pieces, why="positions mix with those of space, by sizes of the example")
        call.unify(Prod(tuple(pieces)), Prod(dims[source]))
        out.extend(pieces)
    return tuple(out)


def _parted_by_the_example(before: Dims, after: Shape) -> bool:
    """Whether a reshape of several dimensions together parts one that may be cut, and one of them has the example's
    size: (B, H·W, C) → (B, C, H, W) without a transpose parts C otherwise for every image size."""
    if not any(axis.example for dim in before for axis in axes(dim)):
        return False
    edges = set(accumulate(after, mul))
    outer = 1
    for dim in before:
        expr = resolve(dim)
        inside = {edge for edge in edges if outer < edge < outer * dim.size}
        factors = expr.factors if isinstance(expr, Prod) else ()
        inside -= {outer * edge for edge in accumulate((factor.size for factor in factors), mul)}
        if inside and any(not axis.frozen for axis in axes(dim)):
            return True
        outer *= dim.size
    return False


@rule("aten.view.default", "aten._unsafe_view.default", "aten.unflatten.int")
def view(call: Call) -> Effect:
    out = regroup(call, call["self"], call.shape)
    if "size" in call.args:
        return Effect(out, sizes={"size": out}, carries=True)
    dim = call["dim"] % len(call["self"])
    return Effect(out, sizes={"sizes": out[dim : dim + len(call["sizes"])]}, carries=True)


@rule("aten.reshape.default")
def reshape(call: Call) -> Effect:
    out = regroup(call, call["self"], call.shape)
    return Effect(out, sizes={"shape": out}, carries=True)


@rule("aten.flatten.using_ints")
def flatten(call: Call) -> Effect:
    return Effect(regroup(call, call["self"], call.shape), carries=True)


@rule("aten.reshape_as.default", "aten.view_as.default")
def reshape_as(call: Call) -> Effect:
    out = regroup(call, call["self"], call.shape)
    for a, b in zip(out, call["other"], strict=True):
        call.unify(a, b)
    return Effect(out, carries=True)


@rule("aten.permute.default")
def permute(call: Call) -> Effect:
    x = call["self"]
    return Effect(tuple(x[d] for d in call["dims"]), carries=True)


@rule("aten.transpose.int", "aten.swapaxes.default", "aten.t.default", "aten.numpy_T.default", "aten.mT.default")
def transpose(call: Call) -> Effect:
    x = list(call["self"])
    a, b = call.args.get("dim0", call.args.get("axis0", -2)), call.args.get("dim1", call.args.get("axis1", -1))
    if len(x) > 1:
        x[a], x[b] = x[b], x[a]
    return Effect(tuple(x), carries=True)


@rule("aten.movedim.int", "aten.movedim.intlist")
def movedim(call: Call) -> Effect:
    x = call["self"]
    source, target = call["source"], call["destination"]
    source = [s % len(x) for s in (source if isinstance(source, list) else [source])]
    target = [t % len(x) for t in (target if isinstance(target, list) else [target])]
    order = [d for d in range(len(x)) if d not in source]
    for t, s in sorted(zip(target, source, strict=True)):
        order.insert(t, s)
    return Effect(tuple(x[d] for d in order), carries=True)


@rule("aten.unsqueeze.default")
def unsqueeze(call: Call) -> Effect:
    x, dim = list(call["self"]), call["dim"]
    x.insert(dim if dim >= 0 else dim + len(x) + 1, ONE)
    return Effect(tuple(x), carries=True)


@rule("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default")
def squeeze(call: Call) -> Effect:
    x, dim = call["self"], call.args.get("dim")
    which = range(len(x)) if dim is None else [d % len(x) for d in (dim if isinstance(dim, list) else [dim])]
    gone = [d for d in which if x[d].size == 1]
    return Effect(tuple(e for d, e in enumerate(x) if d not in gone), carries=True)


@rule("aten.expand.default")
def expand(call: Call) -> Effect:
    """Dimensions of size one are repeated; how often is free until the result meets another tensor."""
    x = (ONE,) * (len(call.shape) - len(call["self"])) + tuple(call["self"])
    out = tuple(dim if dim.size == n else call.fresh(n) for dim, n in zip(x, call.shape, strict=True))
    return Effect(out, sizes={"size": out})


@rule("aten.expand_as.default", "aten.broadcast_to.default")
def expand_as(call: Call) -> Effect:
    x = (ONE,) * (len(call.shape) - len(call["self"])) + tuple(call["self"])
    if "other" not in call.args:
        out = tuple(dim if dim.size == n else call.fresh(n) for dim, n in zip(x, call.shape, strict=True))
        return Effect(out, sizes={"size": out})
    for a, b in zip(x, call["other"], strict=True):
        if a.size == b.size:
            call.unify(a, b)
    return Effect(tuple(call["other"]))


@rule("aten.repeat.default", "aten.tile.default")
def repeat(call: Call) -> Effect:
    """Each dimension is laid out `r` times: Prod(r, dim)."""
    name = "repeats" if "repeats" in call.args else "dims"
    times = [1] * (len(call.shape) - len(call[name])) + list(call[name])
    x = (ONE,) * (len(call.shape) - len(call["self"])) + tuple(call["self"])
    copies = [
        ONE if n == 1 else call.open(n, "copies") if dim.size > 1 else call.fresh(n)
        for n, dim in zip(times, x, strict=True)
    ]
    return Effect(tuple(Prod((c, d)) for c, d in zip(copies, x, strict=True)), sizes={name: copies})


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Effect:
    """Each position is laid out `r` times in place: Prod(dim, r). The copies are alike: their number is free."""
    x, dim, copies = list(call["self"]), call["dim"], call.fresh(call["repeats"])
    if dim is None:
        x, dim = [Prod(tuple(x))], 0
    x[dim] = Prod((x[dim], copies))
    whole = {} if call["output_size"] is None else {"output_size": x[dim]}
    return Effect(tuple(x), sizes={"repeats": copies, **whole})


@rule("aten.roll.default")
def roll(call: Call) -> Effect:
    x = call["self"]
    call.freeze(*([x[d] for d in call["dims"]] or x), why="rolled")
    return Effect(x)


@rule("aten.rot90.default")
def rot90(call: Call) -> Effect:
    x, (a, b) = list(call["self"]), call["dims"]
    call.freeze(x[a], x[b], why="rotated")
    if call["k"] % 2:
        x[a], x[b] = x[b], x[a]
    return Effect(tuple(x))


@rule("aten.flip.default")
def flip(call: Call) -> Effect:
    """A flip is exact on any dimension, but the kept positions come out in reversed order: frozen."""
    x = call["self"]
    call.freeze(*(x[d] for d in call["dims"]), why="flipped")
    return Effect(x)


@rule("aten.pixel_shuffle.default")
def pixel_shuffle(call: Call) -> Effect:
    """(*, c·r², H, W) → (*, c, H·r, W·r)."""
    *lead, channels, height, width = call["self"]
    out = call.fresh(call.shape[-3])
    call.unify(channels, Prod((out, call.constant(call["upscale_factor"] ** 2, "upscale factor"))))
    call.freeze(height, width, why="space")
    return Effect((*lead, out, *map(call.space, call.shape[-2:])), carries=True)


@rule("aten.pixel_unshuffle.default")
def pixel_unshuffle(call: Call) -> Effect:
    """(*, c, H·r, W·r) → (*, c·r², H, W)."""
    *lead, channels, height, width = call["self"]
    call.freeze(height, width, why="space")
    blocks = call.constant(call["downscale_factor"] ** 2, "downscale factor")
    return Effect((*lead, Prod((channels, blocks)), *map(call.space, call.shape[-2:])), carries=True)


@rule("aten.channel_shuffle.default")
def channel_shuffle(call: Call) -> Effect:
    """(N, g·c, *) → (N, c·g, *); the kept positions of each group must be equal in number, so g is frozen."""
    x, groups = call["self"], call["groups"]
    gamma, inner = call.constant(groups, "shuffled groups"), call.fresh(x[1].size // groups)
    call.unify(x[1], Prod((gamma, inner)))
    return Effect((x[0], Prod((inner, gamma)), *x[2:]), carries=True)


@rule("aten.im2col.default")
def im2col(call: Call) -> Effect:
    """(N, c, H, W) → (N, c·kernel, blocks)."""
    batch, channels, *space = call["self"]
    call.freeze(*space, why="space")
    kernel = call.constant(call.shape[1] // channels.size, "kernel size")
    return Effect((batch, Prod((channels, kernel)), call.space(call.shape[2])))


@rule("aten.col2im.default")
def col2im(call: Call) -> Effect:
    """(N, c·kernel, blocks) → (N, c, H, W)."""
    batch, columns, blocks = call["self"]
    channels = call.fresh(call.shape[1])
    call.unify(columns, Prod((channels, call.constant(columns.size // call.shape[1], "kernel size"))))
    call.freeze(blocks, why="space")
    return Effect((batch, channels, *map(call.space, call.shape[2:])))


@rule("aten.unfold.default")
def unfold(call: Call) -> Effect:
    """Windows over one dimension; the window becomes a new last dimension."""
    x, dim = list(call["self"]), call["dimension"]
    call.freeze(x[dim], why="windows over it")
    x[dim] = call.constant(call.shape[dim], "windows")
    return Effect((*x, call.constant(call.shape[-1], "window")))


@rule("aten.meshgrid.indexing", "aten.meshgrid.default")
def meshgrid(call: Call) -> Effect:
    dims = [t[0] if t else ONE for t in call["tensors"]]
    if call.args.get("indexing") == "xy" and len(dims) > 1:
        dims[:2] = dims[1::-1]
    return Effect([tuple(dims)] * len(call.shapes))


@rule("aten.as_strided.default")
def as_strided(call: Call) -> Effect:
    call.freeze(*call["self"], why="strides are fixed")
    return Effect(call.constants(call.shape, "strides are fixed"))
