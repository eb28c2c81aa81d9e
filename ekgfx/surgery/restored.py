"""Running statistics that a file of weights could not hold, found again on images.

Half precision ends at 65504. A larger variance is infinite in such a file, and its channel is constant from then on: a
network that runs, and is less often right than it was.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.surgery.calibrate import averages, estimated


def restore_statistics(model: nn.Module, batches: Iterable[Any], *, limit: int | None = None) -> tuple[str, ...]:
    """Estimate the running statistics (of BatchNorm and its like) that are infinite or NaN, in place.

    All others stay, and so do all weights. Do this before anything is traced, searched or repaired: what these compare
    with is the unpruned network as it is. The command does it by itself.

    Args:
        model: the unpruned model, on any device; each module is put back in its own mode.
        batches: as `ekgfx.calibrate` takes them. Where no statistics are lost, they are not read.
        limit: at most this many batches.

    Returns:
        Which statistics were estimated, in words; empty where all were finite.

    Raises:
        DataError: there is no batch, a batch is too small to have statistics, or what the batches give is not finite
            either. The model is as it was.

    Example:
        >>> ekgfx.restore_statistics(model, data.loader("train", 256), limit=4)
    """
    norms = {name: module for name, module in model.named_modules() if not _finite(averages(module).values())}
    if not norms:
        return ()
    before = {name: {key: value.clone() for key, value in _buffers(norm).items()} for name, norm in norms.items()}
    estimated(model, batches, limit=limit, among=norms)
    found = []
    for name, norm in norms.items():
        for key, value in _buffers(norm).items():
            old = before[name][key]
            new = ~old.isfinite() & value.isfinite()  # a norm without momentum keeps what it has
            value.copy_(torch.where(new, value, old))
            if bool(new.any()):
                found.append(f"{name}.{key}".lstrip(".") + f" ({int(new.sum())} of {new.numel()})")
    return tuple(found)


def _finite(values: Iterable[Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values)


def _buffers(norm: nn.Module) -> dict[str, Tensor]:
    return dict(norm.named_buffers(recurse=False))
