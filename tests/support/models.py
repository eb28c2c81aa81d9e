"""Small networks whose channel groups were derived by hand.

Every class carries `inputs` (shapes without the batch) and `expected`: group name → (size, places as "parameter:dim").
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Stem and second conv meet in an addition: one group; the inner conv is its own."""

    inputs = ((3, 8, 8),)
    expected = {
        "stem": (8, "stem.weight:0 stem.bias:0 a.weight:1 b.weight:0 b.bias:0 bn.weight:0 bn.bias:0 head.weight:1"),
        "a": (6, "a.weight:0 a.bias:0 b.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.bn, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(x + self.b(F.relu(self.a(x)))))
        return self.head(x.mean((2, 3)))


class Concat(nn.Module):
    """A concatenation keeps its parts apart: two groups in one input dimension."""

    inputs = ((3, 8, 8),)
    expected = {
        "a": (4, "a.weight:0 a.bias:0 c.weight:1"),
        "b": (6, "b.weight:0 b.bias:0 c.weight:1"),
        "c": (5, "c.weight:0 c.bias:0 head.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(10, 5, 3), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.a(x), self.b(x).tanh()], 1)
        return self.head(self.c(x).amax((2, 3)))


class Depthwise(nn.Module):
    """A depthwise conv carries its input's channels; with a multiplier of two each channel has a pair of outputs."""

    inputs = ((3, 8, 8),)
    expected = {
        "a": (6, "a.weight:0 a.bias:0 dw.weight:0 dw.bias:0 twice.weight:0 twice.bias:0 b.weight:1"),
        "twice": (2, "twice.weight:0 twice.bias:0 b.weight:1"),
        "b": (4, "b.weight:0 b.bias:0 head.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.a, self.dw = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
        self.twice, self.b, self.head = nn.Conv2d(6, 12, 3, groups=6), nn.Conv2d(12, 4, 1), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.twice(self.dw(self.a(x)))).mean((2, 3)))


class Grouped(nn.Module):
    """A conv of 4 groups: the group count, the channels within an input group and within an output group are free."""

    inputs = ((3, 8, 8),)
    expected = {
        "a#0": (4, "a.weight:0 a.bias:0 g.weight:0 g.bias:0 b.weight:1"),
        "a#1": (2, "a.weight:0 a.bias:0 g.weight:1"),
        "g": (3, "g.weight:0 g.bias:0 b.weight:1"),
        "b": (5, "b.weight:0 b.bias:0 head.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, groups=4)
        self.b, self.head = nn.Conv2d(12, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.relu(self.g(F.relu(self.a(x))))).mean((2, 3)))


class Shuffle(nn.Module):
    """ShuffleNet's channel shuffle: (2, 4) → (4, 2); `b` reads the channels in the shuffled order."""

    inputs = ((3, 8, 8),)
    expected = {
        "a": (4, "a.weight:0 a.bias:0 b.weight:1"),
        "b": (5, "b.weight:0 b.bias:0 head.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)  # equal pieces: Prod([2], 4)
        x = torch.cat([left, right.relu()], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.b(x).mean((2, 3)))


class SqueezeExcite(nn.Module):
    """The gate's output is tied to the gated channels; its bottleneck is free."""

    inputs = ((3, 8, 8),)
    expected = {
        "a": (8, "a.weight:0 a.bias:0 down.weight:1 up.weight:0 up.bias:0 head.weight:1"),
        "down": (3, "down.weight:0 down.bias:0 up.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.head((x * gate).mean((2, 3)))


class Flatten(nn.Module):
    """Flattened channels: the linear layer's input is channels × 4 × 4."""

    inputs = ((3, 4, 4),)
    expected = {
        "a": (6, "a.weight:0 a.bias:0 fc.weight:1"),
        "fc": (7, "fc.weight:0 fc.bias:0 head.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.a, self.fc, self.head = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(96, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(self.a(x).flatten(1))))


class PackedAttention(nn.Module):
    """Packed qkv = [3]·heads·[features] with the implicit scale: only the heads are free; so is the stream."""

    inputs = ((5, 12),)
    expected = {
        "embed": (
            12,
            "embed.weight:0 embed.bias:0 norm.weight:0 norm.bias:0 qkv.weight:1 "
            "proj.weight:0 proj.bias:0 head.weight:1",
        ),
        "qkv": (3, "qkv.weight:0 qkv.bias:0 proj.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.heads = 3
        self.embed, self.norm, self.qkv = nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 36)
        self.proj, self.head = nn.Linear(12, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        n, t, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(n, t, -1)
        return self.head((x + self.proj(y)).mean(1))


class SplitAttention(nn.Module):
    """Separate q, k, v with a given scale: heads tie all three; q's and k's features are one group, v's another."""

    inputs = ((5, 8),)
    expected = {
        "q#0": (2, "q.weight:0 q.bias:0 k.weight:0 k.bias:0 v.weight:0 v.bias:0 proj.weight:1"),
        "q#1": (4, "q.weight:0 q.bias:0 k.weight:0 k.bias:0"),
        "v": (3, "v.weight:0 v.bias:0 proj.weight:1"),
        "proj": (6, "proj.weight:0 proj.bias:0 head.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.proj, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2).flatten(2)
        return self.head(self.proj(y).amax(1))


class Tied(nn.Module):
    """A token embedding that is also the classifier: the vocabulary is frozen, the width is one group."""

    inputs = ((6,),)
    tokens = 11
    expected = {
        "table": (8, "table.weight:1 up.weight:1 down.weight:0 down.bias:0"),
        "up": (10, "up.weight:0 up.bias:0 down.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 10), nn.Linear(10, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        return self.out(x + self.down(F.gelu(self.up(x))))


class Transposed(nn.Module):
    """A transposed conv has its input channels in weight dim 0 and its output channels in dim 1."""

    inputs = ((3, 8, 8),)
    expected = {
        "a": (6, "a.weight:0 a.bias:0 up.weight:0"),
        "up": (4, "up.weight:1 up.bias:0 skip.weight:0 skip.bias:0 b.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up = nn.Conv2d(3, 6, 2, stride=2), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.skip, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.up(F.relu(self.a(x))) + self.skip(x)))


class TwoInputs(nn.Module):
    """Two inputs that meet in a product of features; the output is a dictionary."""

    inputs = ((4,), (6,))
    expected = {"a": (5, "a.weight:0 a.bias:0 b.weight:0 b.bias:0 head.weight:1")}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.a(x).relu() * self.b(y).sigmoid())}


class PaddedShortcut(nn.Module):
    """A shortcut padded with zero channels (ResNet's option A): padded channels are free on their own."""

    inputs = ((3, 8, 8),)
    expected = {
        "a": (4, "a.weight:0 a.bias:0 b.weight:1 b.weight:0 b.bias:0 head.weight:1"),
        "b#0": (2, "b.weight:0 b.bias:0 head.weight:1"),
        "b#1": (2, "b.weight:0 b.bias:0 head.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = 2, 2
        self.a, self.b, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(F.pad(x, (0, 0, 0, 0, self.before, self.after)) + self.b(x))
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    """In-place operators on a tensor and on a view of it."""

    inputs = ((3, 8, 8),)
    expected = {"a": (6, "a.weight:0 a.bias:0 head.weight:1")}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.flatten(2).add_(1.0).relu_()
        return self.head(x.mean((2, 3)))


class GroupNormed(nn.Module):
    """Group norm of 4 groups splits the channels into groups × members; statistics are over a group's kept members."""

    inputs = ((3, 8, 8),)
    expected = {
        "a#0": (4, "a.weight:0 a.bias:0 norm.weight:0 norm.bias:0 head.weight:1"),
        "a#1": (3, "a.weight:0 a.bias:0 norm.weight:0 norm.bias:0 head.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.head = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.norm(self.a(x))).mean((2, 3)))


class ChannelFilter(nn.Module):
    """ECA: a filter along the channels takes its neighbours among those that are kept; a scalar cast to the features'
    type says nothing about their size."""

    inputs = ((3, 8, 8),)
    expected = {
        "a": (8, "a.weight:0 a.bias:0 head.weight:1"),
    }

    def __init__(self) -> None:
        super().__init__()
        self.a, self.eca, self.head = nn.Conv2d(3, 8, 3), nn.Conv1d(1, 1, 3, padding=1), nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = self.eca(x.mean((2, 3))[:, None]).transpose(1, 2)[..., None].sigmoid()
        return self.head((x * gate * self.scale.type_as(x)).mean((2, 3)))


class AcrossTokens(nn.Module):
    """A 1×1 convolution over tokens leaves the features after them alone (CoaT's aggregation of class tokens)."""

    inputs = ((4, 6),)
    expected = {"a": (8, "a.weight:0 a.bias:0 head.weight:1")}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mix, self.head = nn.Linear(6, 8), nn.Conv1d(4, 1, 1), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.a(x).relu())[:, 0])


class Numbered(nn.Module):
    """Positions by number: a one-hot product with a table reads all of its rows, and leaves its columns free."""

    inputs = ((4, 6),)
    expected = {"a": (8, "a.weight:0 a.bias:0 table:1 head.weight:1")}

    def __init__(self) -> None:
        super().__init__()
        self.a, self.table, self.head = nn.Linear(6, 8), nn.Parameter(torch.randn(5, 8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        numbers = F.one_hot((x.argmax(2) // 2).clamp(max=4), 5).to(self.table)
        return self.head((self.a(x) * (numbers @ self.table)).mean(1))


HAND_DERIVED: list[type[nn.Module]] = [
    Residual,
    Concat,
    Depthwise,
    Grouped,
    Shuffle,
    SqueezeExcite,
    Flatten,
    PackedAttention,
    SplitAttention,
    Tied,
    Transposed,
    TwoInputs,
    PaddedShortcut,
    InPlace,
    GroupNormed,
    ChannelFilter,
    AcrossTokens,
    Numbered,
]


def example(cls: type, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    """Random float64 inputs for one of the networks above (token indices where it has a vocabulary)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = vars(cls).get("tokens")
    if tokens:
        return tuple(torch.randint(0, tokens, (batch, *shape), generator=generator) for shape in cls.inputs)
    return tuple(torch.randn((batch, *shape), generator=generator, dtype=torch.float64) for shape in cls.inputs)
