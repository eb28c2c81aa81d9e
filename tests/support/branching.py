"""A classifier of 8 × 8 digits in which a sub-module's Python depends on values, as users bring them."""

import torch
from torch import Tensor, nn


class Router(nn.Module):
    """Sends bright images one way and dark ones another; `gain` is a number, the result holds more than tensors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bright, self.dark = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, *, gain: float = 1.0) -> dict[str, Tensor | str]:
        if x.mean() > 0:
            return {"features": self.bright(x) * gain, "way": "?"}
        return {"features": self.dark(x) * gain, "way": "?"}


class Branching(nn.Module):
    """Stem, router (called twice), a part that is free, head. `fixed`: a forward that no narrower network fits."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 8, 1)
        self.router, self.c, self.head = Router(8), nn.Conv2d(8, 16, 3), nn.Linear(16, 10)
        self.fixed = fixed

    def forward(self, x: Tensor) -> Tensor:
        x = self.router(self.stem(x))["features"]
        x = x + self.b(self.a(x).relu())
        x = self.router(x, gain=0.5)["features"].relu()
        x = self.c(x).relu().mean((2, 3))
        return self.head(x.view(-1, 16) if self.fixed else x)


class Careless(nn.Module):
    """The same in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return x if x.mean() > 0 else -x


class Selecting(nn.Module):
    """How many positions it takes depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x[x > 0].mean()


class Finder(nn.Module):
    """Scores the positions at which the first feature is above its mean, as a detector does those of objects."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1).flatten(0, 2)
        return self.score(rows[rows[:, 0] > rows[:, 0].mean()])


class Detector(nn.Module):
    """A body that is free, and as many rows of scores as are found."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.finder = nn.Conv2d(1, 12, 3), nn.Conv2d(12, 8, 1), Finder()

    def forward(self, x: Tensor) -> Tensor:
        return self.finder(self.b(self.a(x).relu())).sigmoid() * 2


def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A factory for the command line."""
    torch.manual_seed(0)
    return Branching(), (torch.randn(1, 1, 8, 8),)
