"""Ctrl-C is never lost, even where Python swallows the exception it raises."""

import os
import signal
import sys
from collections.abc import Callable

import pytest

from ekgfx.cli.progress import Terminal
from ekgfx.training.trainer import Progress


class SwallowsWhatIsRaisedInItsDestructor:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two bytecodes of this destructor
            pass


def interrupted_in_a_destructor() -> None:
    with Terminal() as terminal:
        SwallowsWhatIsRaisedInItsDestructor()
        terminal.batch(Progress(1, 1, 1, 2, 1.0))


def interrupted_at_work() -> None:
    with Terminal():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("work", [interrupted_in_a_destructor, interrupted_at_work])
def test_an_interrupt_is_never_lost(work: Callable[[], None]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGINT) is before


def test_tensorboard_gets_what_the_terminal_shows(ekgfx, tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ekgfx.base.files import read_lines

    done = ekgfx("prune", "--recipe", tiny, "--tensorboard", "--epochs", 2, "-o", "run")
    assert done.code == 0, done.err
    logged = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    steps = read_lines(tmp_path / "run" / "history.jsonl")
    rewards = [(event.step, event.value) for event in logged.Scalars("search/reward")]
    assert rewards == [(step["number"], pytest.approx(step["measure"]["reward"])) for step in steps]
    epochs = read_lines(tmp_path / "run" / "finetune.jsonl")
    tested = [(event.step, event.value) for event in logged.Scalars("fine-tune/test_accuracy")]
    assert tested == [(epoch["number"], pytest.approx(epoch["test_accuracy"])) for epoch in epochs]
    assert {"train-the-model/loss", "search/kept_fraction"} <= set(logged.Tags()["scalars"])


def test_a_job_that_fails_at_once_leaves_no_log(refused, tiny, tmp_path):
    refused("prune", "--recipe", tiny, "--tensorboard", "--flops", "0.0001", "-o", "run")
    assert not (tmp_path / "run").exists()


def test_tensorboard_is_optional(refused, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = refused("prune", "--recipe", tiny, "--tensorboard", "-o", "run")
    assert line.endswith("pip install tensorboard")


class FakeWandB:
    """What the package wandb is asked to do."""

    def __init__(self) -> None:
        self.asked, self.logged, self.finished = {}, [], 0

    def init(self, **asked):
        self.asked = asked
        return self

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_wandb_gets_what_the_terminal_shows(ekgfx, refused, tiny, tmp_path, monkeypatch):
    import csv

    monkeypatch.setitem(sys.modules, "wandb", None)
    assert refused("prune", "--recipe", tiny, "--wandb", "-o", "run").endswith("pip install wandb")
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    done = ekgfx("prune", "--recipe", tiny, "--wandb", "--epochs", 2, "-o", "run")
    assert done.code == 0, done.err
    assert fake.asked["name"] == "run" and fake.finished == 1
    tuned = [values for values in fake.logged if "fine-tune/loss" in values]
    rows = list(csv.DictReader((tmp_path / "run" / "finetune.csv").open()))
    assert [row["number"] for row in rows] == ["0", "1", "2"]
    assert [values["fine-tune/number"] for values in tuned] == [1, 2]
    assert [values["fine-tune/val_accuracy"] for values in tuned] == [float(row["val_accuracy"]) for row in rows[1:]]


def test_piped_output_says_how_far_it_is(monkeypatch, capsys):
    """Within an epoch, too, with the time to the end of the training; a line now and then, not one a batch."""
    now = [0.0]
    monkeypatch.setattr("ekgfx.cli.progress.time.monotonic", lambda: now[0])
    with Terminal() as terminal:
        terminal.stage("fine-tune")
        for batch in range(1, 101):
            now[0] = batch * 1.0
            terminal.batch(Progress(1, 3, batch, 200, now[0]))
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()[1:]]
    assert lines == [
        "epoch 1 of 3, batch 30 of 200  ETA 9 min 30 s",
        "epoch 1 of 3, batch 60 of 200  ETA 9 min 00 s",
        "epoch 1 of 3, batch 90 of 200  ETA 8 min 30 s",
    ]
