"""Attention over a flattened map, whose rows are a product of sizes."""

from torch import Tensor, nn


class Attending(nn.Module):
    """Attention between the places of a map of half the size: its rows are batch x height x width, one product."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.attention = nn.Conv2d(3, 8, 3, 2, 1), nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.down(x).flatten(2).mT
        return self.attention(tokens, tokens, tokens)[0].mean(1)
