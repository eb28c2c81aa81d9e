"""How good a network is on data."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.errors import DataError
from ekgfx.leaf import evaluation_mode
from ekgfx.loss import check_classes, cross_entropy, is_classes, logits_themselves


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
    logits: Callable[[Any], Tensor] = logits_themselves,
) -> Metrics:
    """The model's loss and accuracy, in evaluation mode; its own mode is put back.

    batches: `(images, labels, …)` with labels. Raises DataError when there are none, or labels don't fit the model.
    """
    device = device_of(model)
    total, right = torch.zeros((), device=device), torch.zeros((), device=device)
    samples = classified = 0
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            if batch[1] is None:
                raise DataError("data without labels cannot be evaluated; give data with labels")
            images, target = to_device(batch[0], device), to_device(batch[1], device)
            output = model(*images) if isinstance(images, tuple | list) else model(images)
            found = logits(output)
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


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lies; the CPU for a model without any."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple or list of them, on `device`; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple | list):
        return tuple(to_device(each, device) for each in value)
    return value
