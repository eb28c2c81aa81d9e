"""Whether batches mix their classes, and mixed batches from ones that need not.

A batch of one class has other statistics than the data: a network whose BatchNorms take them answers nonsense.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("ekgfx")

MOST_ALIKE = 0.1
"""How much more often than by chance two samples of a batch may share their class; 1 is always."""
SURE = 5.0
"""Standard deviations beyond which it is not by chance."""
FEW = 16
"""Samples of one class that are not by chance either, where there are others."""


class Mixture:
    """How batches mix their classes, from their labels, batch by batch.

    In mixed batches two samples of one batch share their class as often as any two samples do. Both are counted.
    """

    def __init__(self) -> None:
        self.classes = Counter[int]()
        self.pairs = self.alike = 0

    def see(self, target: Any) -> None:
        """The labels of another batch: B classes, or B × C probabilities or scores; others are passed over."""
        if not isinstance(target, Tensor):
            return
        if target.is_floating_point() and target.ndim == 2 and target.shape[1] > 1:
            target = target.argmax(1)
        if target.ndim != 1 or target.is_floating_point():
            return
        found, counts = (values.tolist() for values in target.unique(return_counts=True))
        self.classes.update(dict(zip(found, counts, strict=True)))
        self.pairs += math.comb(len(target), 2)
        self.alike += sum(math.comb(count, 2) for count in counts)

    def fault(self, known: int | None = None) -> str | None:
        """What is wrong with the batches so far; None where nothing is. known: classes that there are, if that is
        known."""
        samples = self.classes.total()
        if len(self.classes) == 1 and (known or 1) > 1 and samples >= FEW:
            return f"all {samples} samples are of class {next(iter(self.classes))}, of {known}"
        if len(self.classes) < 2 or not self.pairs:
            return None
        chance = sum(math.comb(count, 2) for count in self.classes.values()) / math.comb(samples, 2)
        excess = self.alike - chance * self.pairs
        if excess < MOST_ALIKE * (1 - chance) * self.pairs:
            return None
        if excess < SURE * math.sqrt(self.pairs * chance * (1 - chance)):
            return None
        return (
            f"they come sorted by class: two samples of one batch share their class in {self.alike / self.pairs:.0%} "
            f"of all cases, any two in {chance:.0%}"
        )


def warn(what: str, fault: str | None) -> None:
    """Say what is wrong with batches, and what to do. what: which batches they are."""
    if fault is not None:
        log.warning(
            f"{what}: {fault}. BatchNorm takes the statistics of each batch, which then are not those of the data: "
            "shuffle the samples, for example by DataLoader(..., shuffle=True)"
        )


def watched(batches: Iterable[Any], labels: Any, what: str) -> Iterator[Any]:
    """The batches as they are; it is said once where they turn out to be sorted. labels: from a batch to its labels,
    which are looked at where that waits for no device."""
    mixture, said = Mixture(), False
    for batch in batches:
        target = labels(batch)
        if not said and isinstance(target, Tensor) and target.device.type == "cpu":
            mixture.see(target)
            if (fault := mixture.fault()) is not None:
                warn(what, fault)
                said = True
        yield batch


def mixed(batches: Iterable[tuple[Any, ...]], count: int) -> list[tuple[Any, ...]]:
    """`count` samples (or all there are) of one pass over `batches`, drawn at random but the same every time, in mixed
    batches of about the first one's size.

    batches: tuples of inputs; tensors as long as the first have the samples in dim 0, other values belong to all.
    Memory holds the samples that are drawn (reservoir sampling, Vitter 1985).
    """
    draw = np.random.default_rng(0)
    kept: list[tuple[Any, ...]] = []
    each: list[bool] = []  # which of the inputs have the samples in dim 0
    size = seen = 0
    for inputs in batches:
        samples = next(len(value) for value in inputs if isinstance(value, Tensor))
        each = each or [isinstance(value, Tensor) and value.ndim > 0 and len(value) == samples for value in inputs]
        size = size or samples
        for number in range(samples):
            place = seen if seen < count else int(draw.integers(seen + 1))
            seen += 1
            if place < count:
                parts = zip(inputs, each, strict=True)
                kept[place : place + 1] = [tuple(v[number : number + 1].clone() if own else v for v, own in parts)]
    alike: dict[Any, list[tuple[Any, ...]]] = {}  # sequences may differ in length from batch to batch
    for sample in (kept[place] for place in draw.permutation(len(kept))):
        shapes = tuple(value.shape for value, own in zip(sample, each, strict=True) if own)
        alike.setdefault(shapes, []).append(sample)
    return [
        tuple(torch.cat(v) if own else v[0] for v, own in zip(zip(*part, strict=True), each, strict=True))
        for members in alike.values()
        for step in [even(len(members), size)]
        for part in (members[start : start + step] for start in range(0, len(members), step))
    ]


def even(samples: int, most: int) -> int:
    """The size of as few batches as `most` allows that are about equally large: none is too small for statistics."""
    return -(-samples // -(-samples // most))
