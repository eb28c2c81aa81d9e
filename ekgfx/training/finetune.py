"""Fine-tuning, guided by the memory bank or by labels alone."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.base.schema import read
from ekgfx.data import Data
from ekgfx.data.batches import (
    Inputs,
    device_of,
    each_batch,
    half_of,
    of_view,
    own_share,
    side_by_side,
    to_device,
    unpacked,
)
from ekgfx.data.mixing import watched
from ekgfx.distributed.parallel import SharedNorms, add_gradients
from ekgfx.distributed.team import ALONE, Team, team
from ekgfx.errors import DataError, RecipeError, RunError, TrainingError
from ekgfx.training.evaluation import evaluate
from ekgfx.training.loss import EKGLoss, KnowledgeSource, LabelLoss, check_classes, cross_entropy
from ekgfx.training.optimization import Training
from ekgfx.training.outputs import Logits, finder, logits_of
from ekgfx.training.state import load_state, save_state

CHECK_EVERY = 50
"""Batches between two looks at the loss: every look waits for the device."""


@dataclass(frozen=True)
class Epoch:
    """One epoch of training. number: from 1; loss: mean over its batches; lr; seconds: of training. test_loss and
    test_accuracy: None without test data."""

    number: int
    loss: float
    lr: float
    seconds: float
    test_loss: float | None = None
    test_accuracy: float | None = None


def finetune(
    model: nn.Module,
    data: Data | Iterable[Any],
    *,
    bank: KnowledgeSource | None = None,
    temperature: float | None = None,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    logits: Logits = logits_of,
    test: Iterable[Any] | None = None,
    subset: Any = None,
    checkpoint: str | Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_batch: Callable[[int], None] | None = None,
    parallel: bool = False,
    **settings: Any,
) -> tuple[Epoch, ...]:
    """Train a (pruned) model in place, guided by the bank (eq. 11 and 12) or by labels alone.

    Args:
        model: trained on the device it is on; left in evaluation mode.
        data: a data set (`ekgfx.data.load`), or batches to iterate once per epoch: `(images, labels, index)`, where
            images are B × …, or with `views=V` V × B × … or a tuple of V; a tuple of inputs, or a mapping of them by
            name (also with the labels and the index in it, as the data sets of transformers give it). Labels may be
            None with a bank.
        bank: the memory bank; None trains on the labels alone.
        temperature: T of the guidance; 4 below 1000 classes and 10 from there on.
        loss: label loss of one view, `loss(output, labels)`; cross-entropy is that of the logits.
        logits: where the logits are in a model's output: a function of it, or a key, a field or an index. By default
            they are found, where it is clear (`ekgfx.training.outputs.logits_of`).
        test: batches to evaluate on after every epoch, such as `data.loader("test", 256)`.
        subset: indices into the data set's training split; all of it if None.
        checkpoint: file to save to after every epoch, and to go on from where it exists: training that was interrupted
            ends as if it had not been.
        on_epoch, on_batch: called after every epoch, and after every batch with its number in the epoch.
        parallel: all processes of torchrun call this together and train as one: each takes its part of every batch, and
            a step is what one process would compute on the whole batch, up to rounding (see
            `ekgfx.distributed.parallel`). Only the first writes the checkpoint and evaluates.
        settings: the fields of `ekgfx.training.optimization.Training`.

    Raises:
        TrainingError: the loss is not finite.
        DataError: no batches, or labels that the model has no outputs for.
        RecipeError: an unknown setting, or more processes than samples in a batch.
        RunError: the checkpoint is damaged, belongs to another training, or cannot be written.
        TeamError: another process died.
    """
    training = Training.of(settings)
    mates = team() if parallel else ALONE
    trainer = _Trainer(
        model,
        LabelLoss(loss, logits) if bank is None else EKGLoss(bank, temperature, loss, logits, parallel),
        finder(logits),
        training,
        views=training.views or (1 if bank is None else 2),
        mates=mates,
    )
    batches = _batches(data, trainer, subset)
    path = None if checkpoint is None else Path(checkpoint)
    history = trainer.restore(path)
    for number in range(len(history) + 1, training.epochs + 1):
        start = time.monotonic()
        mean = trainer.epoch(number, batches(number), on_batch or (lambda batch: None))
        seconds = time.monotonic() - start
        metrics = evaluate(model, test, loss=loss, logits=logits) if test is not None and mates.first else None
        found = (None, None) if metrics is None else (metrics.loss, metrics.accuracy)
        history.append(Epoch(number, mean, trainer.optimizer.param_groups[0]["lr"], seconds, *found))
        trainer.save(path if mates.first else None, history)
        if on_epoch is not None:
            on_epoch(history[-1])
    model.eval()
    return tuple(history)


class _Trainer:
    """A model with its optimizer, schedule and loss scale."""

    def __init__(
        self,
        model: nn.Module,
        objective: Callable[[Any, Any, Tensor], Tensor],
        logits: Callable[[Any], Tensor],
        training: Training,
        views: int,
        mates: Team = ALONE,
    ) -> None:
        self.mates = mates
        self.model, self.objective, self.logits, self.training, self.views = model, objective, logits, training, views
        self.device = device_of(model)
        half = half_of(model)
        if training.amp is not None and half is not None:
            raise RecipeError(
                f"amp={training.amp!r} computes in half precision on weights that are not, and these are {half}; train "
                "model.float() with amp, or leave amp out"
            )
        if training.channels_last:
            model.to(memory_format=torch.channels_last)
        self.optimizer = training.optimizer_of(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.amp == "fp16")
        self.schedule = training.schedule_of(self.optimizer)

    def epoch(self, number: int, batches: Iterable[Any], on_batch: Callable[[int], None]) -> float:
        """Train on every batch once; returns the mean loss."""
        if self.schedule is not None:
            self.schedule.step(number - 1)
        total = torch.zeros((), device=self.device)
        count = 0
        self.model.train()
        shared = SharedNorms() if self.mates.size > 1 else nullcontext()
        with _random_numbers_of(self.training.seed, number, self.mates.rank), shared:
            for count, batch in enumerate(batches, 1):
                total += self._update(batch, check=number == 1)
                if count % CHECK_EVERY == 0:
                    self._check(total, number, count)
                on_batch(count)
        if not count:
            raise DataError("there is no batch to train on; give more data, or a smaller batch size")
        return self._check(total, number, count) / count

    def _update(self, batch: Any, check: bool) -> Tensor:
        images, labels, index = unpacked(batch)
        if self.views == 1:
            shown, samples = Inputs.of(images).onto(self.model), None
        else:
            shown, samples = side_by_side(images, self.model)
        if self.training.channels_last:
            shown = shown.channels_last()
        labels = to_device(labels, self.device)
        with self._precision():
            output = shown.into(self.model)
        outputs = [output] if samples is None else [of_view(output, samples, view) for view in range(self.views)]
        if check:
            check_classes(self.logits(outputs[0]), labels)
        loss = self.objective(outputs, labels, index) * self._share(outputs[0])
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.mates.size > 1:
            add_gradients(self.model.parameters())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def _share(self, output: Any) -> float:
        """This process's part of the samples of a batch: what its mean weighs in the mean over all of them."""
        if self.mates.size == 1:
            return 1.0
        samples = len(self.logits(output))
        everyone = self.mates.gathered(torch.tensor(float(samples), device=self.device))
        return samples / float(everyone)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.training.amp is None:
            return nullcontext()
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.training.amp]
        return torch.autocast(self.device.type, half)

    def _check(self, total: Tensor, epoch: int, batch: int) -> float:
        """The sum of the losses of all processes, which must be finite."""
        found = float(self.mates.gathered(total.clone()))
        if not math.isfinite(found):
            raise TrainingError(
                f"the training loss is not finite in epoch {epoch}, by batch {batch} (lr {self.training.lr:g}); lower "
                "the learning rate, or check the images for NaN"
            )
        return found

    def restore(self, path: Path | None) -> list[Epoch]:
        """Go on from a checkpoint where there is one; returns the epochs that are done."""
        if path is None or not path.is_file():
            return []
        history = load_state(path, self.model, self.optimizer, self.scaler, self._identity())
        return [read(Epoch, epoch, str(path), RunError) for epoch in history]

    def save(self, path: Path | None, history: list[Epoch]) -> None:
        """Write the checkpoint, if one is wanted."""
        if path is not None:
            record = [asdict(epoch) for epoch in history]
            save_state(path, self.model, self.optimizer, self.scaler, self._identity(), record)

    def _identity(self) -> dict[str, Any]:
        """What must not change between an interrupted training and the one that goes on with it."""
        return {**asdict(self.training), "views": self.views, "objective": type(self.objective).__name__}


def _batches(data: Data | Iterable[Any], trainer: _Trainer, subset: Any) -> Callable[[int], Iterable[Any]]:
    """The training batches of an epoch."""
    mates = trainer.mates
    if not isinstance(data, Data):
        if mates.size > 1:
            return lambda epoch: (own_share(batch, trainer.views, mates) for batch in each_batch(data))
        labels = lambda batch: unpacked(batch)[1]  # noqa: E731
        return lambda epoch: each_batch(data if epoch > 1 else watched(data, labels, "training batches"))
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

    return of_epoch


@contextmanager
def _random_numbers_of(seed: int, epoch: int, rank: int) -> Iterator[None]:
    """Dropout and the like draw the same numbers in an epoch whether or not training was interrupted before it, and
    others in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(seed * 1_000_003 + epoch + rank * 1_000_000_007)
        yield
