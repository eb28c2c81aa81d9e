"""Step 0 of the paper: data that the network has seen alike, and one epoch on it, before the search begins."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ekgfx.data import Data
from ekgfx.data.batches import Inputs, device_of, unpacked
from ekgfx.errors import DataError
from ekgfx.training.evaluation import batch_statistics
from ekgfx.training.finetune import finetune
from ekgfx.training.loss import at_least_single, check_classes
from ekgfx.training.outputs import Logits, finder, logits_of

LR = 1e-3
"""Constant learning rate of the one epoch; no augmentation."""


@dataclass(frozen=True)
class Prepared:
    """What the search works on. batches: (images, labels or None) on the model's device; train and val: the indices in
    the training split of what was trained on and of what is evaluated on, in the order of the batches."""

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
    val_batch_size: int | None = None,
    hardest_first: bool = False,
    logits: Logits = logits_of,
    seed: int = 0,
) -> Prepared:
    """Draw a sub-training and a disjoint validation set per class from the training set, and train `model`, in place,
    for one epoch on the former: lr 1e-3, no augmentation.

    train_per_class: 0 leaves the model as it is, as data without labels does (they count as one class).
    batch_size: of the epoch. val_batch_size: of the validation batches, whose statistics BatchNorm takes (None: of the
    same size).
    logits: where the logits are in the model's output, as in `finetune`.
    hardest_first: order the validation images as `hardness_order` does, rather than at random.
    The defaults are the paper's. Batches of 64, the hardest first, make a search shorter, at some cost in accuracy.
    """
    train, val = adapt(model, data, train_per_class, val_per_class, batch_size, logits, seed)
    data = data.to(device_of(model))
    val_batch_size = val_batch_size or batch_size
    if hardest_first and data.classes and len(val):
        val = val[hardness_order(model, data.loader("train", val_batch_size, subset=val), logits)]
    batches = tuple((batch.images, batch.labels) for batch in data.loader("train", val_batch_size, subset=val))
    if not batches:
        raise DataError(f"{data.name} gave no validation images; ask for at least one per class")
    return Prepared(batches, train, val)


def adapt(
    model: nn.Module,
    data: Data,
    train_per_class: int,
    val_per_class: int,
    batch_size: int,
    logits: Logits = logits_of,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Trains `model` as `prepare` does. Returns the samples to train and to validate on, of which none of the latter is
    loaded."""
    train, val = data.search_subset(train_per_class if data.classes else 0, val_per_class, seed)
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
            val_fraction=0,
            logits=logits,
            seed=seed,
        )
    model.eval()
    return train, val


def hardness_order(model: nn.Module, batches: Iterable[Any], logits: Logits = logits_of) -> Tensor:
    """Positions of the samples in `batches` by their loss, the largest first, with BatchNorm on the batch's statistics
    as in the search.

    What candidates differ in is how they fare on the few images that the network is unsure of. With those in the first
    batch, the search finds out early which candidates cannot win (`ekgfx.search.race`).

    batches: (images, classes, …). Returns indices on the CPU; equal losses keep their order.
    """
    losses = []
    with batch_statistics(model), torch.no_grad():
        for batch in batches:
            images, labels, _ = unpacked(batch)
            output = at_least_single(finder(logits)(Inputs.of(images).onto(model).into(model)))
            check_classes(output, labels)
            losses.append(functional.cross_entropy(output, labels, reduction="none"))
    return torch.cat(losses).cpu().argsort(descending=True, stable=True)
