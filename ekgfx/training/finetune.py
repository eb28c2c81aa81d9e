"""Fine-tuning, guided by the memory bank or by labels alone."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.data import Data
from ekgfx.data.base import holdout
from ekgfx.data.batches import each_batch, own_share, unpacked
from ekgfx.data.mixing import watched
from ekgfx.data.numbered import numbered
from ekgfx.distributed.team import ALONE, team
from ekgfx.errors import DataError, RecipeError
from ekgfx.training.evaluation import Metrics, evaluate
from ekgfx.training.keeping import Best, Epoch, History, write_log
from ekgfx.training.loss import EKGLoss, KnowledgeSource, LabelLoss, cross_entropy
from ekgfx.training.optimization import Training
from ekgfx.training.outputs import Logits, finder, logits_of
from ekgfx.training.trainer import Progress, Trainer

log = logging.getLogger("ekgfx")


def finetune(
    model: nn.Module,
    data: Data | Iterable[Any],
    *,
    bank: KnowledgeSource | None = None,
    temperature: float | None = None,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    logits: Logits = logits_of,
    val: Iterable[Any] | None = None,
    test: Iterable[Any] | None = None,
    subset: Any = None,
    checkpoint: str | Path | None = None,
    csv: str | Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_batch: Callable[[Progress], None] | None = None,
    parallel: bool = False,
    **settings: Any,
) -> History:
    """Train a (pruned) model in place, guided by the bank (eq. 11 and 12) or by labels alone.

    Of a data set, a part of the training images is held out (`val_fraction`, a tenth; the same every time), and the
    model gets the weights of the epoch that does best on it: of epoch 0, too, which is the model as it came. Where that
    is the best, a warning says so. `val_fraction=0` trains on all images and keeps the last epoch, and so do batches
    without `val`.

    A model that was trained on these images before knows them, and later epochs may forget. Where it has significantly
    more of the held-out images right than of those of `test`, these decide between it and the best epoch, and a line
    says so. Else, and with a `val` of your own, they play no part.

    Args:
        model: trained on the device it is on; left in evaluation mode.
        data: a data set (`ekgfx.data.load`), or batches to iterate once per epoch: `(images, labels, index)`, where
            images are B × …, or V × B × … or a tuple of V where they are V views of each sample (two with a bank, else
            `views=V`); a tuple of inputs, or a mapping of them by name (also with the labels and the index in it, as
            the data sets of transformers give it). Labels may be None with a bank. With a bank, a DataLoader of
            `(images, labels)` will do, shuffled or not: which samples its batches hold is found out (as positions in
            its data set, as `build_bank` took them).
        bank: the memory bank; None trains on the labels alone.
        temperature: T of the guidance; 4 below 1000 classes and 10 from there on.
        loss: label loss of one view, `loss(output, labels)`; cross-entropy is that of the logits.
        logits: where the logits are in a model's output: a function of it, or a key, a field or an index. By default
            they are found, where it is clear (`ekgfx.training.outputs.logits_of`).
        val: batches that tell which epoch is kept; nothing of `data` is held out then.
        test: batches to evaluate on after every epoch, such as `data.loader("test", 256)`, and before the first where
            images are held out.
        subset: indices into the data set's training split; all of it if None.
        checkpoint: file to save to after every epoch, and to go on from where it exists: training that was interrupted
            ends as if it had not been.
        csv: file for a table of the epochs, written after each.
        on_epoch: called after every epoch.
        on_batch: called after every batch (`ekgfx.training.trainer.Progress`).
        parallel: all processes of torchrun call this together and train as one: each takes its part of every batch, and
            a step is what one process would compute on the whole batch, up to rounding (see
            `ekgfx.distributed.parallel`). Only the first writes the checkpoint and evaluates.
        settings: the fields of `ekgfx.training.optimization.Training`.

    Returns:
        The epochs, and which of them was kept.

    Raises:
        TrainingError: the loss is not finite.
        DataError: no batches, or labels that the model has no outputs for.
        RecipeError: an unknown setting, or more processes than samples in a batch.
        RunError: the checkpoint is damaged, belongs to another training, or cannot be written.
        TeamError: another process died.

    Example:
        >>> history = ekgfx.finetune(pruned, data, bank=bank, epochs=1, batch_size=64, lr=0.01)
        >>> print(history)
    """
    training = Training.of(settings)
    mates = team() if parallel else ALONE
    trainer = Trainer(
        model,
        LabelLoss(loss, logits) if bank is None else EKGLoss(bank, temperature, loss, logits, parallel),
        finder(logits),
        training,
        views=training.views or (1 if bank is None else 2),
        mates=mates,
    )
    own = val is not None
    if isinstance(data, Data) and val is None and (bank is not None or data.classes is not None):
        subset, val = _held_out(data, subset, training)
    if training.patience is not None and val is None:
        raise RecipeError("patience needs images that tell which epoch is better: give val_fraction, or val=…")
    judging = mates.first and val is not None
    teaching = bank if judging and not _labelled(val) else None

    def judged() -> Metrics:
        if teaching is not None:
            return evaluate(trainer.judged, _asked(val, teaching), logits=logits)
        return evaluate(trainer.judged, val or (), loss=loss, logits=logits)

    def tested() -> Metrics:
        return evaluate(trainer.judged, test or (), loss=loss, logits=logits)

    if bank is not None:
        data, val = numbered(data), numbered(val) if val is not None and not _labelled(val) else val
    batches, most = _batches(data, trainer, subset)
    path, table = (None if file is None or not mates.first else Path(file) for file in (checkpoint, csv))
    resumed = checkpoint is not None and Path(checkpoint).is_file()
    best = None
    if judging and resumed:
        best = Best(Metrics(0.0, None, 0), trainer.judged)
    elif judging:
        shown = not own and teaching is None and test is not None
        best = Best(judged(), trainer.judged, tested() if shown else None)
    history = trainer.restore(None if checkpoint is None else Path(checkpoint), best)
    stopped = mates.broadcast_object(_enough(history, best, training.patience))
    while len(history) < training.epochs and not stopped:
        number, start = len(history) + 1, time.monotonic()
        mean = trainer.epoch(number, batches(number), most, on_batch or (lambda progress: None))
        epoch = Epoch(number, mean, trainer.optimizer.param_groups[0]["lr"], time.monotonic() - start)
        if best is not None:
            found = judged()
            best.offer(number, found, trainer.judged)
            epoch = replace(epoch, val_loss=found.loss, val_accuracy=found.accuracy)
        if test is not None and mates.first:
            found = tested()
            epoch = replace(epoch, test_loss=found.loss, test_accuracy=found.accuracy)
        history.append(epoch)
        trainer.save(path, history, best)
        if table is not None:
            write_log(table, history, None if best is None else best.before)
        if on_epoch is not None:
            on_epoch(history[-1])
        stopped = training.patience is not None and mates.broadcast_object(_enough(history, best, training.patience))
    kept = len(history) if best is None else best.settled(history).number
    if best is not None:
        model.load_state_dict(best.weights)
    elif trainer.judged is not model:
        model.load_state_dict(trainer.judged.state_dict())
    if mates.size > 1 and val is not None:
        mates.broadcast_model(model)
    model.eval()
    made = History.of(
        history,
        mates.broadcast_object(kept),
        None if best is None else best.before,
        stopped and len(history) < training.epochs,
        None if best is None else best.tested,
    )
    if best is not None and history:
        log.log(logging.INFO if made.kept else logging.WARNING, "%s", made)
    return made


def _enough(history: list[Epoch], best: Best | None, patience: int | None) -> bool:
    """Whether `patience` epochs went by without a better one."""
    return patience is not None and best is not None and len(history) - best.number >= patience


def _held_out(data: Data, subset: Any, training: Training) -> tuple[Any, Iterable[Any] | None]:
    """The training images that are trained on, and batches of those that epochs are judged on (None: none are)."""
    if not training.val_fraction:
        return subset, None
    everything = torch.arange(data.size("train")) if subset is None else torch.as_tensor(subset, dtype=torch.int64)
    labels = data.labels("train")
    try:
        rest, held = holdout(None if labels is None else labels[everything], len(everything), training.val_fraction)
    except DataError:
        log.warning(
            "%d training images are too few to hold %.0f%% of them out: the last epoch is kept, whether or not it is "
            "the best",
            len(everything),
            100 * training.val_fraction,
        )
        return subset, None
    size = training.batch_size
    return everything[rest], data.loader("train", size, subset=everything[held], workers=training.workers)


def _labelled(batches: Iterable[Any] | None) -> bool:
    return any(unpacked(batch)[1] is not None for batch in _first(batches or ()))


def _first(batches: Iterable[Any]) -> Iterator[Any]:
    for batch in each_batch(batches):
        yield batch
        return


def _asked(batches: Iterable[Any] | None, bank: KnowledgeSource) -> Iterator[tuple[Any, Tensor]]:
    """Unlabelled batches with what the bank's best teacher says of them, as probabilities."""
    for batch in each_batch(batches or ()):
        images, _, index = unpacked(batch)
        yield images, bank.logits(index)[:, 0].float().softmax(1)


