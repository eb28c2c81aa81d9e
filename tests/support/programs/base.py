"""What a step of a random program is: one operator, with its layers and integers."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

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
