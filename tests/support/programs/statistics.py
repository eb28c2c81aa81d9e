"""Operators over space, and along or over a dimension."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.programs.base import Apply, Made, Shape, dim_of, one_of, op


@op
def pooled(s: Shape, a: int, b: int, c: int) -> Made:
    if len(s) != 4 or min(s[2:]) < 2:
        return None
    functions = (
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2, 1),
        lambda x: F.adaptive_avg_pool2d(x, (1 + b % 2, 2)),
        lambda x: F.interpolate(x, scale_factor=2, mode=("nearest", "bilinear")[b % 2]),
        lambda x: F.pad(x, (1, 1, 1, 0), mode=("reflect", "replicate")[b % 2]),
    )
    function = one_of(functions, a)
    return Apply(lambda m, x: function(x))


@op
def reduced(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)
    functions = (Tensor.mean, Tensor.amax, lambda x, d: x.sum(d) * 0.3, Tensor.std, Tensor.logsumexp, Tensor.amin)
    function = one_of(functions[: 3 if s[d] == 1 else None], b)
    return Apply(lambda m, x: function(x, d)) if len(s) > 2 else None


@op
def gated(s: Shape, a: int, b: int, c: int) -> Made:
    """Squeeze and excite over one dimension."""
    d = dim_of(s, a)
    others = tuple(i for i in range(1, len(s)) if i != d)

    def function(m: Apply, x: Tensor) -> Tensor:
        gate = m.up(m.down(x.mean(others) if others else x).relu()).sigmoid()
        return x * gate.reshape(gate.shape[0], *(-1 if i == d else 1 for i in range(1, x.ndim)))

    return Apply(function, down=nn.Linear(s[d], 2 + b % 3), up=nn.Linear(2 + b % 3, s[d]))


@op
def along(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)
    functions = (
        lambda x: x.softmax(d),
        lambda x: x.cumsum(d),
        lambda x: x.sort(d).values,
        lambda x: x.log_softmax(d),
        lambda x: x.topk(1 + c % s[d], d).values,
    )
    function = one_of(functions, b)
    return Apply(lambda m, x: function(x))


@op
def transformed(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)

    def function(m: Apply, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=d)
        if b % 2:
            return torch.view_as_real(spectrum).amax(-1)
        return torch.fft.irfft(spectrum * 0.5, n=s[d], dim=d)

    return Apply(function) if s[d] > 1 else None


@op
def positioned(s: Shape, a: int, b: int, c: int) -> Made:
    """A table of positions: learned, a buffer, or counted out."""
    d = dim_of(s, a)
    shape = [n if i >= d else 1 for i, n in enumerate(s)][1:]
    if b % 3 == 2:
        return Apply(lambda m, x: x + torch.arange(s[d], dtype=x.dtype).view([-1] + [1] * (len(s) - 1 - d)) * 0.1)
    made = Apply(lambda m, x: x + m.table)
    if b % 3:
        made.register_buffer("table", torch.randn(shape))
    else:
        made.table = nn.Parameter(torch.randn(shape))
    return made
