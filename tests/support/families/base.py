"""How a family is written down: a network around the real layer, and its groups in a short notation.

In the notation `a>` is what the layer `a` computes (weight dim 0 and, where it has one, its bias; a norm's parameters
as well), `>a` is what it reads (weight dim 1), and `a.table:1` is dim 1 of the parameter `a.table`.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FAMILIES: list["Family"] = []


@dataclass(frozen=True)
class Family:
    """groups: (size, places) pairs. tolerance: relative; larger only where the layer itself computes in float32.

    by_graph: the module whose own Python cannot say its cut (it derives one width from another), so that its graph may
    take its place; all others keep their class.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    groups: tuple[tuple[int, str], ...]
    tolerance: float
    by_graph: str | None

    def example(self, batch: int, seed: int = 0) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn((batch, *s), generator=generator, dtype=torch.float64) for s in self.inputs)


def family(
    *inputs: tuple[int, ...], groups: list[tuple[int, str]], tolerance: float = 1e-10, by_graph: str | None = None
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register the network that the function builds; `inputs` are the shapes of its inputs without the batch."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        FAMILIES.append(Family(build, inputs, tuple(groups), tolerance, by_graph))
        return build

    return register


def spelled(model: nn.Module, places: str) -> frozenset[str]:
    """The notation above as `parameter:dim` places of a model."""
    parameters = dict(model.named_parameters())
    found: set[str] = set()
    for word in places.split():
        if word.startswith(">"):
            found.add(f"{word[1:]}.weight:1")
        elif word.endswith(">"):
            found.update(f"{name}:0" for name in (f"{word[:-1]}.weight", f"{word[:-1]}.bias") if name in parameters)
        else:
            found.add(word)
    unknown = {place for place in found if place.partition(":")[0] not in parameters}
    assert found and not unknown, f"no such parameters: {unknown or places}"
    return frozenset(found)


def expected(model: nn.Module, groups: tuple[tuple[int, str], ...]) -> Counter[tuple[int, frozenset[str]]]:
    """The groups as they are to be found; names aside."""
    return Counter((size, spelled(model, places)) for size, places in groups)


class Images(nn.Module):
    """Stem convolution to `width` channels, the body, and a classifier of its averaged `out` channels."""

    def __init__(self, body: nn.Module, width: int = 8, out: int = 8, channels_last: bool = False) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, width, 3, padding=1), body, nn.Linear(out, 2)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.body(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.channels_last else self.body(x)
        return self.head(x.mean((2, 3)))


class Tokens(nn.Module):
    """Tokens of 5 features embedded to `width`, the body, and a classifier of their mean."""

    def __init__(self, body: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(5, width), body, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).mean(1))
