"""Small networks that are hard to export, each for one reason."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Classifier(nn.Module):
    """Convolution, batch norm with real statistics, dropout."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(width, 5)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(F.relu(self.norm(self.stem(x))).mean((2, 3))))


class Detector(nn.Module):
    """Two inputs, and a nested output that holds a tensor twice, an input, a number and None."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, image: Tensor, points: Tensor) -> dict[str, object]:
        joined = self.left(image) + self.right(points)
        return {"boxes": [joined, joined * 2], "scores": joined, "count": 3, "none": None, "image": image}


class Windows(nn.Module):
    """Attention over 5-D tensors, batch × windows × heads × tokens × features, as pooled and nested transformers do."""

    def __init__(self, width: int = 16, heads: int = 2, windows: int = 4) -> None:
        super().__init__()
        self.qkv, self.heads, self.windows = nn.Linear(8, 3 * width), heads, windows
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = (
            self.qkv(x)
            .reshape(batch, self.windows, tokens // self.windows, 3, self.heads, -1)
            .permute(3, 0, 1, 4, 2, 5)
        )
        out = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.head(out.transpose(2, 3).reshape(batch, tokens, -1).mean(1))


class LearnedBias(nn.Module):
    """Attention with a bias computed from parameters: where that needs a gradient, PyTorch takes another kernel, which
    lays its result out in another order. (A bias that is itself a parameter takes that kernel always.)"""

    def __init__(self, width: int = 16, heads: int = 2, tokens: int = 8) -> None:
        super().__init__()
        self.qkv, self.heads = nn.Linear(8, 3 * width), heads
        self.bias, self.head = nn.Parameter(torch.randn(1, heads, tokens, tokens)), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.tanh())
        return self.head(out.transpose(1, 2).reshape(batch, tokens, -1).mean(1))


class FixedBatch(nn.Module):
    """Knows its batch size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1).relu()


class Contiguous(nn.Module):
    """Checks its values, and lays large batches out otherwise, as diffusers' upsampling does."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.isfinite().all()
        x = self.lin(x)
        return x.contiguous() if x.shape[0] >= 64 else x


@torch.library.custom_op("ekgfx_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.clone()


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mystery(nn.Module):
    """Holds an operator that no exporter knows, inside a submodule."""

    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return mystery(x)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), self.Inner())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)
