"""What the teachers of the tests are asked, and what they answer."""

from typing import Any

import torch
from torch import Tensor

from ekgfx.search import SearchResult
from ekgfx.trace import TracedModel


def training_batches(size: int = 16, samples: int = 50) -> list[tuple[Tensor, Tensor, Tensor]]:
    images = torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    index = torch.arange(samples)
    return list(zip(images.split(size), (index % 10).split(size), index.split(size), strict=True))


def answers(traced: TracedModel, result: SearchResult, step: int, batches: list[Any]) -> Tensor:
    plan = result.plans[step]
    network = traced.subnetwork(plan, batch_stats=True, rescale=plan.rescale)
    with torch.no_grad():
        return torch.cat([network(batch[0]) for batch in batches])
