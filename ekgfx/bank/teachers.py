"""Teachers (eq. 10): which interim sub-networks of the search they are, and how they answer for training samples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ekgfx.axes import Axis
from ekgfx.bank.norms import Noted, Settled, Statistics, statistics
from ekgfx.data import Loader
from ekgfx.data.batches import Inputs, each_batch, unpacked
from ekgfx.data.mixing import even, mixed
from ekgfx.distributed.team import ALONE, Team
from ekgfx.errors import DataError, RunError
from ekgfx.execution.subnetwork import has_batch_norm
from ekgfx.graph.arguments import check_inputs
from ekgfx.search.result import SearchResult
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.loss import at_least_single

STATISTICS = 1024
"""Samples, drawn at random, that show what a cut changed for a teacher's BatchNorms."""

OTHER_SIZE = "the memory bank was begun with batches of another size; use that size, or a new folder"


def pick_teachers(losses: Sequence[float], teachers: int = 5) -> list[int]:
    """Indices of K = `teachers` sub-networks whose losses are spread evenly, the best first (eq. 10).

    losses: of Θ₀, Θ₁, … up to the step before the last (the final sub-network is no teacher). For k = 0…K−1, the one
    whose loss is nearest to min + k·(max − min)/K and not taken yet; the lower loss, then the older, where two are
    equally near. With fewer sub-networks than teachers all are taken.
    """
    values = np.asarray(losses, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    low, high = values.min(), values.max()
    picked: list[int] = []
    for k in range(min(teachers, len(values))):
        left = [int(i) for i in order if i not in picked]
        target = low + k * (high - low) / teachers
        picked.append(min(left, key=lambda i: abs(values[i] - target)))
    return picked


@dataclass(frozen=True)
class Teacher:
    """An interim sub-network that answers with logits. known: the statistics of its BatchNorms."""

    traced: TracedModel
    result: SearchResult
    step: int
    logits: Callable[[Any], Tensor]
    known: Statistics = field(default_factory=dict)

    @property
    def kept(self) -> dict[Axis, Tensor]:
        return self.left.groups.kept(self.result.plans[self.step])

    @property
    def left(self) -> TracedModel:
        """The model without the blocks that were dropped by then."""
        return self.traced.left_by(self.result.plans[self.step])

    @property
    def rescale(self) -> bool:
        return self.result.plans[self.step].rescale

    def statistics(self, batches: Iterable[Any], uncut: Sequence[Noted]) -> Statistics:
        """Of its BatchNorms, on mixed batches. uncut: what those of the unpruned network normalize of them."""
        return statistics(self.left, self.kept, onto(self.traced, batches), uncut, rescale=self.rescale)

    def answers(self, batches: Iterable[Any], skip: int = 0, mates: Team = ALONE) -> Iterator[tuple[Tensor, Tensor]]:
        """Sample indices and logits of every batch, in order; the first `skip` samples are not asked about again. Of
        several processes each answers for every so many-th of the batches."""
        network = Settled(self.left, self.kept, self.known, rescale=self.rescale)
        seen, last, turn = 0, -1, 0
        shared = mates.size > 1
        if isinstance(batches, Loader):  # others are read and dropped
            if skip:
                seen, batches = skip, _rest(batches, skip)
            if mates.size > 1:
                batches, mates = batches.dealt(mates.rank, mates.size), ALONE
        for batch in each_batch(batches):
            inputs, index = _inputs(batch, seen)
            if int(index[0]) <= last or (index.diff() <= 0).any():
                raise DataError(
                    f"the bank's batches must come in ascending order of their samples, but after sample {last} come "
                    f"{index[:4].tolist()}…; turn shuffling off (here samples may be sorted by class)"
                )
            seen, last = seen + len(index), int(index[-1])
            if seen <= skip:
                continue
            if seen - len(index) < skip:
                raise RunError(OTHER_SIZE)
            turn += 1
            if (turn - 1) % mates.size != mates.rank:
                continue
            with torch.no_grad():
                inputs = inputs.onto(self.traced.model)
                check_inputs(self.traced, *inputs)
                output = inputs.into(network)
            yield index, at_least_single(self.logits(output))
        if not seen and not shared:  # of several processes some may have nothing to do
            raise DataError("the memory bank got no batches")


def drawn(traced: TracedModel, batches: Iterable[Any]) -> Iterable[Any]:
    """Mixed batches of samples that are drawn from all of the batches; none where nobody takes statistics of them."""
    if not has_batch_norm(traced):
        return []
    if isinstance(batches, Loader):
        loader = batches.mixed(STATISTICS)
        loader.batch_size = even(len(loader.indices) or 1, batches.batch_size)
        return loader
    names: list[str] = []

    def values(batch: Any) -> tuple[Any, ...]:
        inputs, _ = _inputs(batch, 0)
        names[:] = inputs.kwargs
        return (*inputs.args, *inputs.kwargs.values())

    samples = mixed(map(values, each_batch(batches)), STATISTICS)
    positional = len(samples[0]) - len(names) if samples else 0
    return [(Inputs(each[:positional], dict(zip(names, each[positional:], strict=True))),) for each in samples]


def onto(traced: TracedModel, batches: Iterable[Any]) -> Iterator[Inputs]:
    """The inputs of the batches, on the model's device."""
    return (_inputs(batch, 0)[0].onto(traced.model) for batch in batches)


def _rest(loader: Loader, skip: int) -> Loader:
    try:
        return loader.after(skip)
    except DataError as error:
        raise RunError(OTHER_SIZE) from error


def _inputs(batch: Any, seen: int) -> tuple[Inputs, Tensor]:
    """A batch's inputs and its sample indices, counted on from `seen` where it has none."""
    images, _, index = unpacked(batch)
    inputs = Inputs.of(images)
    return inputs, index.cpu() if len(index) else torch.arange(seen, seen + inputs.samples)
