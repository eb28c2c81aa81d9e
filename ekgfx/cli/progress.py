"""What a job looks like while it runs: one line for each thing done, and a bar with the time to go where there is a
terminal to draw it on."""

import signal
import time
from typing import Any, Self

from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from ekgfx.bank import Progress as BankProgress
from ekgfx.cli.render import duration, notes, percent
from ekgfx.repair.walk import LayerRepair
from ekgfx.search import Step
from ekgfx.training.keeping import Epoch
from ekgfx.training.trainer import Progress as Training

LINE_EVERY = 30.0
"""Seconds between two lines of progress where the output is no terminal."""


class Terminal:
    """The `Report` that the command line gives to a job; a context manager that clears its bar away at the end.

    Ctrl-C raises at once, as always. Where Python has to swallow that (it fell into a destructor or a callback from C,
    of which PyTorch has many), the next thing that is reported raises it again.
    """

    def __init__(self) -> None:
        columns = (
            TextColumn("  {task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal)
        self._task = self._bar.add_task("", total=None, left="", visible=False)
        self._title, self._since, self._epoch = "", time.monotonic(), 0
        self._interrupted, self._said = False, time.monotonic()

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()
        signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, *_: Any) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def _go_on(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt

    def stage(self, title: str) -> None:
        self._go_on()
        self._title, self._since, self._epoch = title, time.monotonic(), 0
        self._said = self._since
        self._bar.update(self._task, visible=False)
        notes.print(f"[bold]{escape(title)}[/bold]")

    def note(self, text: str) -> None:
        notes.print(f"  {escape(text)}", soft_wrap=True)

    def step(self, step: Step, keep: float) -> None:
        measure = step.measure
        budget = f"budget {keep:.1%}" if step.towards is None else f"on to {step.towards}"
        facts = [f"step {step.number:3}", f"{step.kept_fraction:6.1%} kept ({budget})"]
        facts += [f"{name} −{len(removed)}" for name, removed in list(step.removed.items())[:1]]
        if len(step.removed) > 1:
            facts[-1] = f"{len(step.removed)} groups"
        facts += [f"without {name}" for name in step.dropped]
        if measure.loss is not None:
            facts.append(f"loss {measure.loss:.4f}")
        facts += [f"{step.seconds:.1f} s", f"ETA {duration(step.eta)}"]
        notes.print("  " + escape("  ".join(facts)), soft_wrap=True)
        if step.towards is None:
            self._show(1 - step.kept_fraction, 1 - keep, step.eta)

    def bank(self, progress: BankProgress, samples: int) -> None:
        done, total = (progress.teacher - 1) * samples + progress.samples, progress.teachers * samples
        self._show(done, total, progress.seconds * (total - done) / max(done, 1))
        if progress.samples >= samples:
            notes.print(f"  teacher {progress.teacher} of {progress.teachers}: {samples} samples")

    def layer(self, layer: LayerRepair, number: int, layers: int) -> None:
        self.part(number, layers)

    def part(self, number: int, parts: int) -> None:
        """One of so many equal parts of the stage is done."""
        left = (time.monotonic() - self._since) / number * (parts - number)
        self._show(number, parts, left)

    def batch(self, progress: Training) -> None:
        total = progress.batches or progress.batch
        where = f"epoch {progress.epoch} of {progress.epochs}, batch {progress.batch} of {progress.batches or '?'}"
        self._show(progress.batch, total, progress.eta, where)

    def epoch(self, epoch: Epoch, epochs: int) -> None:
        self._epoch += 1
        left = (time.monotonic() - self._since) / self._epoch * (epochs - epoch.number)
        facts = [f"epoch {epoch.number} of {epochs}", f"loss {epoch.loss:.4f}"]
        if epoch.val_accuracy is not None:
            facts.append(f"validation {percent(epoch.val_accuracy)}")
        elif epoch.val_loss is not None:
            facts.append(f"validation loss {epoch.val_loss:.4f}")
        if epoch.test_accuracy is not None:
            facts.append(f"test accuracy {percent(epoch.test_accuracy)}")
        facts += [f"{epoch.seconds:.1f} s", f"ETA {duration(left)}"]
        notes.print("  " + "  ".join(facts), soft_wrap=True)

    def _show(self, done: float, total: float, left: float | None, where: str = "") -> None:
        """Draws the bar; where there is no terminal, a line from time to time."""
        self._go_on()
        text = "" if left is None else f"ETA {duration(left)}"
        if not notes.is_terminal:
            if time.monotonic() - self._said >= LINE_EVERY:
                facts = (where or f"{done / total:.0%} of {self._title}", text)
                notes.print("  " + escape("  ".join(filter(None, facts))), soft_wrap=True)
                self._said = time.monotonic()
            return
        self._bar.update(self._task, description=self._title, completed=done, total=total, left=text, visible=True)
