"""Convolutions: plain, transposed, deformable."""

from collections.abc import Sequence
from typing import Any

from ekgfx.axes import Dims, Expr, Prod, fixed
from ekgfx.rules.registry import FRESH, Call, Effect, rule


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
    after = tuple(map(call.space, call.shape[len(batch) + 1 :]))
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
        (*batch, produced, *map(call.space, call.shape[len(batch) + 1 :])),
        sizes={"groups": gamma},
        produces=("weight", weight[1]),
        sums=[("input", None, len(batch))],
        macs=[(*x, *weight[1:])],
    )


@rule("torchvision.deform_conv2d.default")
def deformable_convolution(call: Call) -> Effect:
    """As a convolution in two dimensions, with offsets (N, deformed·2·kernel, *space') and a mask (N, deformed·kernel,
    *space') for each of `deformed` equal parts of the input's channels. The mask is empty where none is used."""
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    gamma, omega = call.fresh(groups), call.fresh(weight[0].size // groups)
    call.unify(x[1], Prod((gamma, weight[1])))
    call.unify(weight[0], Prod((gamma, omega)))
    call.unify(bias[0], weight[0])
    deformed = call["offset_groups"]
    call.unify(
        x[1], Prod((call.constant(deformed, "parts with offsets of their own"), call.fresh(x[1].size // deformed)))
    )
    call.freeze(*weight[2:], why="kernel size")
    call.freeze(*x[2:], why="space")
    for dims in (call["offset"], call["mask"]):
        call.unify(dims[0], x[0])
        call.freeze(*dims[1:], why="offsets")
    out = (x[0], weight[0], *map(call.space, call.shape[2:]))
    return Effect(
        out,
        sizes={"groups": gamma},
        produces=("weight", omega),
        sums=[("input", None, 1)],
        macs=[(*out, *weight[1:])],
    )
