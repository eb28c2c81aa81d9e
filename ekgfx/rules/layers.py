"""Operators that contract an input with a weight: linear layers, matrix products, embeddings."""

from collections.abc import Iterator

from ekgfx.axes import ONE, Axis, Dims, Expr, Prod, fixed
from ekgfx.rules.pointwise import broadcast
from ekgfx.rules.registry import FRESH, Call, Effect, rule, unknown


@rule("aten.linear.default", memory=FRESH)
def linear(call: Call) -> Effect:
    """input (*, ι), weight (ω, ι), bias (ω) → (*, ω)."""
    x, weight, bias = call["input"], call["weight"], call["bias"]
    call.unify(x[-1], weight[-1])
    if bias:
        call.unify(bias[0], weight[0])
    out = (*x[:-1], *weight[:-1])
    return Effect(out, produces=("weight", weight[0]), sums=[("input", None, -1)], macs=[(*out, weight[-1])])


@rule("aten.addmm.default")
def addmm(call: Call) -> Effect:
    """self (broadcastable to (n, m)), mat1 (n, k), mat2 (k, m) → (n, m)."""
    a, b = call["mat1"], call["mat2"]
    call.unify(a[1], b[0])
    out = broadcast(call, (a[0], b[1]), call["self"])
    return Effect(out, produces=("mat2", b[1]), sums=[("mat1", None, 1)], macs=[(*out, a[1])])


@rule(
    "aten.matmul.default",
    "aten.mm.default",
    "aten.bmm.default",
    "aten.mv.default",
    "aten.dot.default",
    "aten.vdot.default",
)
def matmul(call: Call) -> Effect:
    """(*, n, k) × (*, k, m) → (*, n, m); a vector operand has no n or no m of its own; leading dims broadcast."""
    a, b = call.tensors()
    call.unify(a[-1], b[-2] if len(b) > 1 else b[0])
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else ()
    out = (*broadcast(call, a[:-2], b[:-2]), *rows, *columns)
    names = list(call.args)
    made = (names[1], columns[0]) if columns else None
    return Effect(out, produces=made, sums=[(names[0], None, -1)], macs=[(*out, a[-1])])


@rule("aten._grouped_mm.default", "transformers.grouped_mm_fallback.default")
def grouped_mm(call: Call) -> Effect:
    """Rows (s, k), the groups one behind the other, each times a matrix of its own of (e, k, m) → (s, m): experts."""
    (name, x), (matrices, weight), *others = call.args.items()
    if len(x) != 2 or len(weight) != 3 or any(value is not None for key, value in others if key == "bias"):
        return unknown(call, "groups of another kind")
    call.unify(x[1], weight[1])
    call.freeze(weight[0], why="one matrix for each group")
    out = (x[0], weight[2])
    return Effect(out, produces=(matrices, weight[2]), sums=[(name, None, -1)], macs=[(*out, weight[1])])


@rule("aten.baddbmm.default")
def baddbmm(call: Call) -> Effect:
    a, b = call["batch1"], call["batch2"]
    call.unify(a[2], b[1])
    out = broadcast(call, (*broadcast(call, a[:1], b[:1]), a[1], b[2]), call["self"])
    return Effect(out, sums=[("batch1", None, 2)], macs=[(*out, a[2])])


@rule("aten.addmv.default")
def addmv(call: Call) -> Effect:
    """self (broadcastable to (n,)), mat (n, k), vec (k) → (n)."""
    a, b = call["mat"], call["vec"]
    call.unify(a[1], b[0])
    return Effect(broadcast(call, (a[0],), call["self"]), sums=[("mat", None, 1)], macs=[tuple(a)])


@rule("aten.addbmm.default")
def addbmm(call: Call) -> Effect:
    """self (broadcastable to (n, m)), batch1 (b, n, k), batch2 (b, k, m) → (n, m), the sum over b."""
    a, b = call["batch1"], call["batch2"]
    call.unify(a[0], b[0])
    call.unify(a[2], b[1])
    out = broadcast(call, (a[1], b[2]), call["self"])
    return Effect(out, sums=[("batch1", None, 0), ("batch1", None, 2)], macs=[(*a, b[2])])


@rule("aten.inner.default")
def inner(call: Call) -> Effect:
    """(*, k) and (*', k) → (*, *')."""
    a, b = call["self"], call["other"]
    call.unify(a[-1], b[-1])
    out = (*a[:-1], *b[:-1])
    return Effect(
        out, produces=("other", b[0]) if len(b) == 2 else None, sums=[("self", None, -1)], macs=[(*out, a[-1])]
    )


