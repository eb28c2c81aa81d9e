"""Operators that join tensors along a dimension or take pieces of one: cat, stack, split, slice, select, index."""

from ekgfx.axes import ONE, Dims, Expr, Prod, Sum, axes, fixed
from ekgfx.rules.pointwise import broadcast
from ekgfx.rules.registry import Call, Effect, opaque, rule


def _replace(dims: Dims, at: int, expr: Expr) -> Dims:
    return tuple(expr if d == at % len(dims) else old for d, old in enumerate(dims))


@rule("aten.cat.default", "aten.concat.default")
def cat(call: Call) -> Effect:
    tensors: list[Dims] = [t for t in call["tensors"] if not (len(t) == 1 and t[0].size == 0)]
    dim = call["dim"] % len(tensors[0])
    for other in tensors[1:]:
        for d, (a, b) in enumerate(zip(tensors[0], other, strict=True)):
            if d != dim:
                call.unify(a, b)
    return Effect(_replace(tensors[0], dim, Sum(tuple(t[dim] for t in tensors))))


@rule("aten.stack.default")
def stack(call: Call) -> Effect:
    tensors: list[Dims] = call["tensors"]
    out = list(broadcast(call, *tensors))
    dim = call["dim"]
    out.insert(dim if dim >= 0 else dim + len(out) + 1, call.constant(len(tensors), "stacked"))
    return Effect(tuple(out))


@rule("aten.split_with_sizes.default", "aten.split.sizes")
def split_with_sizes(call: Call) -> Effect:
    x, name = call["self"], "split_sizes" if "split_sizes" in call.args else "split_size"
    dim = call["dim"] % len(x)
    parts = [call.fresh(n) for n in call[name]]
    call.unify(Sum(tuple(parts)), x[dim])
    return Effect([_replace(x, dim, part) for part in parts], sizes={name: parts})


