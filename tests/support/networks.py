"""Random networks out of the blocks that architectures are made of, for property tests."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F


class Conv(nn.Module):
    def __init__(self, c: int, out: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, out, kernel, padding=kernel // 2, groups=groups), nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, c: int, inner: int) -> None:
        super().__init__()
        self.a, self.b = Conv(c, inner, 1, 1), nn.Conv2d(inner, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x))


class Concat(nn.Module):
    def __init__(self, c: int, a: int, b: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(c, a, 1), nn.Conv2d(c, b, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), x, F.silu(self.b(x))], 1)


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(c, inner), nn.Linear(inner, c)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


class Gate(nn.Module):
    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c, 2 * out, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, dim=1)
        return a * b.sigmoid()


class Partial(nn.Module):
    """A convolution on the first channels only."""

    def __init__(self, c: int, first: int) -> None:
        super().__init__()
        self.sizes = [first, c - first]
        self.conv = nn.Conv2d(first, first, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split(self.sizes, 1)
        return torch.cat([self.conv(a), b], 1)


class Shuffle(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


class ChannelLayerNorm(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Attention(nn.Module):
    def __init__(self, c: int, heads: int, features: int, scale: float | None) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv, self.proj = nn.Linear(c, 3 * heads * features), nn.Linear(heads * features, c)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).reshape(n, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        return x + self.proj(y).transpose(1, 2).unflatten(2, (h, w))


class ZeroPad(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class UpDown(nn.Module):
    """Space to channels, a convolution, and back; the transposed convolution restores the size."""

    def __init__(self, c: int, out: int) -> None:
        super().__init__()
        self.a, self.up = nn.Conv2d(4 * c, out, 1), nn.ConvTranspose2d(out, out, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.a(F.pixel_unshuffle(x, 2)).tanh())


class RandomNet(nn.Module):
    """A stem, the drawn blocks, and a classifier on flattened or averaged features; 4 × 4 images of 3 channels."""

    def __init__(self, stem: int, blocks: list[tuple[Any, ...]], flatten: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, stem, 3, padding=1)
        self.blocks, c = nn.ModuleList(), stem
        for kind, *numbers in blocks:
            block, c = make(kind, c, *numbers)
            self.blocks.append(block)
        self.flatten = flatten
        self.head = nn.Linear(16 * c if flatten else c, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1) if self.flatten else x.mean((2, 3)))


def divisor(c: int, at_most: int) -> int:
    return next(d for d in range(min(at_most, c), 0, -1) if c % d == 0)


def make(kind: str, c: int, p: int, q: int) -> tuple[nn.Module, int]:
    """A block that takes `c` channels, shaped by two drawn numbers p, q ≥ 2; and its output channels."""
    g = divisor(c, q)
    match kind:
        case "conv":
            return Conv(c, p, 3, 1), p
        case "grouped":
            return Conv(c, g * p, 1, g), g * p
        case "depthwise":
            return Conv(c, c, 3, c), c
        case "residual":
            return Residual(c, p), c
        case "concat":
            return Concat(c, p, q), c + p + q
        case "se":
            return SqueezeExcite(c, p), c
        case "gate":
            return Gate(c, p), p
        case "partial" if c > 1:
            return Partial(c, 1 + p % (c - 1)), c
        case "shuffle":
            return Shuffle(g), c
        case "group norm":
            return nn.GroupNorm(g, c), c
        case "layer norm":
            return ChannelLayerNorm(c), c
        case "attention":
            return Attention(c, q, p, None if p % 2 else 0.3), c
        case "pad":
            return ZeroPad(p, q), c + p + q
        case "up down":
            return UpDown(c, p), p
    return nn.Identity(), c


KINDS = [
    *("conv", "grouped", "depthwise", "residual", "concat", "se", "gate", "partial", "shuffle"),
    *("group norm", "layer norm", "attention", "pad", "up down"),
]


def specs() -> st.SearchStrategy[tuple[int, list[tuple[str, int, int]], bool]]:
    """Arguments of RandomNet."""
    block = st.tuples(st.sampled_from(KINDS), st.integers(2, 7), st.integers(2, 5))
    return st.tuples(st.sampled_from([4, 6, 8, 12]), st.lists(block, min_size=1, max_size=5), st.booleans())
