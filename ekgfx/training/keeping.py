"""Which epoch is kept: the best on images that were not trained on, the network before training among them."""

import csv
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ekgfx.base.files import replacing
from ekgfx.base.units import percent, several
from ekgfx.training.evaluation import Metrics


@dataclass(frozen=True)
class Epoch:
    """One epoch of training. number: from 1, 0 is the network before; loss: mean over its batches; lr; seconds: of
    training. val_loss and val_accuracy: on the part of the training images that tells which epoch is kept; test_loss
    and test_accuracy: on the test data; each None where there is nothing of the kind. kept: whether this is the epoch
    whose weights the model has in the end."""

    number: int
    loss: float
    lr: float
    seconds: float
    test_loss: float | None = None
    test_accuracy: float | None = None
    val_loss: float | None = None
    val_accuracy: float | None = None
    kept: bool = False


class History(tuple[Epoch, ...]):
    """The epochs of a training, oldest first, and which of them was kept.

    Attributes:
        kept: number of the epoch whose weights the model has; 0 is the network before training.
        before: that network on the images that epochs are judged on; None where there are none.
        tested: that network on the test images, where these decided between it and the best epoch (`knows`).
        stopped: whether training ended early, since no epoch became better any more.
    """

    kept: int
    before: Metrics | None
    tested: Metrics | None
    stopped: bool

    @classmethod
    def of(
        cls, epochs: list[Epoch], kept: int, before: Metrics | None, stopped: bool, tested: Metrics | None = None
    ) -> "History":
        """The epochs with the one marked that is kept."""
        made = cls(replace(epoch, kept=epoch.number == kept) for epoch in epochs)
        made.kept, made.before, made.tested, made.stopped = kept, before, tested, stopped
        return made

    def __str__(self) -> str:
        """What was kept, in one line."""
        count = several(len(self), "epoch")
        last = f"{count}, stopped early" if self.stopped else count
        if self.before is None:
            return f"kept the last of {last}"
        best = max(self, key=lambda epoch: rank(_judged(epoch)), default=None)
        if self.tested is not None and best is not None:
            return self._by_test(_tested(best), self.tested, self.before, last)
        if not self.kept:
            judged = None if best is None else _judged(best)
            after = "" if judged is None else f"; the best of {last} has {_said(judged, self.before)}"
            return (
                f"kept the network as it was before training: {_said(self.before, judged)} on the validation part of "
                f"the training images{after}. A network that was trained on those images before does better on them "
                "than on new ones: give images of its own to judge by (val=…), test images (test=…), or keep the last "
                "epoch (val_fraction 0)"
            )
        found = _judged(self[self.kept - 1])
        return (
            f"kept epoch {self.kept} of {last}: {_said(found, self.before)} on the validation part of the training "
            f"images ({_said(self.before, found)} before training)"
        )

    def _by_test(self, after: Metrics, before: Metrics, known: Metrics, last: str) -> str:
        """What was kept where the test images decided between the best epoch and the network before. known: the latter
        on the images that it knows."""
        now, then = _said(after, before), _said(before, after)
        if self.kept:
            kept = f"kept epoch {self.kept} of {last}: {now} on the test images ({then} before training)"
        else:
            kept = (
                f"kept the network as it was before training: {then} on the test images; the best of {last} has {now}"
            )
        return (
            f"{kept}. These decided between the two, since the network before knows the validation part of the "
            f"training images: {_said(known, None)} of them right"
        )


def _judged(epoch: Epoch) -> Metrics:
    return Metrics(math.nan if epoch.val_loss is None else epoch.val_loss, epoch.val_accuracy, 0)


def _tested(epoch: Epoch) -> Metrics:
    return Metrics(math.nan if epoch.test_loss is None else epoch.test_loss, epoch.test_accuracy, 0)


def _said(metrics: Metrics, beside: Metrics | None) -> str:
    """The accuracy, and the loss where that alone tells the two apart."""
    loss = f"loss {metrics.loss:.4f}"
    if metrics.accuracy is None:
        return loss
    equal = beside is not None and beside.accuracy == metrics.accuracy
    return f"{percent(metrics.accuracy)} with {loss}" if equal else percent(metrics.accuracy)


def rank(metrics: Metrics) -> tuple[float, float]:
    """What networks are compared by, larger is better: accuracy where there are classes, then the loss."""
    if not math.isfinite(metrics.loss):
        return -math.inf, -math.inf
    return (0.0 if metrics.accuracy is None else metrics.accuracy), -metrics.loss


def knows(judging: Metrics, test: Metrics) -> bool:
    """Whether a network was trained on the images that are to judge it: of them it has more right than of the test
    images, by over three standard errors of the difference."""
    if judging.accuracy is None or test.accuracy is None:
        return False
    mean = (judging.accuracy * judging.samples + test.accuracy * test.samples) / (judging.samples + test.samples)
    variance = mean * (1 - mean) * (1 / judging.samples + 1 / test.samples)
    return judging.accuracy - test.accuracy > 3 * math.sqrt(variance)


class Best:
    """The best weights that were offered so far.

    number: of their epoch; metrics: theirs; weights: copies on the CPU, by name; before: metrics of epoch 0. tested: of
    epoch 0 on the test images, where it `knows` the ones that judge; then the best of the other epochs is looked for,
    and the test images decide between that and epoch 0, whose weights are `first`.
    """

    def __init__(self, before: Metrics, model: nn.Module, test: Metrics | None = None) -> None:
        self.number, self.metrics, self.before = 0, before, before
        self.weights = _copied(model)
        self.tested = test if test is not None and knows(before, test) else None
        self.first = None if self.tested is None else self.weights

    def offer(self, number: int, metrics: Metrics, model: nn.Module) -> None:
        """Takes the model's weights where they are better than the best so far: more right answers, or as many with a
        lower loss."""
        unopposed = self.tested is not None and not self.number
        if unopposed or rank(metrics) > rank(self.metrics):
            self.number, self.metrics, self.weights = number, metrics, _copied(model)

    def settled(self, history: list[Epoch]) -> "Best":
        """With epoch 0 in the place of the best one, where the test images decide and say so."""
        if self.first is None or self.tested is None or not self.number:
            return self
        if rank(_tested(history[self.number - 1])) < rank(self.tested):
            self.number, self.metrics, self.weights = 0, self.before, self.first
        return self

    def facts(self) -> dict[str, Any]:
        """All but the weights, as plain values; `restored` takes them."""
        tested = None if self.tested is None else asdict(self.tested)
        return {
            "number": self.number,
            "metrics": asdict(self.metrics),
            "before": asdict(self.before),
            "tested": tested,
        }

    def restored(self, facts: dict[str, Any], weights: dict[str, Tensor], first: dict[str, Tensor] | None) -> None:
        """The best so far of a training that goes on."""
        self.number, self.weights, self.first = facts["number"], weights, first
        self.metrics, self.before = Metrics(**facts["metrics"]), Metrics(**facts["before"])
        self.tested = None if facts["tested"] is None else Metrics(**facts["tested"])


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def write_log(path: Path, epochs: list[Epoch], before: Metrics | None) -> None:
    """The epochs so far as a table, anew each time, so that a training that was killed leaves a whole one. Row 0 is the
    network before training, where it was judged."""
    rows = [asdict(epoch) for epoch in epochs]
    if before is not None:
        rows.insert(0, {"number": 0, "val_loss": before.loss, "val_accuracy": before.accuracy})
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Epoch) if field.name != "kept"], restval="")
        table.writeheader()
        table.writerows({key: value for key, value in row.items() if key in table.fieldnames} for row in rows)
