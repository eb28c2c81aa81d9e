"""Operators that contract an input with a weight: convolutions, linear layers, matrix products, embeddings."""

from collections.abc import Iterator, Sequence
from typing import Any

from ekgfx.axes import ONE, Axis, Dims, Expr, Prod, fixed
from ekgfx.rules.pointwise import broadcast
from ekgfx.rules.registry import Call, Effect, Memory, rule

FRESH = Memory(derivative=("input",))


@rule(
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.conv1d.padding",
    "aten.conv2d.padding",
    "aten.conv3d.padding",
    memory=FRESH,
)
def convolution(call: Call) -> Effect:
    """input (N, γ·ι, *space), weight (γ·ω, ι, *kernel), bias (γ·ω) → (N, γ·ω, *space'), with γ = groups.

    A dimension of space with kernel 1, stride 1 and no padding passes through. So does the length of a single channel
    under a filter that keeps it (ECA's attention along the channels), taken over the kept positions.
    """
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    batch = x[: -len(weight) + 1]  # empty for an unbatched input
    channels, space = x[len(batch)], x[len(batch) + 1 :]
    gamma = call.fresh(groups)
    omega = call.fresh(weight[0].size // groups)
    call.unify(channels, Prod((gamma, weight[1])))
    call.unify(weight[0], Prod((gamma, omega)))
    if bias:
        call.unify(bias[0], weight[0])
    call.freeze(*weight[2:], why="kernel size")
    strides, paddings, dilations = (_each(call[name], space) for name in ("stride", "padding", "dilation"))
    kernels = [dim.size for dim in weight[2:]]
    alone = len(space) == 1 and weight[0].size == channels.size == 1
    same = [
        stride == 1 and padding == ("same" if isinstance(padding, str) else dilation * (kernel - 1) / 2)
        for kernel, stride, padding, dilation in zip(kernels, strides, paddings, dilations, strict=True)
    ]
    passes = [keeps and (kernel == 1 or alone) for keeps, kernel in zip(same, kernels, strict=True)]
    call.freeze(*(dim for dim, free in zip(space, passes, strict=True) if not free), why="space")
    after = call.constants(call.shape[len(batch) + 1 :], "space")
    out = (*batch, weight[0], *(old if free else new for old, new, free in zip(space, after, passes, strict=True)))
    mixes = alone and passes[0] and kernels[0] > 1 and not fixed(space[0])
    return Effect(
        out,
        sizes={"groups": gamma},
        produces=("weight", omega),
        sums=[("input", None, len(batch))],
        statistics=mixes,
        macs=[(*out, *weight[1:])],
    )


def _each(argument: Any, space: Dims) -> Sequence[Any]:
    """A convolution's argument for each dimension of space; one entry, or a word, stands for all."""
    several = [argument] if isinstance(argument, str) else argument
    return list(several) * len(space) if len(several) == 1 else several


@rule("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
def transposed_convolution(call: Call) -> Effect:
    """input (N, γ·ι, *space), weight (γ·ι, ω, *kernel), bias (γ·ω) → (N, γ·ω, *space'), with γ = groups."""
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    batch = x[: -len(weight) + 1]
    gamma = call.fresh(groups)
    iota = call.fresh(weight[0].size // groups)
    produced: Expr = Prod((gamma, weight[1]))
    call.unify(x[len(batch)], weight[0])
    call.unify(weight[0], Prod((gamma, iota)))
    if bias:
        call.unify(bias[0], produced)
    call.freeze(*weight[2:], why="kernel size")
    call.freeze(*x[len(batch) + 1 :], why="space")
    return Effect(
        (*batch, produced, *call.constants(call.shape[len(batch) + 1 :], "space")),
        sizes={"groups": gamma},
        produces=("weight", weight[1]),
        sums=[("input", None, len(batch))],
        macs=[(*x, *weight[1:])],
    )


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


@rule("aten.baddbmm.default")
def baddbmm(call: Call) -> Effect:
    a, b = call["batch1"], call["batch2"]
    call.unify(a[2], b[1])
    out = broadcast(call, (*broadcast(call, a[:1], b[:1]), a[1], b[2]), call["self"])
    return Effect(out, sums=[("batch1", None, 2)], macs=[(*out, a[2])])


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


@rule("aten.embedding.default")
def embedding(call: Call) -> Effect:
    """weight (entries, ω), indices (*) → (*, ω)."""
    weight, indices = call["weight"], call["indices"]
    call.freeze(weight[0], why="looked up by index")
    return Effect((*indices, weight[1]), produces=("weight", weight[1]), macs=())


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