@rule("aten.outer.default")
def outer(call: Call) -> Effect:
    """(n) and (m) → (n, m)."""
    return Effect((call["self"][0], call["vec2"][0]), macs=())


@rule("aten.tensordot.default")
def tensordot(call: Call) -> Effect:
    """Dimensions `dims_self` of the one and `dims_other` of the other are summed over, pair by pair."""
    a, b = call["self"], call["other"]
    pairs = [(i % len(a), j % len(b)) for i, j in zip(call["dims_self"], call["dims_other"], strict=True)]
    for i, j in pairs:
        call.unify(a[i], b[j])
    gone, gone_too = {i for i, _ in pairs}, {j for _, j in pairs}
    kept = tuple(e for d, e in enumerate(b) if d not in gone_too)
    out = (*(e for d, e in enumerate(a) if d not in gone), *kept)
    return Effect(
        out,
        produces=("other", kept[0]) if len(kept) == 1 else None,
        sums=[("self", None, i) for i in sorted(gone)],
        macs=[(*out, *(a[i] for i in sorted(gone)))],
    )


@rule("aten.linalg_vecdot.default")
def vecdot(call: Call) -> Effect:
    """The sum of products over one dimension of both, after broadcasting."""
    a, b = call["x"], call["y"]
    out = broadcast(call, a, b)
    dim = call["dim"] % len(out) - len(out)
    if not all(len(dims) >= -dim and dims[dim].size == out[dim].size for dims in (a, b)):
        call.freeze(out[dim], why="multiplied by one value")
    sums = [("x", None, dim)] if not fixed(out[dim]) else []
    return Effect(tuple(e for d, e in enumerate(out) if d - len(out) != dim), sums=sums, macs=())


@rule("aten.einsum.default")
def einsum(call: Call) -> Effect:
    """Dimensions with the same letter are one dimension; a letter on the right only passes through."""
    equation: str = call["equation"].replace(" ", "")
    operands: list[Dims] = call["tensors"]
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    spelled: list[list[str]] = []
    for text, dims in zip(terms, operands, strict=True):
        spelled.append(_letters(text, len(dims) - len(text.replace("...", ""))))
    if not arrow:
        every = [letter for term in spelled for letter in term]
        dots = sorted({x for x in every if x[0] == "."}, key=lambda x: -int(x[1:]))
        output = dots + sorted(x for x in set(every) if every.count(x) == 1 and x[0] != ".")
    else:
        widest = max((int(x[1:]) for term in spelled for x in term if x[0] == "."), default=0)
        output = _letters(right, widest)
    known: dict[str, Expr] = {}
    for term, dims in zip(spelled, operands, strict=True):
        for letter, dim in zip(term, dims, strict=True):
            if known.get(letter, ONE).size == 1:
                known[letter] = dim
            elif dim.size > 1:
                call.unify(known[letter], dim)
    sums: list[tuple[str, int | None, int]] = []
    for letter in sorted(known.keys() - set(output)):
        users = [i for i, term in enumerate(spelled) if letter in term]
        sums.append(("tensors", users[0], spelled[users[0]].index(letter)))
    long = [
        {letter for letter, dim in zip(term, dims, strict=True) if dim.size > 1}
        for term, dims in zip(spelled, operands, strict=True)
    ]
    macs = [tuple(known[letter] for letter in sorted(pair)) for pair in _contractions(long, set(output), call["path"])]
    return Effect(tuple(known[letter] for letter in output), sums=sums, macs=macs)


def _contractions(operands: list[set[str]], output: set[str], path: list[int] | None) -> Iterator[set[str]]:
    """The letters of every matrix product that an einsum is computed by, as PyTorch does: pair after pair, in the order
    of `path` or from the left. What one factor alone has and nobody wants is summed up before; a pair with no letter to
    sum over is no matrix product."""
    left = list(operands)
    pairs = list(zip(path[::2], path[1::2], strict=True)) if path else [(0, 1)] * (len(left) - 1)
    for i, j in pairs:
        a, b = left[i], left[j]
        left = [term for k, term in enumerate(left) if k not in (i, j)]
        wanted = output.union(*left)
        a, b = a & (b | wanted), b & (a | wanted)
        summed = (a & b) - wanted
        if summed:
            yield a | b
        left.insert(len(left) if path else 0, (a | b) - summed)


