"""Linear operators as matrices: what multiplies a weight, whatever the operator is called.

A convolution of any dimension, a transposed or grouped one, a linear layer and a matrix product are all `y = W x`, once
x is the vector of what one output position reads. A `Form` says how an operator's tensors become such vectors; nothing
else in the repair knows operators by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor


class Form(Protocol):
    """An operator as G independent products of an O×D matrix with vectors of D entries, one for each output position
    (samples, tokens, pixels)."""

    @property
    def groups(self) -> int:
        """G."""

    def grid(self, y: Tensor) -> tuple[int, ...]:
        """The output positions of a call, as a shape."""

    def inputs(self, x: Tensor, grid: tuple[int, ...], picks: Tensor) -> Tensor:
        """S×G×D: what the positions `picks` (S, flat indices into the grid) read of the input."""

    def outputs(self, y: Tensor, picks: Tensor) -> Tensor:
        """S×G×O: the output at the positions `picks`."""

    def matrix(self, weight: Tensor) -> Tensor:
        """G×O×D: the weight."""

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A matrix as a weight of the operator."""


@dataclass(frozen=True)
class Convolution:
    """Windows of the input. A transposed convolution reads one input position at each tap, or none."""

    groups: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False

    def grid(self, y: Tensor) -> tuple[int, ...]:
        return (y.shape[0], *y.shape[2:])

    def inputs(self, x: Tensor, grid: tuple[int, ...], picks: Tensor) -> Tensor:
        sample, *place = torch.unravel_index(picks, grid)
        rank = len(self.kernel)
        index, valid = [sample.view(-1, *[1] * rank)], torch.ones((), dtype=torch.bool, device=x.device)
        for d, at in enumerate(place):
            tap = torch.arange(self.kernel[d], device=x.device) * self.dilation[d]
            if self.transposed:
                reach = at[:, None] + self.padding[d] - tap
                read = reach.div(self.stride[d], rounding_mode="floor")
                inside = (reach % self.stride[d] == 0) & (read >= 0) & (read < x.shape[2 + d])
            else:
                read = at[:, None] * self.stride[d] - self.padding[d] + tap
                inside = (read >= 0) & (read < x.shape[2 + d])
            shape = [len(picks), *(self.kernel[d] if i == d else 1 for i in range(rank))]
            index.append(read.clamp(0, x.shape[2 + d] - 1).view(shape))
            valid = valid & inside.view(shape)
        rows = x.movedim(1, -1)[tuple(index)]  # S × taps × channels
        rows = rows * valid[..., None] if not bool(valid.all()) else rows
        rows = rows.reshape(len(picks), prod(self.kernel), self.groups, -1)
        return rows.movedim(1, -1).reshape(len(picks), self.groups, -1)

    def outputs(self, y: Tensor, picks: Tensor) -> Tensor:
        at = torch.unravel_index(picks, self.grid(y))
        return y.movedim(1, -1)[at].reshape(len(picks), self.groups, -1)

    def matrix(self, weight: Tensor) -> Tensor:
        if self.transposed:  # groups · inputs × outputs × taps
            weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        if self.transposed:
            matrix = matrix.unflatten(2, (-1, prod(self.kernel))).transpose(1, 2)
        return matrix.reshape(like.shape)


@dataclass(frozen=True)
class Product:
    """A matrix product with a weight. rows: it is O×D, as a linear layer's, else D×O; left: it is the first factor, and
    what it multiplies are columns; stack: leading dimensions of the weight, each with a matrix of its own."""

    rows: bool
    left: bool = False
    stack: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        return prod(self.stack)

    def grid(self, y: Tensor) -> tuple[int, ...]:
        lead = self._as_rows(y).shape[:-1]
        return (prod(lead[: len(lead) - 1 - len(self.stack)]), *(lead[-1:] or (1,)))

    def inputs(self, x: Tensor, grid: tuple[int, ...], picks: Tensor) -> Tensor:
        x = self._as_rows(x)
        if self.stack:
            lead = torch.broadcast_shapes(x.shape[:-2], self.stack)
            x = x.expand(*lead, *x.shape[-2:])
        return self._picked(x, picks, grid)

    def outputs(self, y: Tensor, picks: Tensor) -> Tensor:
        return self._picked(self._as_rows(y), picks, self.grid(y))

    def _picked(self, rows: Tensor, picks: Tensor, grid: tuple[int, ...]) -> Tensor:
        sample, row = torch.unravel_index(picks, grid)
        return rows.reshape(grid[0], self.groups, grid[1], rows.shape[-1])[sample, :, row]

    def _as_rows(self, value: Tensor) -> Tensor:
        return value.mT if self.left else value

    def matrix(self, weight: Tensor) -> Tensor:
        return (weight if self.rows else weight.mT).reshape(self.groups, *self._sizes(weight))

    def _sizes(self, weight: Tensor) -> tuple[int, int]:
        outputs, inputs = weight.shape[-2:] if self.rows else weight.shape[:-3:-1]
        return outputs, inputs

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        stacked = matrix.reshape(*self.stack, *matrix.shape[1:])
        return stacked if self.rows else stacked.mT


