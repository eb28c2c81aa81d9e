"""How good a network is on data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.data.batches import Inputs, device_of, each_batch, to_device, unpacked
from ekgfx.errors import DataError
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.training.loss import check_classes, cross_entropy, is_classes, label_loss
from ekgfx.training.outputs import Logits, finder, logits_of


@dataclass(frozen=True)
class Metrics:
    """Means over samples. loss: label loss; accuracy: fraction of right classes, None where targets are no classes."""

    loss: float
    accuracy: float | None
    samples: int


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    logits: Logits = logits_of,
) -> Metrics:
    """The model's loss and accuracy, in evaluation mode; its own mode is put back.

    batches: `(images, labels, …)` or mappings, with labels (`ekgfx.data.batches`). loss, logits: as in `finetune`.
    Raises DataError when there are none, or labels don't fit the model.
    """
    device = device_of(model)
    find = finder(logits)
    loss = label_loss(loss, find)
    total, right = torch.zeros((), device=device), torch.zeros((), device=device)
    samples = classified = 0
    with evaluation_mode(model), torch.no_grad():
        for batch in each_batch(batches):
            images, labels, _ = unpacked(batch)
            if labels is None:
                raise DataError("data without labels cannot be evaluated; give data with labels")
            target = to_device(labels, device)
            output = Inputs.of(images).onto(model).into(model)
            found = find(output)
            check_classes(found, target)
            total += loss(output, target) * len(found)
            samples += len(found)
            if is_classes(target, found):
                right += (found.argmax(1) == target).sum()
                classified += target.numel()
    if not samples:
        raise DataError("there is no batch to evaluate on")
    return Metrics(float(total) / samples, float(right) / classified if classified else None, samples)


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, but BatchNorm normalizes by the statistics of the batch; its running averages are left alone."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    with evaluation_mode(model):
        try:
            for norm in norms:
                norm.train()
                norm.track_running_stats = False
            yield
        finally:
            for norm, tracked in zip(norms, tracking, strict=True):
                norm.track_running_stats = tracked
