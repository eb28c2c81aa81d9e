"""Operators that rearrange positions, and those that take tensors to pieces and join them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.programs.base import Apply, Made, Shape, dim_of, divisors, one_of, op, pair


@op
def permute(s: Shape, a: int, b: int, c: int) -> Made:
    rest = list(range(1, len(s)))
    order = [rest.pop((a + 3 * b + i * c) % len(rest)) for i in range(len(rest))]
    return Apply(lambda m, x: x.permute(0, *order))


@op
def transpose(s: Shape, a: int, b: int, c: int) -> Made:
    return Apply(lambda m, x: x.transpose(dim_of(s, a), dim_of(s, b)))


@op
def flatten(s: Shape, a: int, b: int, c: int) -> Made:
    start, end = sorted((dim_of(s, a), dim_of(s, b)))
    return Apply(lambda m, x: x.flatten(start, end)) if start < end else None


@op
def unflatten(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)
    factor = one_of(divisors(s[d]), b)
    if len(s) > 4 or c % 2:
        return Apply(lambda m, x: x.unflatten(d, (m.sizes[0], -1)), factor) if len(s) <= 4 else None
    return Apply(lambda m, x: x.unflatten(d, m.sizes), factor, s[d] // factor)


@op
def regroup(s: Shape, a: int, b: int, c: int) -> Made:
    """Two neighbouring dimensions are laid out anew."""
    if len(s) < 3:
        return None
    d = 1 + a % (len(s) - 2)
    first = one_of(divisors(s[d] * s[d + 1]), b)
    return Apply(lambda m, x: x.reshape(*x.shape[:d], *m.sizes, *x.shape[d + 2 :]), first, s[d] * s[d + 1] // first)


@op
def shuffle(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)
    groups = one_of(divisors(s[d]), b)
    return Apply(lambda m, x: x.unflatten(d, (m.sizes[0], -1)).transpose(d, d + 1).flatten(d, d + 1), groups)


@op
def unsqueezed(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)
    if len(s) > 4:
        return Apply(lambda m, x: x.unsqueeze(d).squeeze(d))
    return Apply(lambda m, x: x.unsqueeze(d).expand(*x.shape[:d], 1 + b % 3, *x.shape[d:]) * (1 + c % 2))


@op
def repeated(s: Shape, a: int, b: int, c: int) -> Made:
    d, times = dim_of(s, a), 1 + b % 3
    if c % 4 == 3:
        return Apply(lambda m, x: x.repeat_interleave(m.sizes[0], d, output_size=x.shape[d] * m.sizes[0]), times)
    if c % 2:
        return Apply(lambda m, x: x.repeat_interleave(m.sizes[0], d), times)
    return Apply(lambda m, x: x.repeat(*(times if i == d else 1 for i in range(x.ndim))))


@op
def rolled(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)
    return Apply(lambda m, x: x.roll(1, d) if b % 2 else x.flip(d))


@op
def pixel_shuffle(s: Shape, a: int, b: int, c: int) -> Made:
    if len(s) != 4:
        return None
    if a % 2 and s[1] % 4 == 0:
        return Apply(lambda m, x: F.pixel_shuffle(x, 2))
    return Apply(lambda m, x: F.pixel_unshuffle(x, 2)) if s[2] % 2 == s[3] % 2 == 0 else None


@op
def unfold(s: Shape, a: int, b: int, c: int) -> Made:
    if len(s) != 4 or min(s[2:]) < 2:
        return None
    return Apply(lambda m, x: F.unfold(x, 2)) if a % 2 else Apply(lambda m, x: x.unfold(2 + b % 2, 2, 1).mean(-1))


@op
def halves(s: Shape, a: int, b: int, c: int) -> Made:
    """Equal pieces, by chunk, split or glu."""
    d = dim_of(s, a)
    if s[d] % 2:
        return None
    match b % 4:
        case 0:
            return Apply(lambda m, x: F.glu(x, d))
        case 1:
            return Apply(lambda m, x: torch.cat([p * (i + 1) for i, p in enumerate(x.chunk(2, d))][::-1], d))
        case 2:
            return Apply(lambda m, x: (lambda u, v: u * v.tanh())(*x.split(m.sizes[0], d)), s[d] // 2)
    return Apply(lambda m, x: torch.stack(x.chunk(2, d), d).amax(d))


@op
def pieces(s: Shape, a: int, b: int, c: int) -> Made:
    """Pieces of sizes of their own, joined in another order, or one of them alone."""
    d = dim_of(s, a)
    if s[d] < 3:
        return None
    first = 1 + b % (s[d] - 2)
    sizes = (first, s[d] - first)
    if c % 3 == 0:
        return Apply(lambda m, x: x.split(m.sizes, d)[b % 2], *sizes)
    return Apply(lambda m, x: torch.cat([p * (i + 1) for i, p in enumerate(x.split(m.sizes, d))][::-1], d), *sizes)


@op
def sliced(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)
    if s[d] < 2:
        return None
    start = b % (s[d] - 1)
    length = 1 + c % (s[d] - start)
    match (a + c) % 4:
        case 0:
            return Apply(lambda m, x: x.narrow(d, *m.sizes), start, length)
        case 1:
            return Apply(lambda m, x: x.transpose(0, d)[m.sizes[0] :].transpose(0, d), start)
        case 2:
            return Apply(lambda m, x: x.transpose(0, d)[::2].transpose(0, d))
    return Apply(lambda m, x: x.transpose(0, d)[:-1].transpose(0, d))


@op
def selected(s: Shape, a: int, b: int, c: int) -> Made:
    if len(s) < 3:
        return None
    d = dim_of(s, a)
    if c % 2:
        return Apply(lambda m, x: x.select(d, b % s[d]))
    return Apply(lambda m, x: torch.stack([p * (i + 1) for i, p in enumerate(x.unbind(d))], 1 + b % (x.ndim - 1)))


@op
def indexed(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)
    index = torch.tensor([(b + i * c) % s[d] for i in range(1 + c % 4)])

    def function(m: Apply, x: Tensor) -> Tensor:
        return x.index_select(d, m.index) if b % 2 else x.transpose(0, d)[m.index].transpose(0, d)

    made = Apply(function)
    made.register_buffer("index", index)
    return made


@op
def partial(s: Shape, a: int, b: int, c: int) -> Made:
    """A layer on some positions, the others pass."""
    if s[-1] < 2:
        return None
    first = 1 + b % (s[-1] - 1)

    def function(m: Apply, x: Tensor) -> Tensor:
        left, right = x.split(m.sizes, -1)
        return torch.cat([m.layer(left), right] if a % 2 else [right, m.layer(left).relu()], -1)

    return Apply(function, first, s[-1] - first, layer=nn.Linear(first, 1 + c % 5))


@op
def padded(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)
    before, after = b % 3, c % 3
    amounts = [0, 0] * (len(s) - 1 - d)
    if a % 2:
        return Apply(lambda m, x: F.pad(x, (*amounts, *m.sizes)), before, after)

    def function(m: Apply, x: Tensor) -> Tensor:
        rest = x.shape[:d], x.shape[d + 1 :]
        return torch.cat([x.new_zeros(*rest[0], m.sizes[0] + 1, *rest[1]), x], d)

    return Apply(function, before)


@pair
def joined(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)
    if b % 3 == 0 and len(s) <= 4:
        return Apply(lambda m, x, y: torch.stack([x, y], d))
    return Apply(lambda m, x, y: torch.cat([x, y, x.tanh()] if c % 2 else [y, x], d))
