"""Ctrl-C is never lost, even where Python swallows the exception it raises."""

import os
import signal
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
