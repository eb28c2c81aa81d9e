"""A network that was trained on the images which judge: the test images decide whether its training was worth it."""

import csv
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ekgfx import data as datasets
from ekgfx.data.arrays import ArraySplit
from ekgfx.data.augment import Augmentation
from ekgfx.training.evaluation import Metrics, evaluate
from ekgfx.training.finetune import finetune
from ekgfx.training.keeping import Epoch, History, knows
from tests.training.test_finetune import Interrupted, batches, small
from tests.training.test_keeping import same

Batches = list[tuple[Tensor, Tensor]]

TRAINED = batches(count=8)
LEARNABLE: Batches = [batch[:2] for batch in TRAINED]
"""Training makes a network better on these."""


def in_memory() -> datasets.Data:
    """The same images as a data set, of which finetune itself holds some out."""
    images, labels = (torch.cat(parts) for parts in zip(*LEARNABLE, strict=True))
    split = ArraySplit(images, labels, (8, 8), (0.0,), (1.0,), Augmentation())
    return datasets.Data("noise", "noise", 4, (1, 8, 8), (0.0,), (1.0,), {"train": lambda: split})


@pytest.fixture
def fit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., History]:
    """finetune that holds the images `known` out."""

    def fit(model: nn.Module, known: Batches, **options: Any) -> History:
        monkeypatch.setattr("ekgfx.training.finetune._held_out", lambda data, subset, training: (subset, known))
        return finetune(model, in_memory(), batch_size=8, augment=False, **options)

    return fit


def answered(share: float) -> Batches:
    """Other images, of which the network before has this share right: the first of every batch."""
    model, found = small().eval(), []
    for images, _ in LEARNABLE:
        with torch.no_grad():
            labels = model(images.flip(0, 2)).argmax(1)
        wrong = torch.arange(len(labels)) >= share * len(labels)
        found.append((images.flip(0, 2), (labels + wrong) % 4))
    return found


@pytest.mark.parametrize(
    ("judging", "test", "expected"),
    [
        (Metrics(0.1, 0.9814, 5000), Metrics(0.4, 0.9132, 10_000), True),
        (Metrics(0.1, 1.0, 144), Metrics(0.1, 0.9861, 359), False),  # 1.4 points; three standard errors are 2.9
        (Metrics(0.1, 0.60, 100), Metrics(0.1, 0.40, 100), False),  # 20 points; three standard errors are 21.2
        (Metrics(0.1, 0.62, 100), Metrics(0.1, 0.40, 100), True),
        (Metrics(0.1, 0.40, 100), Metrics(0.1, 0.62, 100), False),
        (Metrics(0.1, None, 100), Metrics(0.1, 0.40, 100), False),
        (Metrics(0.1, 1.0, 10), Metrics(0.1, 1.0, 10), False),
    ],
)
def test_who_knows_the_images_has_significantly_more_of_them_right(
    judging: Metrics, test: Metrics, expected: bool
) -> None:
    assert knows(judging, test) == expected


@pytest.mark.parametrize("options", [{}, {"ema": 0.5}])
def test_a_training_that_forgets_what_was_known_and_learns_is_kept(
    fit: Callable[..., History], options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    known, model = answered(1.0), small()
    with caplog.at_level(logging.INFO, "ekgfx"):
        history = fit(model, known, test=LEARNABLE, epochs=6, lr=0.05, **options)
    before = evaluate(small(), LEARNABLE)
    assert history.before == Metrics(history.before.loss, 1.0, 64) and history.tested == before
    best = max(history, key=lambda epoch: (epoch.val_accuracy, -epoch.val_loss))
    assert best.val_accuracy < 1 and best.test_accuracy > before.accuracy, "or the example shows nothing"
    assert history.kept == best.number
    assert evaluate(model, known).accuracy == best.val_accuracy
    line = caplog.records[-1].getMessage()
    assert line.startswith(f"kept epoch {history.kept} of 6 epochs: {best.test_accuracy:.2%} on the test images")
    assert line.endswith("knows the validation part of the training images: 100.00% of them right")
    without = fit(small(), known, epochs=6, lr=0.05, **options)
    assert without.kept == 0 and without.tested is None
    own = finetune(small(), TRAINED, val=known, test=LEARNABLE, epochs=6, lr=0.05, **options)
    assert own.kept == 0 and own.tested is None, "what a user gives to judge by judges"


def test_a_training_that_harms_is_not_kept(fit: Callable[..., History], caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    with caplog.at_level(logging.INFO, "ekgfx"):
        history = fit(model, answered(1.0), test=answered(0.6), epochs=3, lr=0.5)
    assert history.kept == 0 and not any(epoch.kept for epoch in history)
    assert same(model, small())
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith(
        "kept the network as it was before training: 62.50% on the test images; the best of 3 epochs"
    )


def test_test_images_play_no_part_where_the_others_are_not_known(fit: Callable[..., History]) -> None:
    val = answered(0.25)  # as many as of the test images
    shown = fit(one := small(), val, test=LEARNABLE, epochs=4, lr=0.05)
    hidden = fit(other := small(), val, epochs=4, lr=0.05)
    assert shown.tested is None and shown.kept == hidden.kept and same(one, other)


@pytest.mark.parametrize("test", [LEARNABLE, answered(0.6)])
@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_training_ends_alike(fit: Callable[..., History], tmp_path: Path, after: int, test: Batches) -> None:
    settings: dict[str, Any] = {"epochs": 4, "lr": 0.05, "known": answered(1.0), "test": test}
    expected = fit(whole := small(), csv=tmp_path / "whole.csv", **settings)

    def stop(epoch: Epoch) -> None:
        if epoch.number == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(small(), on_epoch=stop, checkpoint=tmp_path / "state", **settings)
    found = fit(resumed := small(seed=9), checkpoint=tmp_path / "state", **settings)
    assert same(resumed, whole)
    assert (found.kept, found.before, found.tested) == (expected.kept, expected.before, expected.tested)
    assert str(found) == str(expected)
    assert len(list(csv.DictReader((tmp_path / "whole.csv").open()))) == 5


def test_an_ended_history_says_what_decided() -> None:
    before, tested = Metrics(0.1, 0.98, 5000), Metrics(0.4, 0.91, 10_000)
    epoch = Epoch(1, 1.0, 0.1, 2.0, 0.3, 0.93, 0.2, 0.95)
    assert str(History.of([epoch], 1, before, stopped=False, tested=tested)) == (
        "kept epoch 1 of 1 epoch: 93.00% on the test images (91.00% before training). These decided between the two, "
        "since the network before knows the validation part of the training images: 98.00% of them right"
    )
