"""Ctrl-C is never lost, even where Python swallows the exception it raises."""

import os
import signal
import sys
from collections.abc import Callable

import pytest

from ekgfx.cli.progress import Terminal


class SwallowsWhatIsRaisedInItsDestructor:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two bytecodes of this destructor
            pass


def interrupted_in_a_destructor() -> None:
    with Terminal() as terminal:
        SwallowsWhatIsRaisedInItsDestructor()
        terminal.batch(1, 2)


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
    assert "pip install 'ekgfx[tensorboard]'" in line