def _letters(term: str, missing: int) -> list[str]:
    """Spell an einsum term out: the ellipsis becomes .n … .1, numbered from the right as broadcasting aligns."""
    before, dots, after = term.partition("...")
    return [*before, *(f".{i}" for i in range(missing, 0, -1) if dots), *after]


@rule("aten.cdist.default")
def cdist(call: Call) -> Effect:
    """x1 (*, P, M), x2 (*, R, M) → distances (*, P, R), which a feature that is zero in both does not change."""
    a, b = call["x1"], call["x2"]
    call.unify(a[-1], b[-1])
    out = (*broadcast(call, a[:-2], b[:-2]), a[-2], b[-2])
    return Effect(out, sums=[("x1", None, -1), ("x2", None, -1)], macs=[(*out, a[-1])])


@rule("aten.cosine_similarity.default")
def cosine_similarity(call: Call) -> Effect:
    """Products and squared norms are sums over a dimension of both tensors, after broadcasting."""
    out, dim = _of_pairs(call)
    return Effect(out, sums=[(name, None, dim) for name in ("x1", "x2") if not fixed(call[name][dim])], macs=())


@rule("aten.pairwise_distance.default")
def pairwise_distance(call: Call) -> Effect:
    """‖x1 − x2 + ε‖ over the last dimension: a position that is zero in both still counts ε, so over the kept ones."""
    out, dim = _of_pairs(call)
    return Effect(out, statistics=not fixed(call["x1"][dim]), macs=())


def _of_pairs(call: Call) -> tuple[Dims, int]:
    """The broadcast shape of x1 and x2 without the compared dimension, and that one counted from the right.

    Where only one of them has it, the other's value is compared with each of its positions: it stays."""
    a, b, keepdim = call["x1"], call["x2"], call.args.get("keepdim", False)
    both = broadcast(call, a, b)
    dim = call.args.get("dim", -1) % len(both) - len(both)
    if not all(len(dims) >= -dim and dims[dim].size == both[dim].size for dims in (a, b)):
        call.freeze(both[dim], why="compared with one value")
    return tuple(ONE if d - len(both) == dim else e for d, e in enumerate(both) if keepdim or d - len(both) != dim), dim


@rule("aten.embedding.default")
def embedding(call: Call) -> Effect:
    """weight (entries, ω), indices (*) → (*, ω)."""
    weight, indices = call["weight"], call["indices"]
    call.freeze(weight[0], why="looked up by index")
    return Effect((*indices, weight[1]), produces=("weight", weight[1]), macs=())


@rule("aten.embedding_bag.padding_idx", "aten.embedding_bag.default")
def embedding_bag(call: Call) -> Effect:
    """weight (entries, ω), indices (n), offsets (bags) → (bags, ω), and three tensors for the derivative.

    Offsets that count in equal steps come from indices (bags, each) that were made one dimension.
    """
    weight, indices, offsets = call["weight"], call["indices"], call["offsets"]
    call.freeze(weight[0], why="looked up by index")
    bags = call.shape[0]
    if offsets[0].size == bags and not fixed(offsets[0]) and indices[0].size % bags == 0:
        call.unify(indices[0], Prod((offsets[0], call.constant(indices[0].size // bags, "entries of a bag"))))
    call.freeze(*indices, why="entries of bags")
    if call["per_sample_weights"]:
        call.unify(call["per_sample_weights"][0], indices[0])
    first = offsets[0] if offsets[0].size == bags else call.constant(bags, "bags")
    others = [call.constants(shape, "for the derivative") for shape in call.shapes[1:]]
    return Effect([(first, weight[1]), *others], produces=("weight", weight[1]), macs=())


@rule("aten.one_hot.default")
def one_hot(call: Call) -> Effect:
    """Classes (*) → (*, n): the positions of the new dimension are the classes' numbers."""
    return Effect((*call["self"], *call.constants(call.shape[-1:], "numbers of classes")))


@rule("aten.bilinear.default")
def bilinear(call: Call) -> Effect:
    """input1 (*, i), input2 (*, j), weight (ω, i, j), bias (ω) → (*, ω)."""
    weight: tuple[Axis, ...] = call["weight"]
    call.unify(call["input1"][-1], weight[1])
    call.unify(call["input2"][-1], weight[2])
    if call["bias"]:
        call.unify(call["bias"][0], weight[0])
    out = (*broadcast(call, call["input1"][:-1], call["input2"][:-1]), weight[0])
    sums: list[tuple[str, int | None, int]] = [("input1", None, -1), ("input2", None, -1)]
    return Effect(out, produces=("weight", weight[0]), sums=sums, macs=[(*out, *weight[1:])])
