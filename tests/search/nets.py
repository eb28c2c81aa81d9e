"""Small networks and data that the search's tests share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.models.digits import DigitsCNN
from ekgfx.tracing.traced import TracedModel


class TinyViT(nn.Module):
    """Two attention blocks on 16 tokens of 12 features: heads, MLPs and the stream can be pruned."""

    def __init__(self, heads: int = 3, features: int = 4, classes: int = 10) -> None:
        super().__init__()
        width = heads * features
        self.embed = nn.Conv2d(1, width, 2, stride=2)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.fc1, self.fc2 = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(n, t, -1))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TinySegmenter(nn.Module):
    """A dense task: a dictionary with 4 classes for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.bn, self.c = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.c(F.relu(self.bn(self.b(F.relu(self.a(x))))))}


class Classes(nn.Module):
    """Brightness says the class, 0 to 3, which a BatchNorm that sees one class alone takes away."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 4)
        with torch.no_grad():
            self.conv.weight.fill_(1.0)
            self.conv.bias.zero_()
            place = torch.tensor([-1.5, -0.5, 0.5, 1.5])  # normalized, a class lies at 0.9 times that
            self.head.weight.copy_(place[:, None].expand(4, 6))
            self.head.bias.copy_(-6 * 0.9 * place.square() / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def class_images(count: int = 48, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Images class after class, as bright as their class's number, with a little noise."""
    labels = torch.arange(count) * classes // count
    noise = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    return labels[:, None, None, None] + 0.05 * noise, labels


class Downsampling(nn.Module):
    """A residual block whose shortcut has a convolution of its own, which comes after the block in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 12, 3, stride=2), nn.Conv2d(12, 16, 3, padding=1)
        self.short, self.head = nn.Conv2d(8, 16, 3, stride=2), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        main = self.b(F.relu(self.a(x)))
        return self.head(F.relu(main + self.short(x)).mean((2, 3)))


def cnn(seed: int = 0) -> TracedModel:
    """A CNN with BatchNorm, depthwise layer, squeeze-and-excitation and concatenation; running statistics are set."""
    torch.manual_seed(seed)
    return traced(DigitsCNN(width=8))


def vit(seed: int = 0) -> TracedModel:
    """A transformer without BatchNorm."""
    torch.manual_seed(seed)
    return traced(TinyViT())


def downsampling(seed: int = 0) -> TracedModel:
    """A residual network with a convolution in its shortcut."""
    torch.manual_seed(seed)
    return traced(Downsampling())


def traced(model: nn.Module) -> TracedModel:
    """Perturb what is initialised to constants, and trace."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
            value += 0.1 * torch.rand(value.shape, generator=generator)
    return ekgfx.trace(model.eval(), torch.randn(2, 1, 8, 8))


def batches(samples: int = 24, size: int = 16, classes: int = 10, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Random images with labels, the last batch smaller."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(samples, 1, 8, 8, generator=generator)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    return list(zip(images.split(size), labels.split(size), strict=True))
