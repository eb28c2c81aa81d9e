"""What a sub-network is worth: the reward (eq. 4) and the ensemble knowledge it is measured against (eq. 8)."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ekgfx.data.batches import Inputs, device_of, each_batch, to_device, unpacked
from ekgfx.errors import DataError, TrainingError
from ekgfx.search.own import mean_of
from ekgfx.training.loss import at_least_single, check_classes, cross_entropy, is_classes, label_loss
from ekgfx.training.outputs import logits_of

KnowledgeMode = Literal["ensemble", "single", "none"]
"""What the reward compares with: the running ensemble of the sub-networks found, the unpruned network, or nothing."""

Knowledge = Sequence[Tensor]
"""T: one tensor of logits, B × K × …, per validation batch."""

Reward = Callable[[Tensor, Any, Tensor | None], Tensor]
"""A reward of the user's own: of the logits of a batch, its labels and its knowledge."""

ROUNDING = 1e-4, 1e-5
"""Relative and absolute error of a cross-entropy in float32 that are certainly not exceeded."""

Network = Callable[..., Any]
"""Anything that maps a batch of inputs to the model's output: a SubNetwork, or the model itself."""


class ValidationBatch(NamedTuple):
    """inputs: the model's arguments, dim 0 the samples. target: what `loss` takes; None until it is known."""

    inputs: Inputs
    target: Any

    @property
    def samples(self) -> int:
        """B, the samples of this batch."""
        return self.inputs.samples


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
    reward: in place of eq. 4.
    """

    loss: Callable[[Any, Any], Tensor] = cross_entropy
    logits: Callable[[Any], Tensor] = logits_of
    batch_size: int | None = None
    reward: Reward | None = None

    def terms(self, output: Any, target: Any, knowledge: Tensor | None) -> tuple[Tensor, Tensor]:
        """Label loss, and −ℛ = CE(labels, O) + CE(softmax(T), O), each the mean over this batch (eq. 4)."""
        loss = label_loss(self.loss, self.logits)(output, target)
        if self.reward is not None:
            return loss, -mean_of(self.reward, self.logits(output), target, knowledge)
        if knowledge is None:
            return loss, loss
        return loss, loss + cross_entropy(self.logits(output), knowledge.softmax(1))

    def share(self, batch: ValidationBatch, batches: Sequence[ValidationBatch]) -> float:
        """The weight of a batch's mean in the mean over all batches."""
        if self.batch_size is None:
            return batch.samples / sum(b.samples for b in batches)
        return batch.samples / (self.batch_size * len(batches))


Terms = tuple[float, float, float, float]
"""What one batch adds to an evaluation: label loss and −ℛ, both weighted by the batch's share; right answers, and
places that have a class."""


def judge(
    objective: Objective, batches: Sequence[ValidationBatch], knowledge: Knowledge | None, number: int, output: Any
) -> tuple[Tensor, Tensor]:
    """The terms of batch `number` (4 values in float64, where the output is: nothing waits for the device), and the
    logits of its output."""
    batch = batches[number]
    logits = at_least_single(objective.logits(output))
    loss, negative = objective.terms(output, batch.target, None if knowledge is None else knowledge[number])
    right = places = torch.zeros((), dtype=torch.float64, device=logits.device)
    if is_classes(batch.target, logits):
        right = (logits.argmax(1) == batch.target).sum().double()
        places = torch.full_like(right, batch.target.numel())
    share = objective.share(batch, batches)
    return torch.stack([loss.double() * share, negative.double() * share, right, places]), logits


def total(terms: Iterable[Terms]) -> Evaluation:
    """The means over all samples, from the terms of every batch in order. Raises TrainingError when the loss is not
    finite."""
    loss = negative = right = places = 0.0
    for term in terms:
        loss, negative, right, places = loss + term[0], negative + term[1], right + term[2], places + term[3]
    if not (math.isfinite(loss) and math.isfinite(negative)):
        raise TrainingError(
            f"the validation loss is {loss} and the reward {-negative}; check the weights, and that the "
            "images are normalized as the model expects"
        )
    return Evaluation(loss, -negative, right / places if places else None)


