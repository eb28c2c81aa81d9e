"""What the teachers of the tests are asked, and what they answer."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ekgfx.bank.norms import Settled, noted, statistics
from ekgfx.data.base import Batch, Split, Views
from ekgfx.data.batches import Inputs
from ekgfx.data.mixing import mixed
from ekgfx.search import SearchResult
from ekgfx.tracing.traced import TracedModel


def training_batches(size: int = 16, samples: int = 50) -> list[tuple[Tensor, Tensor, Tensor]]:
    images = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    index = torch.arange(samples)
    return list(zip(images.split(size), (index % 10).split(size), index.split(size), strict=True))


def answers(
    traced: TracedModel, result: SearchResult, step: int, batches: list[Any], shown: list[Any] | None = None
) -> Tensor:
    """What a teacher says of the batches when its BatchNorms are corrected on `shown` (None: on the batches)."""
    plan = result.plans[step]
    kept = traced.groups.kept(plan)
    shown = mixed([(batch[0],) for batch in batches], 1024) if shown is None else [(batch[0],) for batch in shown]
    shown = [Inputs.of(images) for images in shown]
    known = statistics(traced, kept, shown, noted(traced, shown), rescale=plan.rescale)
    network = Settled(traced, kept, known, rescale=plan.rescale)
    with torch.no_grad():
        return torch.cat([network(batch[0]) for batch in batches])


class Known(Split):
    """Samples in memory that note which batches were asked for."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        self.asked: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.images)

    def all_labels(self) -> Tensor:
        return self.labels

    def batches(self, chunks: Sequence[Tensor], views: Views) -> Iterator[Batch]:
        for chunk in chunks:
            self.asked.append(chunk)
            yield Batch(self.images[chunk], self.labels[chunk], chunk)

    def to(self, device: torch.device) -> "Known":
        return self
