"""A small classifier with a projection that its forward does not run."""

import torch
from torch import Tensor, nn


class Projecting(nn.Sequential):
    """Channels 0 (10) and 2 (12); `project` reads what 2 computes."""

    def __init__(self) -> None:
        layers = (nn.Conv2d(1, 10, 3), nn.ReLU(), nn.Conv2d(10, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        super().__init__(*layers, nn.Flatten(), nn.Linear(12, 10))
        self.project = nn.Linear(12, 7)

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self][:7]:
            x = layer(x)
        return x

    def embed(self, x: Tensor) -> Tensor:
        """What forward does not run."""
        for layer in [*self][:6]:
            x = layer(x)
        return self.project(x)


def build() -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return Projecting(), (torch.randn(2, 1, 8, 8),)
