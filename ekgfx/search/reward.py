"""What a sub-network is worth: the reward (eq. 4) and the ensemble knowledge it is measured against (eq. 8)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ekgfx.errors import DataError, TrainingError
from ekgfx.loss import at_least_single, check_classes, cross_entropy, is_classes, logits_themselves

KnowledgeMode = Literal["ensemble", "single", "none"]
"""What the reward compares with: the running ensemble of the sub-networks found, the unpruned network, or nothing."""

Knowledge = Sequence[Tensor]
"""T: one tensor of logits, B × K × …, per validation batch."""

Network = Callable[..., Any]
"""Anything that maps a batch of inputs to the model's output: a SubNetwork, or the model itself."""


class ValidationBatch(NamedTuple):
    """inputs: the model's arguments, dim 0 the samples. target: what `loss` takes; None until it is known."""

    inputs: tuple[Any, ...]
    target: Any

    @property
    def samples(self) -> int:
        """B, the samples of this batch."""
        return next(value.shape[0] for value in self.inputs if isinstance(value, Tensor))


class Evaluation(NamedTuple):
    """Means over the validation samples. loss: against the labels; reward: ℛ; accuracy: None without classes."""

    loss: float
    reward: float
    accuracy: float | None


@dataclass(frozen=True)
class Objective:
    """The terms of the reward.

    loss(output, target): mean over the batch's samples. logits(output): B × K × …, compared with the knowledge.
    batch_size: None divides sums over samples by their number. A number divides the sum over each batch by it, full or
    not, as the authors' program does (its losses are 0.625 of the mean over the 320 samples in batches of 256 and 64).
    """

    loss: Callable[[Any, Any], Tensor] = cross_entropy
    logits: Callable[[Any], Tensor] = logits_themselves
    batch_size: int | None = None

    def terms(self, output: Any, target: Any, knowledge: Tensor | None) -> tuple[Tensor, Tensor]:
        """Label loss, and −ℛ = CE(labels, O) + CE(softmax(T), O), each the mean over this batch (eq. 4)."""
        loss = self.loss(output, target)
        if knowledge is None:
            return loss, loss
        return loss, loss + cross_entropy(self.logits(output), knowledge.softmax(1))

    def share(self, batch: ValidationBatch, batches: Sequence[ValidationBatch]) -> float:
        """The weight of a batch's mean in the mean over all batches."""
        if self.batch_size is None:
            return batch.samples / sum(b.samples for b in batches)
        return batch.samples / (self.batch_size * len(batches))


class Tally:
    """Sums up the reward of one sub-network, batch by batch."""

    def __init__(self, objective: Objective, batches: Sequence[ValidationBatch], knowledge: Knowledge | None) -> None:
        self.objective, self.batches, self.knowledge = objective, batches, knowledge
        self.loss = self.negative = 0.0
        self.right = self.classified = 0

    def add(self, number: int, output: Any) -> Tensor:
        """Take the output for batch `number`; returns its logits."""
        batch = self.batches[number]
        logits = at_least_single(self.objective.logits(output))
        check_classes(logits, batch.target)
        terms = self.objective.terms(output, batch.target, None if self.knowledge is None else self.knowledge[number])
        weight = self.objective.share(batch, self.batches)
        self.loss += float(terms[0]) * weight
        self.negative += float(terms[1]) * weight
        if is_classes(batch.target, logits):
            self.right += int((logits.argmax(1) == batch.target).sum())
            self.classified += batch.target.numel()
        return logits

    def evaluation(self) -> Evaluation:
        """The means over all samples. Raises TrainingError when the loss is not finite."""
        if not (math.isfinite(self.loss) and math.isfinite(self.negative)):
            raise TrainingError(
                f"the validation loss is {self.loss} and the reward {-self.negative}; check the weights, and that the "
                "images are normalized as the model expects"
            )
        return Evaluation(self.loss, -self.negative, self.right / self.classified if self.classified else None)


def evaluate(
    network: Network, batches: Sequence[ValidationBatch], objective: Objective, knowledge: Knowledge | None
) -> tuple[Evaluation, tuple[Tensor, ...]]:
    """The reward of a sub-network on the validation data (eq. 4), and its logits per batch.

    knowledge: T as logits per batch, or None for the label term alone. Raises TrainingError when the loss is not
    finite.
    """
    tally = Tally(objective, batches, knowledge)
    with torch.no_grad():
        logits = [tally.add(number, network(*batch.inputs)) for number, batch in enumerate(batches)]
    return tally.evaluation(), tuple(logits)


def ensemble_knowledge(knowledge: Knowledge, members: int, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tᵢ₊₁ = (n·Tᵢ + O(D_val; Θᵢ₊₁)) / (n + 1), the running mean of logits over n = `members` sub-networks (eq. 8)."""
    return tuple((old * members + new) / (members + 1) for old, new in zip(knowledge, logits, strict=True))


def validation_batches(batches: Iterable[Any]) -> tuple[ValidationBatch, ...]:
    """Batches as the search wants them: (images | tuple of inputs, target, …); a bare tensor has no target.

    Raises DataError when some have targets and some do not.
    """
    found = tuple(map(_validation_batch, batches))
    if len({batch.target is None for batch in found}) > 1:
        raise DataError("some validation batches have labels and some have none; give labels for all or for none")
    return found


def label_free(
    network: Network, batches: Sequence[ValidationBatch], objective: Objective
) -> tuple[ValidationBatch, ...]:
    """The batches with the network's soft predictions as labels: softmax(O(D_val; Θ₀)) where `network` is Θ₀."""
    with torch.no_grad():
        return tuple(
            batch._replace(target=at_least_single(objective.logits(network(*batch.inputs))).softmax(1))
            for batch in batches
        )


def _validation_batch(batch: Any) -> ValidationBatch:
    images, target = (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])
    return ValidationBatch(tuple(images) if isinstance(images, tuple | list) else (images,), target)
