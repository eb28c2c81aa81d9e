"""Random programs out of the operators of the rule table, for the fuzzer.

A program is plain numbers: (input kind, steps, ending). A step is (operator, which value it reads, three numbers that
the operator shapes itself by); one that does not fit the value it reads is left out. Every step is a module of its own,
with the integers that a cut may have to change in `sizes`, as users' modules keep theirs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Step = tuple[str, int, int, int, int]
Spec = tuple[str, Sequence[Step], int]
Shape = tuple[int, ...]

INPUTS: dict[str, Shape] = {
    "vector": (6,),
    "tokens": (4, 6),
    "words": (4,),
    "image": (3, 4, 4),
    "sound": (2, 8),
    "volume": (2, 2, 4, 4),
}
LARGEST = 2048  # values per sample


class Apply(nn.Module):
    """One operator: `function(self, x, …)`, with the layers and integers that it takes."""

    def __init__(self, function: Callable[..., Tensor], *sizes: int, **layers: nn.Module) -> None:
        super().__init__()
        self.function, self.sizes = function, tuple(sizes)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(self, *values)


Made = Apply | None
Maker = Callable[[Shape, int, int, int], Made]
OPS: dict[str, Maker] = {}  # of one value
PAIRS: dict[str, Callable[[Shape, int, int, int], Made]] = {}  # of two values of one shape


def op(maker: Maker) -> Maker:
    OPS[maker.__name__] = maker
    return maker


def pair(maker: Maker) -> Maker:
    PAIRS[maker.__name__] = maker
    return maker


def one_of(options: Sequence[Any], number: int) -> Any:
    return options[number % len(options)]


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def dim_of(shape: Shape, number: int) -> int:
    """A dimension other than the batch."""
    return 1 + number % (len(shape) - 1)


# -- pointwise -------------------------------------------------------------------------------------------------------


@op
def pointwise(s: Shape, a: int, b: int, c: int) -> Made:
    functions = (
        F.relu,
        torch.tanh,
        torch.sigmoid,
        F.gelu,
        F.silu,
        torch.abs,
        F.hardswish,
        F.elu,
        torch.cos,
        F.softplus,
    )
    function = one_of(functions, a)
    return Apply(lambda m, x: function(x))


@op
def scalar(s: Shape, a: int, b: int, c: int) -> Made:
    function = one_of((lambda x: x * 0.5 + 1, lambda x: 2 - x, lambda x: x.clamp(-1, 1), lambda x: x.pow(2) / 3), a)
    return Apply(lambda m, x: function(x))


@op
def masked(s: Shape, a: int, b: int, c: int) -> Made:
    return Apply(lambda m, x: torch.where(x > 0.1, x, x.tanh() - 1) if a % 2 else x.masked_fill(x < 0, 0.3))


@op
def prelu(s: Shape, a: int, b: int, c: int) -> Made:
    return Apply(lambda m, x: m.layer(x), layer=nn.PReLU(s[1])) if s[1] > 1 else None


@op
def in_place(s: Shape, a: int, b: int, c: int) -> Made:
    """Writes to a view of a copy."""
    d = dim_of(s, a)

    def function(m: Apply, x: Tensor) -> Tensor:
        y = x.clone()
        y.transpose(1, d).mul_(0.5).add_(1.0)
        return y.relu_()

    return Apply(function)


@pair
def binary(s: Shape, a: int, b: int, c: int) -> Made:
    function = one_of((torch.add, torch.mul, torch.maximum, lambda x, y: x - 0.5 * y, lambda x, y: x * y.sigmoid()), a)
    return Apply(lambda m, x, y: function(x, y))


@pair
def difference_of_means(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)
    return Apply(lambda m, x, y: x - y.mean(d, keepdim=True))


# -- layers ----------------------------------------------------------------------------------------------------------


@op
def linear(s: Shape, a: int, b: int, c: int) -> Made:
    return Apply(lambda m, x: m.layer(x), layer=nn.Linear(s[-1], 2 + a % 7, bias=b % 2 == 0))


@op
def linear_over_channels(s: Shape, a: int, b: int, c: int) -> Made:
    return Apply(lambda m, x: m.layer(x.movedim(1, -1)).movedim(-1, 1), layer=nn.Linear(s[1], 2 + a % 7))


@op
def product_with_a_matrix(s: Shape, a: int, b: int, c: int) -> Made:
    def function(m: Apply, x: Tensor) -> Tensor:
        match a % 3:
            case 0:
                return x @ m.layer.weight.t()
            case 1:
                return torch.einsum("...i,oi->...o", x, m.layer.weight)
        return F.linear(x, m.layer.weight * 0.5)

    return Apply(function, layer=nn.Linear(s[-1], 2 + b % 6, bias=False))


@op
def convolution(s: Shape, a: int, b: int, c: int) -> Made:
    rank = len(s) - 2
    if rank not in (1, 2, 3):
        return None
    groups = one_of(divisors(s[1]), a)
    kernel = min(1 + 2 * (b % 2), *s[2:]) if b % 3 else 1
    kernel -= 1 - kernel % 2
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    out = groups * (1 + c % 4)
    return Apply(lambda m, x: m.layer(x), layer=layer(s[1], out, kernel, padding=kernel // 2, groups=groups))


@op
def strided_convolution(s: Shape, a: int, b: int, c: int) -> Made:
    if len(s) != 4 or min(s[2:]) < 2:
        return None
    return Apply(lambda m, x: m.layer(x), layer=nn.Conv2d(s[1], 2 + a % 6, 2, stride=1 + b % 2, bias=c % 2 == 0))


@op
def transposed_convolution(s: Shape, a: int, b: int, c: int) -> Made:
    rank = len(s) - 2
    if rank not in (1, 2):
        return None
    groups = one_of(divisors(s[1]), a)
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d)[rank - 1]
    return Apply(lambda m, x: m.layer(x), layer=layer(s[1], groups * (1 + b % 3), 2, stride=1 + c % 2, groups=groups))


@op
def weight_normed(s: Shape, a: int, b: int, c: int) -> Made:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(s[-1], 2 + a % 6), dim=b % 2)
    return Apply(lambda m, x: m.layer(x), layer=layer)


@op
def batch_norm(s: Shape, a: int, b: int, c: int) -> Made:
    if len(s) not in (2, 3, 4):
        return None
    layer = nn.BatchNorm2d if len(s) == 4 else nn.BatchNorm1d
    return Apply(lambda m, x: m.layer(x), layer=layer(s[1], affine=a % 3 > 0))


@op
def layer_norm(s: Shape, a: int, b: int, c: int) -> Made:
    last = 1 + a % min(2, len(s) - 1)
    kind = nn.RMSNorm if b % 3 == 0 else nn.LayerNorm
    return Apply(lambda m, x: m.layer(x), layer=kind(s[-last:], elementwise_affine=c % 3 > 0))


@op
def channel_layer_norm(s: Shape, a: int, b: int, c: int) -> Made:
    return Apply(lambda m, x: m.layer(x.movedim(1, -1)).movedim(-1, 1), layer=nn.LayerNorm(s[1]))


@op
def group_norm(s: Shape, a: int, b: int, c: int) -> Made:
    if len(s) < 3:
        return None
    return Apply(lambda m, x: m.layer(x), layer=nn.GroupNorm(one_of(divisors(s[1]), a), s[1], affine=b % 3 > 0))


@op
def instance_norm(s: Shape, a: int, b: int, c: int) -> Made:
    return Apply(lambda m, x: m.layer(x), layer=nn.InstanceNorm2d(s[1], affine=a % 2 > 0)) if len(s) == 4 else None


@op
def hand_written_norm(s: Shape, a: int, b: int, c: int) -> Made:
    d = dim_of(s, a)

    def function(m: Apply, x: Tensor) -> Tensor:
        match b % 4:
            case 0:
                return (x - x.mean(d, keepdim=True)) * torch.rsqrt(x.var(d, keepdim=True, unbiased=False) + 0.1)
            case 1:
                return x / (x.norm(dim=d, keepdim=True) + 0.1)
            case 2:
                return x * torch.rsqrt(x.square().mean(d, keepdim=True) + 0.1)
        return x / (x.abs().amax(d, keepdim=True) + 0.1)

    return Apply(function)


@op
def recurrent(s: Shape, a: int, b: int, c: int) -> Made:
    if len(s) != 3:
        return None
    layer = one_of((nn.LSTM, nn.GRU, nn.RNN), a)(
        s[2], 2 + b % 4, batch_first=True, bidirectional=c % 2 > 0, num_layers=1 + c % 3 // 2
    )
    return Apply(lambda m, x: m.layer(x)[0], layer=layer)


@op
def attention(s: Shape, a: int, b: int, c: int) -> Made:
    """Packed or separate projections; the scale implicit, given, or spelled out; with or without grouped queries."""
    if len(s) != 3:
        return None
    heads, features = 2 + a % 3, 2 + b % 3
    proj = nn.Linear(heads * features, s[2])

    def packed(m: Apply, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = m.qkv(x).reshape(n, t, 3, m.sizes[0], m.sizes[1]).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=None if c % 2 else 0.4)
        return m.proj(y.transpose(1, 2).reshape(n, t, -1))

    def spelled(m: Apply, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (m.sizes[0], -1)).transpose(1, 2) for layer in (m.q, m.k, m.v))
        maps = torch.einsum("nhid,nhjd->nhij", q, k) if b % 2 else q @ k.mT
        return m.proj(((maps * 0.4).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def grouped(m: Apply, x: Tensor) -> Tensor:
        q = m.q(x).unflatten(-1, (2 * m.sizes[0], -1)).transpose(1, 2)
        k, v = (layer(x).unflatten(-1, (m.sizes[0], -1)).transpose(1, 2) for layer in (m.k, m.v))
        if b % 2:
            y = F.scaled_dot_product_attention(q, k, v, scale=0.4, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), scale=0.4)
        return m.out(y.transpose(1, 2).flatten(2))

    def layer() -> nn.Linear:
        return nn.Linear(s[2], heads * features)

    match c % 4:
        case 0 | 1:
            return Apply(packed, heads, features, qkv=nn.Linear(s[2], 3 * heads * features), proj=proj)
        case 2:
            return Apply(spelled, heads, q=layer(), k=layer(), v=layer(), proj=proj)
    q, out = nn.Linear(s[2], 2 * heads * features), nn.Linear(2 * heads * features, s[2])
    return Apply(grouped, heads, q=q, k=layer(), v=layer(), out=out)


@pair
def bilinear(s: Shape, a: int, b: int, c: int) -> Made:
    return Apply(lambda m, x, y: m.layer(x, y), layer=nn.Bilinear(s[-1], s[-1], 2 + a % 4))


@pair
def matrix_product(s: Shape, a: int, b: int, c: int) -> Made:
    if len(s) != 3:
        return None
    if a % 3 == 0:
        return Apply(lambda m, x, y: torch.bmm(x, y.transpose(1, 2)) * 0.3)
    if a % 3 == 1:
        return Apply(lambda m, x, y: torch.einsum("nti,ntj->nij", x, y) * 0.3)
    return Apply(lambda m, x, y: (x.transpose(1, 2) @ y * 0.3).softmax(-1))


# -- shape -----------------------------------------------------------------------------------------------------------


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


# -- pieces ----------------------------------------------------------------------------------------------------------


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


# -- space and statistics --------------------------------------------------------------------------------------------


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


# -- programs --------------------------------------------------------------------------------------------------------


class Program(nn.Module):
    """A stem, the steps that fit, and a classifier of every value that nothing reads."""

    def __init__(self, kind: str, steps: Sequence[Step], ending: int) -> None:
        super().__init__()
        shape = INPUTS[kind]
        width = (4, 6, 8, 12)[ending % 4]
        match kind:
            case "words":
                self.stem: nn.Module = nn.Embedding(7, width)
            case "vector" | "tokens":
                self.stem = nn.Linear(shape[-1], width)
            case _:
                self.stem = {3: nn.Conv2d, 2: nn.Conv1d, 4: nn.Conv3d}[len(shape)](shape[0], width, 1)
        self.steps, self.reads = nn.ModuleList(), []
        self.names: list[str] = []
        with torch.no_grad():
            values = [self.stem(example(kind, 2, torch.float32))]
            for name, back, a, b, c in steps:
                self._add(values, name, back, a, b, c)
        unread = [i for i in range(len(values)) if not any(i in read for read in self.reads)]
        self.heads = nn.ModuleDict({str(i): self._head(values[i].shape, ending // 4) for i in unread[-3:]})

    def _add(self, values: list[Tensor], name: str, back: int, a: int, b: int, c: int) -> None:
        at = len(values) - 1 - back % min(len(values), 3)
        shape = tuple(values[at].shape)
        read: tuple[int, ...] = (at,)
        if name in PAIRS:
            same = [i for i, value in enumerate(values) if tuple(value.shape) == shape]
            read = (at, one_of(same, c))
        step = (OPS | PAIRS)[name](shape, a, b, c)
        if step is None:
            return
        out = step.eval()(*(values[i] for i in read))
        if out.shape[0] != 2 or not 2 <= out.ndim <= 5 or not 0 < out.numel() <= 2 * LARGEST:
            return
        self.steps.append(step)
        self.reads.append(read)
        self.names.append(name)
        values.append(out)

    def _head(self, shape: Shape, ending: int) -> Apply:
        if ending % 2 or math.prod(shape[1:]) > 256:
            keep = dim_of(shape, ending // 2)
            others = tuple(i for i in range(1, len(shape)) if i != keep)
            return Apply(lambda m, x: m.layer(x.mean(others) if others else x), layer=nn.Linear(shape[keep], 3))
        return Apply(lambda m, x: m.layer(x.flatten(1)), layer=nn.Linear(math.prod(shape[1:]), 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        values = [self.stem(x)]
        for step, read in zip(self.steps, self.reads, strict=True):
            values.append(step(*(values[i] for i in read)))
        return [head(values[int(i)]) for i, head in self.heads.items()]


def example(kind: str, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    if kind == "words":
        return torch.randint(0, 7, (batch, *INPUTS[kind]), generator=generator)
    return torch.randn((batch, *INPUTS[kind]), generator=generator, dtype=torch.float64).to(dtype)


def specs() -> st.SearchStrategy[Spec]:
    number = st.integers(0, 23)
    step = st.tuples(st.sampled_from([*OPS, *PAIRS]), st.integers(0, 2), number, number, number)
    steps = st.lists(step, min_size=1, max_size=8)
    return st.tuples(st.sampled_from(list(INPUTS)), steps, st.integers(0, 15))