def _batches(
    data: Data | Iterable[Any], trainer: Trainer, subset: Any
) -> tuple[Callable[[int], Iterable[Any]], int | None]:
    """The training batches of an epoch, and how many they are, where that is known."""
    mates = trainer.mates
    if not isinstance(data, Data):
        count = len(data) if isinstance(data, Sized) else None
        if mates.size > 1:
            return lambda epoch: (own_share(batch, trainer.views_in(batch), mates) for batch in each_batch(data)), count
        labels = lambda batch: unpacked(batch)[1]  # noqa: E731
        return lambda epoch: each_batch(data if epoch > 1 else watched(data, labels, "training batches")), count
    training = trainer.training
    size = data.size("train") if subset is None else len(subset)
    if min(training.batch_size, size) < mates.size:
        raise RecipeError(
            f"{mates.size} processes cannot share batches of {min(training.batch_size, size)} images; start fewer, or "
            "give a larger batch size"
        )
    loader = data.to(trainer.device).loader(
        "train",
        training.batch_size,
        shuffle=True,
        augment=training.augment,
        views=trainer.views,
        seed=training.seed,
        drop_last=size >= training.batch_size,
        subset=subset,
        workers=training.workers,
        part=(mates.rank, mates.size),
    )

    def of_epoch(epoch: int) -> Iterable[Any]:
        loader.set_epoch(epoch)
        return loader

    return of_epoch, len(loader)