def assess(
    network: Network,
    batches: Sequence[ValidationBatch],
    objective: Objective,
    knowledge: Knowledge | None,
    check: bool = False,
) -> tuple[Evaluation, tuple[Tensor, ...]]:
    """The reward of a sub-network on the validation data (eq. 4), and its logits per batch.

    knowledge: T as logits per batch, or None for the label term alone. check: look at the labels first, which waits for
    the device.

    Raises:
        TrainingError: the loss is not finite.
        DataError: with `check`, a label that the model has no output for.
    """
    found, logits = [], []
    with torch.no_grad():
        for number, batch in enumerate(batches):
            output = batch.inputs.into(network)
            if check:
                check_classes(at_least_single(objective.logits(output)), batch.target)
            terms, answer = judge(objective, batches, knowledge, number, output)
            found.append(terms)
            logits.append(answer)
    return total(torch.stack(found).tolist()), tuple(logits)


def least_terms(
    objective: Objective, batches: Sequence[ValidationBatch], knowledge: Knowledge | None
) -> list[float] | None:
    """The least −ℛ that any network can have on each batch, weighted by its share; None where nothing is known.

    Both terms are cross-entropies, and CE(p, q) ≥ H(p) whatever q is (Gibbs); for classes H is 0. Where both are of the
    same logits they are one, CE(y, q) + CE(T, q) = 2·CE((y + T)/2, q) ≥ 2·H((y + T)/2): no answer is right for a label
    and a teacher that disagree. Rounding is allowed for. A loss or a reward of the user's own may be
    anything, negative too.
    """
    if objective.loss is not cross_entropy or objective.reward is not None:
        return None
    least = []
    for number, batch in enumerate(batches):
        soft = [] if knowledge is None else [knowledge[number].softmax(1).double()]
        label = probabilities(batch.target, soft[0]) if soft and objective.logits is logits_of else None
        if label is not None:
            terms = [2 * mean_entropy((soft[0] + label) / 2)]
        else:
            soft += [batch.target.double()] if batch.target.is_floating_point() else []
            terms = [mean_entropy(p) for p in soft]
        certain = sum(max((1 - ROUNDING[0]) * term - 2 * ROUNDING[1], 0.0) for term in terms)
        least.append(certain * objective.share(batch, batches))
    return least


def mean_entropy(p: Tensor) -> float:
    """H(p), mean over samples and positions. p: B × K × …"""
    return float(torch.special.entr(p).sum(1).mean())


def probabilities(target: Tensor, like: Tensor) -> Tensor | None:
    """Labels as B × K × … probabilities; None where they are not of that shape, or some positions have none."""
    if target.is_floating_point():
        return target.double() if target.shape == like.shape else None
    if not is_classes(target, like) or int(target.min()) < 0:
        return None
    return torch.zeros_like(like).scatter_(1, target.unsqueeze(1), 1.0)


def ensemble_knowledge(knowledge: Knowledge, members: int, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tᵢ₊₁ = (n·Tᵢ + O(D_val; Θᵢ₊₁)) / (n + 1), the running mean of logits over n = `members` sub-networks (eq. 8)."""
    return tuple((old * members + new) / (members + 1) for old, new in zip(knowledge, logits, strict=True))


def validation_batches(batches: Iterable[Any], model: nn.Module | None = None) -> tuple[ValidationBatch, ...]:
    """Batches as the search wants them, from any that `ekgfx.data.batches` knows; as a model takes them, where one is
    given.

    Raises DataError for what is no batch, and when some have targets and some do not.
    """
    found = tuple(_validation_batch(batch, model) for batch in each_batch(batches))
    if len({batch.target is None for batch in found}) > 1:
        raise DataError("some validation batches have labels and some have none; give labels for all or for none")
    return found


def label_free(
    network: Network, batches: Sequence[ValidationBatch], objective: Objective
) -> tuple[ValidationBatch, ...]:
    """The batches with the network's soft predictions as labels: softmax(O(D_val; Θ₀)) where `network` is Θ₀."""
    with torch.no_grad():
        return tuple(
            batch._replace(target=at_least_single(objective.logits(batch.inputs.into(network))).softmax(1))
            for batch in batches
        )


def _validation_batch(batch: Any, model: nn.Module | None) -> ValidationBatch:
    images, target, _ = unpacked(batch)
    inputs = Inputs.of(images)
    if model is None:
        return ValidationBatch(inputs, target)
    return ValidationBatch(inputs.onto(model), to_device(target, device_of(model)))
