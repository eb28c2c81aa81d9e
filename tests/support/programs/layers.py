"""Pointwise operators and layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.programs.base import Apply, Made, Shape, dim_of, divisors, one_of, op, pair


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
