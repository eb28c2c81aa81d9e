"""One network in training: its optimizer, schedule, loss scale and moving average; epochs, and its checkpoint."""

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ekgfx.base.schema import read
from ekgfx.data.batches import Inputs, device_of, half_of, of_view, side_by_side, to_device, unpacked, views_in
from ekgfx.distributed.parallel import add_gradients, shared_norms
from ekgfx.distributed.team import ALONE, Team
from ekgfx.errors import DataError, RecipeError, RunError, TrainingError
from ekgfx.execution.batch_norms import BatchNorms
from ekgfx.execution.channels_last import batch_norm_in_training, quicker_channels_last
from ekgfx.graph.untouched import untouched
from ekgfx.graph.ways import seeded
from ekgfx.training.keeping import Best, Epoch
from ekgfx.training.loss import EKGLoss, LabelLoss, check_classes
from ekgfx.training.mixup import Mixing, mixed_loss
from ekgfx.training.optimization import Training
from ekgfx.training.state import load_state, save_state

log = logging.getLogger("ekgfx")

CHECK_EVERY = 50
"""Batches between two looks at the loss: every look waits for the device."""


@dataclass(frozen=True)
class Progress:
    """Where a training is. epoch (of epochs) and batch (of batches, where that is known): from 1, the ones just done;
    seconds: since this epoch began."""

    epoch: int
    epochs: int
    batch: int
    batches: int | None
    seconds: float

    @property
    def eta(self) -> float | None:
        """Seconds to the end of the last epoch at this epoch's pace; None where the number of batches is not known."""
        if self.batches is None:
            return None
        left = self.batches - self.batch + self.batches * (self.epochs - self.epoch)
        return self.seconds / self.batch * max(0, left)