@dataclass(frozen=True)
class Use:
    """The names of an operator's arguments, and its form. bias: None where the operator takes none."""

    input: str
    weight: str
    bias: str | None
    form: Form


IsWeight = Callable[[str], bool]
"""Whether the argument of that name is made of weights alone."""


def _convolution(args: Mapping[str, Any], is_weight: IsWeight) -> Use | None:
    weight, rank = args["weight"], args["weight"].ndim - 2
    if args["input"].ndim != rank + 2:
        return None
    kernel, dilation, padding = tuple(weight.shape[2:]), _each(args["dilation"], rank), args["padding"]
    if isinstance(padding, str):
        same = padding == "same"
        padding = [step * (size - 1) // 2 if same else 0 for step, size in zip(dilation, kernel, strict=True)]
    stride = _each(args["stride"], rank)
    return Use("input", "weight", "bias", Convolution(args["groups"], kernel, stride, _each(padding, rank), dilation))


def _transposed(args: Mapping[str, Any], is_weight: IsWeight) -> Use | None:
    weight, rank = args["weight"], args["weight"].ndim - 2
    if args["input"].ndim != rank + 2:
        return None
    stride, padding, dilation = (_each(args[name], rank) for name in ("stride", "padding", "dilation"))
    kernel = tuple(weight.shape[2:])
    return Use("input", "weight", "bias", Convolution(args["groups"], kernel, stride, padding, dilation, True))


def _linear(args: Mapping[str, Any], is_weight: IsWeight) -> Use | None:
    return Use("input", "weight", "bias", Product(rows=True)) if args["weight"].ndim == 2 else None


def _addmm(args: Mapping[str, Any], is_weight: IsWeight) -> Use | None:
    plain = args["beta"] == args["alpha"] == 1 and args["self"].ndim == 1
    return Use("mat1", "mat2", "self", Product(rows=False)) if plain and is_weight("mat2") else None


def _product(first: str, second: str) -> "FormOf":
    def of(args: Mapping[str, Any], is_weight: IsWeight) -> Use | None:
        left = is_weight(first)
        x, weight = (second, first) if left else (first, second)
        stack = tuple(args[weight].shape[:-2])
        if args[weight].ndim < 2 or args[x].ndim < 2 or (stack and args[x].ndim <= len(stack) + 1):
            return None
        return Use(x, weight, None, Product(rows=left, left=left, stack=stack))

    return of


def _each(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) * (rank if len(value) == 1 else 1)


FormOf = Callable[[Mapping[str, Any], IsWeight], Use | None]
FORMS: dict[str, FormOf] = {
    **{f"aten.conv{n}d.{form}": _convolution for n in (1, 2, 3) for form in ("default", "padding")},
    "aten.conv_transpose1d.default": _transposed,
    "aten.conv_transpose2d.input": _transposed,
    "aten.conv_transpose3d.input": _transposed,
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    "aten.mm.default": _product("self", "mat2"),
    "aten.bmm.default": _product("self", "mat2"),
    "aten.matmul.default": _product("self", "other"),
}


def of_positions(shape: Sequence[int], most: int, generator: torch.Generator) -> Tensor:
    """At most `most` of the positions of a grid, drawn without repetition, ascending."""
    count = prod(shape)
    if count <= most:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:most].sort().values
