"""Mixup and CutMix (timm's), for any loss: with labels, with a memory bank, or with both."""

from collections.abc import Callable
from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor
from torch.utils import _pytree as pytree

from ekgfx.data.batches import Inputs
from ekgfx.errors import RecipeError


class Mixing:
    """Mixes the images of a batch in pairs, sample i with sample B − 1 − i, all with one λ.

    mixup, cutmix: alpha of the Beta distribution that λ is drawn from; where both are given, either is used in half of
    the batches.
    """

    def __init__(self, mixup: float, cutmix: float) -> None:
        self.mixup = Mixup(mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=0.0, num_classes=2)

    def __call__(self, shown: Inputs) -> tuple[Inputs, float]:
        """The mixed images (of all views alike), and λ: how much of each image is its own. A batch of an odd number of
        images stays as it is, and λ is 1.

        Raises RecipeError for inputs that are no single tensor of images.
        """
        values = pytree.tree_leaves(tuple(shown))
        if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].ndim != 4:
            raise RecipeError(
                "mixup and cutmix mix one tensor of images (batch × channels × height × width); leave them out"
            )
        count = len(values[0])
        if count % 2:
            return shown, 1.0
        # timm says λ only in the labels that it makes: those of two classes, where the halves of the batch are mixed
        halves = (torch.arange(count) >= count // 2).long().to(values[0].device)
        mixed, soft = self.mixup(values[0].clone(), halves)
        return pytree.tree_map(lambda value: mixed, shown), float(soft[0, 0])


def mixed_loss(
    objective: Callable[[Any, Any, Tensor], Tensor], outputs: list[Any], labels: Any, index: Tensor, part: float
) -> Tensor:
    """The loss of mixed images: λ times that of the own labels (and teachers) and 1 − λ times that of the partners'."""
    loss = objective(outputs, labels, index)
    if part == 1.0:
        return loss
    if not isinstance(labels, Tensor | None):
        raise RecipeError(f"mixup and cutmix take labels as numbers, not as a {type(labels).__name__}; leave them out")
    partners = None if labels is None else labels.flip(0)
    return part * loss + (1 - part) * objective(outputs, partners, index.flip(0))