class Trainer:
    """A model with its optimizer, schedule, loss scale and, where asked for, the moving average of its weights."""

    def __init__(
        self,
        model: nn.Module,
        objective: EKGLoss | LabelLoss,
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
        undecided = training.channels_last is None and quicker_channels_last(model)
        self.channels_last = None if undecided else bool(training.channels_last)
        self.inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
        self.movable = [p for p in model.parameters() if undecided and p.dim() == 4 and p.is_contiguous()]
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        self.optimizer = training.optimizer_of(model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.amp == "fp16")
        self.schedule = training.schedule_of(self.optimizer)
        self.mixing = Mixing(training.mixup, training.cutmix) if training.mixup or training.cutmix else None
        self.average = None if training.ema is None else ModelEmaV3(model, training.ema, use_warmup=True)
        self.updates = 0

    @property
    def judged(self) -> nn.Module:
        """The network that is evaluated and kept: the moving average where there is one, else the model."""
        return self.model if self.average is None else self.average.module

    def epoch(
        self, number: int, batches: Iterable[Any], most: int | None, on_batch: Callable[[Progress], None]
    ) -> float:
        """Train on every batch once; returns the mean loss. most: how many batches there are, where that is known."""
        start = time.monotonic()
        if self.schedule is not None:
            self.schedule.step(number - 1)
        total = torch.zeros((), device=self.device)
        count = 0
        self.model.train()
        with _random_numbers_of(self.training.seed, number, self.mates.rank), self._norms(), self._laid_out():
            for count, batch in enumerate(batches, 1):
                failed = self._decide(batch) if self.channels_last is None else ""
                total += self._update(batch, check=number == 1)
                if failed:
                    log.info("training is not in channels last, which is often faster: it fails there (%s)", failed)
                if count % CHECK_EVERY == 0:
                    self._check(total, number, count)
                on_batch(Progress(number, self.training.epochs, count, most, time.monotonic() - start))
        if not count:
            raise DataError("there is no batch to train on; give more data, or a smaller batch size")
        return self._check(total, number, count) / count

    def _norms(self) -> AbstractContextManager[Any]:
        """How batch norms are computed. A compiled network has kernels of its own."""
        if self.mates.size > 1:
            return shared_norms()
        ours = self.channels_last is not False and self.device.type == "cpu" and self.inner is self.model
        return BatchNorms(batch_norm_in_training) if ours else nullcontext()

    @contextmanager
    def _laid_out(self) -> Iterator[None]:
        """While this is open, weights lie as `_decide` has it; after it as they came: nobody else meets the format."""
        if self.channels_last:
            lay(self.movable, torch.channels_last)
        try:
            yield
        finally:
            lay(self.movable, torch.contiguous_format)

    def _decide(self, batch: Any) -> str:
        """Whether to train in channels last: where the forward, the loss and their gradients take a batch so. Some view
        a tensor as it lies in memory. Returns what failed, or ""."""
        self.channels_last, failed = True, ""
        lay(self.movable, torch.channels_last)
        # torch.compile would compile `inner` once more; a loss may have a state of its own
        with untouched(self.inner), untouched(self.objective.loss), seeded(self.inner):
            try:
                self._loss(batch, self.inner, check=False).backward()
            except Exception as error:  # noqa: BLE001  where another reason made it fail, the step itself says so
                self.channels_last, failed = False, str(error).partition("\n")[0]
        self.optimizer.zero_grad(set_to_none=True)
        if failed:
            lay(self.movable, torch.contiguous_format)
        return failed

    def _update(self, batch: Any, check: bool) -> Tensor:
        loss = self._loss(batch, self.model, check)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.mates.size > 1:
            add_gradients(self.model.parameters())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.updates += 1
        if self.average is not None:
            self.average.update(self.model, self.updates)
        return loss.detach()

    def _loss(self, batch: Any, model: nn.Module, check: bool) -> Tensor:
        """The loss of a batch, with its gradients to come. check: whether to look at the classes of its labels."""
        images, labels, index = unpacked(batch)
        views = self.views if self.views == 1 else self.views_in(batch)
        if views == 1:
            shown, samples = Inputs.of(images).onto(model), None
        else:
            shown, samples = side_by_side(images, model)
        if self.channels_last:
            shown = shown.channels_last()
        shown, part = (shown, 1.0) if self.mixing is None else self.mixing(shown)
        labels = to_device(labels, self.device)
        with self._precision():
            output = shown.into(model)
        outputs = [output] if samples is None else [of_view(output, samples, view) for view in range(views)]
        if check:
            check_classes(self.logits(outputs[0]), labels)
        return mixed_loss(self.objective, outputs, labels, index, part) * self._share(outputs[0])

    def views_in(self, batch: Any) -> int:
        """How many views a batch shows. Raises DataError where the settings name another number."""
        return views_in(batch, self.views, self.training.views is not None)

    def _share(self, output: Any) -> float:
        """This process's part of the samples of a batch: what its mean weighs in the mean over all of them."""
        if self.mates.size == 1:
            return 1.0
        samples = len(self.logits(output))
        everyone = self.mates.all_reduce(torch.tensor(float(samples), device=self.device))
        return samples / float(everyone)

    def _precision(self) -> AbstractContextManager[Any]:
        if self.training.amp is None:
            return nullcontext()
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.training.amp]
        return torch.autocast(self.device.type, half)

    def _check(self, total: Tensor, epoch: int, batch: int) -> float:
        """The sum of the losses of all processes, which must be finite."""
        found = float(self.mates.all_reduce(total.clone()))
        if not math.isfinite(found):
            raise TrainingError(
                f"the training loss is not finite in epoch {epoch}, by batch {batch} (lr {self.training.lr:g}); lower "
                "the learning rate, or check the images for NaN"
            )
        return found

    def restore(self, path: Path | None, best: Best | None) -> list[Epoch]:
        """Go on from a checkpoint where there is one; returns the epochs that are done. `best` becomes the best so
        far of the training that is gone on with."""
        if path is None or not path.is_file():
            return []
        state = load_state(path, self.model, self.optimizer, self.scaler, self._identity())
        try:
            self.updates = int(state.facts.get("updates", 0))
            if self.average is not None:
                self.average.module.load_state_dict(state.others["average"])
            if best is not None:
                best.restored(state.facts["best"], state.others["best"], state.others.get("first"))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunError(f"{path} lacks the best epoch so far, or the average; delete it to start anew") from error
        return [read(Epoch, epoch, str(path), RunError) for epoch in state.history]

    def save(self, path: Path | None, history: list[Epoch], best: Best | None) -> None:
        """Write the checkpoint, if one is wanted."""
        if path is None:
            return
        record = [asdict(epoch) for epoch in history]
        facts: dict[str, Any] = {"updates": self.updates}
        others = {}
        if self.average is not None:
            others["average"] = self.average.module.state_dict()
        if best is not None:
            facts["best"], others["best"] = best.facts(), best.weights
            if best.first is not None:
                others["first"] = best.first
        save_state(path, self.model, self.optimizer, self.scaler, self._identity(), record, facts, others)

    def _identity(self) -> dict[str, Any]:
        """What must not change between an interrupted training and the one that goes on with it."""
        return {**asdict(self.training), "views": self.views, "objective": type(self.objective).__name__}


def lay(weights: Iterable[nn.Parameter], order: torch.memory_format) -> None:
    """Puts the values of four-dimensional weights into this order in memory."""
    for weight in weights:
        weight.data = weight.data.contiguous(memory_format=order)


@contextmanager
def _random_numbers_of(seed: int, epoch: int, rank: int) -> Iterator[None]:
    """Dropout, mixup and the like draw the same numbers in an epoch whether or not training was interrupted before it,
    and others in every process."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        number = seed * 1_000_003 + epoch + rank * 1_000_000_007
        torch.manual_seed(number)
        np.random.seed(number % 2**32)
        random.seed(number)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
