"""How far a pruned network is from the unpruned one, without labels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from torch.utils import _pytree as pytree

from ekgfx.data.batches import Inputs


@dataclass(frozen=True)
class Judgement:
    """error: of a classifier the mean KL divergence from the unpruned network's outputs, else the squared difference of
    the outputs in their own squares; None where it is no number. agreement: share of images of which both say the same
    class; None where there are no classes."""

    error: float | None
    agreement: float | None

    def better(self, than: "Judgement") -> bool:
        """Whether the error is smaller."""
        return self.error is not None and (than.error is None or self.error < than.error)


class Judge:
    """Compares networks with the unpruned one on the same images."""

    def __init__(self, dense: Callable[..., Any], calls: Sequence[Inputs]) -> None:
        self.calls = calls
        with torch.no_grad():
            self.truth = [_tensors(inputs.into(dense)) for inputs in calls]

    @property
    def classes(self) -> bool:
        """Whether the outputs are those of a classifier."""
        first = self.truth[0]
        return len(first) == 1 and first[0].ndim == 2 and first[0].shape[1] > 1

    def __call__(self, network: Callable[..., Any]) -> Judgement:
        """What a network (in evaluation mode) is worth."""
        with torch.no_grad():
            found = [_tensors(inputs.into(network)) for inputs in self.calls]
        if self.classes:
            pairs = [(a[0].double(), b[0].double()) for a, b in zip(self.truth, found, strict=True)]
            count = sum(len(a) for a, _ in pairs)
            error = sum(float(divergence(a, b)) for a, b in pairs) / count
            same = sum(int((a.argmax(1) == b.argmax(1)).sum()) for a, b in pairs) / count
            return Judgement(_finite(error), same)
        off = size = 0.0
        for truth, other in zip(self.truth, found, strict=True):
            for a, b in zip(truth, other, strict=True):
                off += float((a.double() - b.double()).square().sum())
                size += float(a.double().square().sum())
        return Judgement(_finite(off / size if size else off), None)


def divergence(truth: Tensor, found: Tensor) -> Tensor:
    """KL(softmax(truth) ‖ softmax(found)) of logits B × classes × …, summed over samples and positions."""
    p, q = log_softmax(truth, 1), log_softmax(found, 1)
    return (p.exp() * (p - q)).sum()


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