@rule("aten.split.Tensor", "aten.chunk.default")
def equal_pieces(call: Call) -> Effect:
    """Pieces of one size, and so they must stay: the dimension is Prod(pieces, piece)."""
    x, dim = call["self"], call["dim"] % len(call["self"])
    pieces = len(call.shapes)
    if x[dim].size % pieces or call.shapes[0][dim] * pieces != x[dim].size:
        call.freeze(x[dim], why="uneven pieces")
        return Effect([_replace(x, dim, call.constant(s[dim], "uneven pieces")) for s in call.shapes])
    piece = call.fresh(x[dim].size // pieces)
    call.unify(x[dim], Prod((call.constant(pieces, "number of pieces"), piece)))
    return Effect([_replace(x, dim, piece)] * pieces, sizes={"split_size": piece} if "split_size" in call.args else {})


@rule("aten.tensor_split.sections", "aten.tensor_split.indices")
def tensor_split(call: Call) -> Effect:
    """Pieces that differ by one position at most, as `chunk` where they don't; or between given bounds, which stay."""
    return _split(call, call["dim"] % len(call["self"]))


@rule("aten.hsplit.int", "aten.hsplit.array")
def hsplit(call: Call) -> Effect:
    """`tensor_split` of the second dimension, or of the only one."""
    return _split(call, min(1, len(call["self"]) - 1))


@rule("aten.vsplit.int", "aten.vsplit.array")
def vsplit(call: Call) -> Effect:
    return _split(call, 0)


@rule("aten.dsplit.int", "aten.dsplit.array")
def dsplit(call: Call) -> Effect:
    return _split(call, 2)


def _split(call: Call, dim: int) -> Effect:
    x = call["self"]
    pieces = call.args.get("sections")
    if pieces is not None and x[dim].size % pieces == 0:
        piece = call.fresh(x[dim].size // pieces)
        call.unify(x[dim], Prod((call.constant(pieces, "number of pieces"), piece)))
        return Effect([_replace(x, dim, piece)] * len(call.shapes))
    call.freeze(x[dim], why="uneven pieces")
    return Effect([_replace(x, dim, call.constant(s[dim], "uneven pieces")) for s in call.shapes])


@rule("aten.glu.default")
def glu(call: Call) -> Effect:
    """The first half of a dimension gated by the second: Prod(2, piece) → piece."""
    x, dim = call["self"], call["dim"] % len(call["self"])
    piece = call.fresh(x[dim].size // 2)
    call.unify(x[dim], Prod((call.constant(2, "halves"), piece)))
    return Effect(_replace(x, dim, piece))


@rule("aten.unbind.int")
def unbind(call: Call) -> Effect:
    x, dim = call["self"], call["dim"] % len(call["self"])
    call.freeze(x[dim], why="unbound")
    return Effect([x[:dim] + x[dim + 1 :]] * len(call.shapes))


@rule("aten.select.int")
def select(call: Call) -> Effect:
    x, dim = call["self"], call["dim"] % len(call["self"])
    call.freeze(x[dim], why="one position is selected")
    return Effect(x[:dim] + x[dim + 1 :])


@rule("aten.slice.Tensor", "aten.narrow.default")
def slice_(call: Call) -> Effect:
    """The positions from start to end; bounds are recomputed as counts of what lies before."""
    x, dim = call["self"], call["dim"] % len(call["self"])
    taken = call.shape[dim]
    if taken == x[dim].size:  # the whole dimension (a slice to the end keeps its open bound)
        return Effect(x, sizes={"length": x[dim]} if "length" in call.args else {})
    if call.args.get("step", 1) != 1 or fixed(x[dim]) or taken == 0:
        call.freeze(x[dim], why="strided slice")
        return Effect(_replace(x, dim, call.constant(taken, "slice")))
    before, piece = _cut_out(call, x[dim], taken)
    name, bound = ("length", piece) if "length" in call.args else ("end", Sum((before, piece)))
    return Effect(_replace(x, dim, piece), sizes={"start": before, name: bound})


def _cut_out(call: Call, dim: Expr, taken: int) -> tuple[Expr, Expr]:
    """What lies before the slice of `taken` positions that begins at the argument `start`, and the slice."""
    length, start = dim.size, call["start"] or 0
    start = max(start + length, 0) if start < 0 else min(start, length)
    before, piece, after = (call.fresh(n) for n in (start, taken, length - start - taken))
    call.unify(Sum((before, piece, after)), dim)
    return before, piece


@rule("aten.slice_scatter.default")
def slice_scatter(call: Call) -> Effect:
    """`self` with the positions from start to end overwritten by those of `src`."""
    x, src, dim = call["self"], call["src"], call["dim"] % len(call["self"])
    for d, (a, b) in enumerate(zip(x, src, strict=True)):
        if d != dim:
            call.unify(a, b)
    if src[dim].size == x[dim].size:
        call.unify(src[dim], x[dim])
        return Effect(x)
    if call["step"] != 1 or fixed(x[dim]) or src[dim].size == 0:
        call.freeze(x[dim], src[dim], why="overwritten in part")
        return Effect(x)
    before, piece = _cut_out(call, x[dim], src[dim].size)
    call.unify(piece, src[dim])
    return Effect(x, sizes={"start": before, "end": Sum((before, piece))})


@rule("aten.select_scatter.default")
def select_scatter(call: Call) -> Effect:
    """`self` with one position overwritten by `src`."""
    x, dim = call["self"], call["dim"] % len(call["self"])
    call.freeze(x[dim], why="one position is overwritten")
    for a, b in zip(x[:dim] + x[dim + 1 :], call["src"], strict=True):
        call.unify(a, b)
    return Effect(x)


@rule("aten.index.Tensor")
def index(call: Call) -> Effect:
    """x[i, :, j, …]: indexed dimensions are replaced by the broadcast dimensions of the indices."""
    x, indices = call["self"], list(call["indices"])
    indices += [None] * (len(x) - len(indices))
    at = [d for d, i in enumerate(indices) if i is not None]
    call.freeze(*(x[d] for d in at), why="indexed")
    for d in at:
        _row_of_every_sample(call, indices[d], x[d])
    new = broadcast(call, *(indices[d] for d in at))
    if len(new) + len(x) - len(at) != len(call.shape):  # a boolean mask: its own dimensions are consumed
        for dims in call.tensors():
            call.freeze(*dims, why="indexed by a mask")
        return Effect(call.constants(call.shape, "indexed by a mask"))
    rest = [x[d] for d in range(len(x)) if d not in at]
    front = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    return Effect((*rest[:front], *new, *rest[front:]))


@rule("aten.index_put.default")
def index_put(call: Call) -> Effect:
    """x with x[i, :, j, …] overwritten by `values`, or these added to it."""
    x, indices = call["self"], list(call["indices"])
    indices += [None] * (len(x) - len(indices))
    at = [d for d, i in enumerate(indices) if i is not None]
    if any(indices[d].mask for d in at):
        return _masked_put(call, at[0], indices[at[0]]) if len(at) == 1 else opaque(call, "indexed by a mask")
    call.freeze(*(x[d] for d in at), why="indexed")
    new = broadcast(call, *(indices[d] for d in at))
    rest = [x[d] for d in range(len(x)) if d not in at]
    front = at[0] if at == list(range(at[0], at[-1] + 1)) else 0
    broadcast(call, (*rest[:front], *new, *rest[front:]), call["values"])
    return Effect(x)


def _masked_put(call: Call, at: int, mask: Dims) -> Effect:
    """x[mask] = values: the mask has as many of the dimensions of x, from `at` on, as its own; what comes behind them
    is filled by the positions of `values`."""
    x, values = call["self"], call["values"]
    behind = x[at + len(mask) :]
    before = values[: max(0, len(values) - len(behind))]
    if any(dim.size > 1 for dim in before):
        return opaque(call, "filled in where a mask is true")
    for a, b in zip(x[at:], mask, strict=False):
        call.unify(a, b)
    for a, b in zip(reversed(behind), reversed(values), strict=False):
        if b.size > 1:
            call.unify(a, b)
    return Effect(x, carries=True)


@rule("aten.index_add.default", "aten.index_copy.default", "aten.index_reduce.default")
def index_add(call: Call) -> Effect:
    """`self` with the positions `index` of one dimension overwritten by those of `source`, or these added to them."""
    x, source, dim = call["self"], call["source"], call["dim"] % len(call["self"])
    if call["index"]:
        call.unify(call["index"][0], source[dim])
    call.freeze(x[dim], source[dim], why="indexed")
    for d, (a, b) in enumerate(zip(x, source, strict=True)):
        if d != dim:
            call.unify(a, b)
    return Effect(x)


@rule("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
def index_fill(call: Call) -> Effect:
    call.freeze(call["self"][call["dim"]], *call["index"], why="indexed")
    return Effect(call["self"])


@rule(
    "aten.scatter_add.default",
    "aten.scatter_reduce.two",
    *(f"aten.scatter.{form}" for form in ("src", "value", "reduce", "value_reduce")),
)
def scatter(call: Call) -> Effect:
    """`self` with src[i, j, …] put at, or added to, self[i, index[i, j, …], …].

    One dimension is indexed; the others are those of the index, where it is as long."""
    x, dim = call["self"], call["dim"] % len(call["self"])
    others: list[Dims] = [dims for name in ("index", "src") if (dims := call.args.get(name)) is not None]
    call.freeze(x[dim], *(dims[dim] for dims in others), why="indexed")
    for d, dims in enumerate(zip(x, *others, strict=True)):
        if d != dim and all(e.size == dims[0].size for e in dims):
            for e in dims[1:]:
                call.unify(dims[0], e)
        elif d != dim:
            call.freeze(*dims, why="indexed in part")
    return Effect(x)


def _row_of_every_sample(call: Call, index: Dims, dim: Expr) -> None:
    """x[arange(len(x)), …]: an index that counts to the size of the batch, over the batch, has an entry for each."""
    long = [e for e in index if e.size > 1]
    if len(long) == 1 and long[0].size == dim.size and not fixed(long[0]) and any(a.batch for a in axes(dim)):
        call.unify(long[0], dim)


@rule("aten.index_select.default")
def index_select(call: Call) -> Effect:
    x = call["self"]
    _row_of_every_sample(call, call["index"], x[call["dim"]])
    call.freeze(x[call["dim"]], why="indexed")
    return Effect(_replace(x, call["dim"], call["index"][0] if call["index"] else ONE))


@rule("aten.take_along_dim.default")
def take_along_dim(call: Call) -> Effect:
    """As `gather`, with the other dimensions broadcast."""
    x, index, dim = call["self"], call["indices"], call["dim"]
    if dim is None:
        return opaque(call, "indexed as one dimension")
    dim %= len(x)
    call.freeze(x[dim], index[dim], why="indexed")
    others = [_replace(dims, dim, ONE) for dims in (x, index)]
    return Effect(_replace(broadcast(call, *others), dim, index[dim]))


@rule("aten.gather.default")
def gather(call: Call) -> Effect:
    """The gathered dimension freezes; the others are those of the index, where they are as long as the input's."""
    x, index, dim = call["self"], call["index"], call["dim"] % len(call["self"])
    call.freeze(x[dim], index[dim], why="indexed")
    for d, (a, b) in enumerate(zip(x, index, strict=True)):
        if d != dim and a.size == b.size:
            call.unify(a, b)
        elif d != dim:
            call.freeze(a, b, why="indexed")
    return Effect(index)
