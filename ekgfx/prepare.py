"""Step 0 of the paper: data that the network has seen alike, and one epoch on it, before the search begins."""

from dataclasses import dataclass

from torch import Tensor, nn

from ekgfx.data import Data
from ekgfx.errors import DataError
from ekgfx.evaluation import device_of
from ekgfx.finetune import finetune

LR = 1e-3
"""Constant learning rate of the one epoch; no augmentation."""


@dataclass(frozen=True)
class Prepared:
    """What the search works on. batches: (images, labels or None) on the model's device; train and val: the indices in
    the training split of what was trained on and of what is evaluated on."""

    batches: tuple[tuple[Tensor, Tensor | None], ...]
    train: Tensor
    val: Tensor


def prepare(
    model: nn.Module,
    data: Data,
    *,
    train_per_class: int = 256,
    val_per_class: int = 32,
    batch_size: int = 256,
    seed: int = 0,
) -> Prepared:
    """Draw a sub-training and a disjoint validation set per class from the training set, and train `model`, in place,
    for one epoch on the former: lr 1e-3, no augmentation.

    train_per_class: 0 leaves the model as it is, as data without labels does (they count as one class).
    batch_size: of the epoch, and of the validation batches, whose statistics BatchNorm takes.
    """
    train, val = data.search_subset(train_per_class if data.classes else 0, val_per_class, seed)
    device = device_of(model)
    if len(train):
        finetune(
            model,
            data,
            subset=train,
            epochs=1,
            lr=LR,
            batch_size=batch_size,
            schedule="constant",
            augment=False,
            seed=seed,
        )
    model.eval()
    batches = tuple((batch.images, batch.labels) for batch in data.to(device).loader("train", batch_size, subset=val))
    if not batches:
        raise DataError(f"{data.name} gave no validation images; ask for at least one per class")
    return Prepared(batches, train, val)
