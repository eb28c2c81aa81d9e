"""Losses: cross-entropy against labels, and the fine-tuning objective with the bank's knowledge (eq. 11 and 12)."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekgfx.distributed.parallel import summed
from ekgfx.errors import DataError, TrainingError
from ekgfx.training.outputs import Logits, finder, logits_of

MANY_CLASSES = 1000
"""From this many classes on the paper softens with T = 10, below with T = 4."""


class KnowledgeSource(Protocol):
    """What the loss needs of a memory bank: the teachers' logits by sample, best teacher first."""

    def logits(self, index: Tensor) -> Tensor:
        """Logits of every teacher for the samples `index` (B): B × K × C × …"""
        ...


def at_least_single(values: Tensor) -> Tensor:
    """Half-precision values in float32, others as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """CE(target, output), mean over samples and positions. output: logits B × K × …, or a model's output that they are
    found in (`ekgfx.training.outputs.logits_of`); target: classes (integers, B × …) or probabilities (B × K × …).

    Raises DataError for a target of another shape or kind.
    """
    logits = at_least_single(logits_of(output))
    if not isinstance(target, Tensor):
        raise DataError(f"cross-entropy takes labels as numbers, not as a {type(target).__name__}; pass loss=…")
    if target.is_floating_point() and target.shape == logits.shape:
        return functional.cross_entropy(logits, target.to(logits.dtype))
    if not is_classes(target, logits):
        raise DataError(
            f"labels of shape {tuple(target.shape)} ({target.dtype}) do not fit logits of shape {tuple(logits.shape)}: "
            "cross-entropy takes one whole number for every sample (and position), or probabilities (floats) of the "
            "logits' shape; pass other labels, logits=… with the classes in dim 1, or loss=…"
        )
    return functional.cross_entropy(logits, target.long())


def label_loss(loss: Callable[[Any, Any], Tensor], logits: Callable[[Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """The label loss of a model's output: a loss of the user's own sees all of it, cross-entropy the logits in it."""
    if loss is not cross_entropy or logits is logits_of:
        return loss
    return lambda output, target: cross_entropy(logits(output), target)


def check_classes(logits: Tensor, target: Any) -> None:
    """DataError when integer labels name classes that the logits B × K × … do not have."""
    if not isinstance(target, Tensor) or target.is_floating_point() or not target.numel():
        return
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= logits.shape[1]:
        raise DataError(
            f"the data has a label {low if low < 0 else high}, but the model has {logits.shape[1]} outputs (classes "
            f"0…{logits.shape[1] - 1}); use data with the model's classes, or give the model a classifier for the data"
        )


def is_classes(target: Any, logits: Tensor) -> bool:
    """Whether `target` holds one class for every position of logits B × K × …"""
    integers = isinstance(target, Tensor) and not target.is_floating_point() and target.dtype != torch.bool
    return integers and target.shape == logits.shape[:1] + logits.shape[2:]


def default_temperature(classes: int) -> float:
    """T of the paper: 4 below 1000 classes, 10 from there on."""
    return 10.0 if classes >= MANY_CLASSES else 4.0


def softened_kl(x: Tensor, z: Tensor, temperature: float) -> Tensor:
    """KL_T(x‖z) = T·KL(softmax(x/T) ‖ softmax(z/T)) per sample; logits … × C → …. (T, not T²: the paper's scale.)"""
    log_x = functional.log_softmax(x / temperature, -1)
    log_z = functional.log_softmax(z / temperature, -1)
    return temperature * (log_x.exp() * (log_x - log_z)).sum(-1)


def useful_teachers(
    bank: Tensor, student: Tensor, temperature: float, total: Callable[[Tensor], Tensor] = torch.clone
) -> Tensor:
    """Which teachers still know more than the student (eq. 12): a mask of K booleans for the batch.

    bank: B × K × … × C, the best teacher first. student: B × … × C, the mean logits over the views. With
    top = bank[:, 0], teacher k takes part while Σ_batch KL_T(top ‖ M_k) < Σ_batch KL_T(top ‖ student).
    total: takes such sums over this process's part of the batch to those over all of it.
    """
    top = bank[:, 0]
    distance = softened_kl(top[:, None], bank, temperature).transpose(0, 1).flatten(1).sum(1)
    sums = total(torch.cat([distance, softened_kl(top, student, temperature).sum()[None]]))
    return sums[:-1] < sums[-1]


def teacher_knowledge(bank: Tensor, useful: Tensor) -> Tensor:
    """M̄: the mean logits of the useful teachers, B × … × C. bank: B × K × … × C; useful: K booleans."""
    weights = useful.to(bank.dtype)
    return torch.tensordot(weights / weights.sum().clamp(min=1), bank, dims=([0], [1]))


def guided_loss(
    views: Sequence[Tensor],
    label_loss: Tensor | None,
    bank: Tensor,
    temperature: float,
    total: Callable[[Tensor], Tensor] = torch.clone,
) -> Tensor:
    """L = Σ_a [ CE(y, p_a) + KL_T(M̄ ‖ p_a) ] / A, mean over the batch (eq. 11).

    views: A tensors of logits B × … × C. label_loss: Σ_a CE(y, p_a) / A, or None for data without labels.
    bank: B × K × … × C. total: as in `useful_teachers`.
    """
    with torch.no_grad():
        student = torch.stack(tuple(views)).mean(0)
        target = teacher_knowledge(bank, useful_teachers(bank, student, temperature, total))
    guidance = torch.stack([softened_kl(target, view, temperature).mean() for view in views]).mean()
    return guidance if label_loss is None else label_loss + guidance


class EKGLoss(nn.Module):
    """Ensemble-knowledge-guided loss for any training loop: `loss(outputs, labels, index)`.

    Args:
        bank: the memory bank.
        temperature: T; by default 4 below 1000 classes and 10 from there on.
        loss: the label loss of one view, `loss(output, labels)` → mean over the batch.
        logits: where the logits B × C × … are in a model's output: a function of it, or a key, a field or an index; by
            default they are found (`ekgfx.training.outputs.logits_of`).
        parallel: whether all processes of torchrun compute it together, each on its part of the batch.

    Example:
        >>> criterion = ekgfx.EKGLoss(bank)
        >>> batch = next(iter(data.loader("train", 32)))
        >>> loss = criterion([pruned(batch.images)], batch.labels, batch.index)

    `outputs`: what the model gave for each augmented view of the same images (a list, or a tensor V × B × C).
    `labels`: what `loss` takes (B classes), or None for data without labels: then only the bank teaches.
    `index`: B sample indices into the bank.
    """

    def __init__(
        self,
        bank: KnowledgeSource,
        temperature: float | None = None,
        loss: Callable[[Any, Any], Tensor] = cross_entropy,
        logits: Logits = logits_of,
        parallel: bool = False,
    ) -> None:
        super().__init__()
        self.total = summed if parallel else torch.clone
        self.bank, self.temperature, self.logits = bank, temperature, finder(logits)
        self.loss = label_loss(loss, self.logits)

    def forward(self, outputs: Sequence[Any] | Tensor, labels: Any, index: Tensor) -> Tensor:
        views = [at_least_single(self.logits(output)).movedim(1, -1) for output in outputs]
        if not len(index) and len(views[0]):
            raise DataError(
                "the memory bank is asked by sample, and a batch says of none which it is; give (images, labels, index)"
            )
        bank = self.bank.logits(index).to(views[0]).movedim(2, -1)
        if bank[:, 0].shape != views[0].shape:
            raise TrainingError(
                f"the memory bank has logits {tuple(bank[:, 0].shape)} (samples … classes) for this batch, the model "
                f"gives {tuple(views[0].shape)}; the bank belongs to another model or another data set"
            )
        label_loss = None if labels is None else _mean_over_views(self.loss, outputs, labels)
        temperature = self.temperature or default_temperature(views[0].shape[-1])
        return guided_loss(views, label_loss, bank, temperature, self.total)


class LabelLoss(nn.Module):
    """The label loss over one or more views: fine-tuning without knowledge. Called as `EKGLoss` is."""

    def __init__(self, loss: Callable[[Any, Any], Tensor] = cross_entropy, logits: Logits = logits_of) -> None:
        super().__init__()
        self.loss = label_loss(loss, finder(logits))

    def forward(self, outputs: Sequence[Any] | Tensor, labels: Any, index: Tensor) -> Tensor:
        if labels is None:
            raise TrainingError("data without labels can only be fine-tuned with a memory bank; pass bank=…")
        return _mean_over_views(self.loss, outputs, labels)


def _mean_over_views(loss: Callable[[Any, Any], Tensor], outputs: Sequence[Any] | Tensor, labels: Any) -> Tensor:
    return torch.stack([loss(output, labels) for output in outputs]).mean()
