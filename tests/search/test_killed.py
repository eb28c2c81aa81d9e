"""A search that is killed at random moments, again and again, ends as one that nobody disturbed."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from ekgfx.run import Run, read_lines
from ekgfx.search import search
from ekgfx.trace import TracedModel
from tests.search import nets

HISTORY = "history.jsonl"


def searching(traced: TracedModel, path: Path) -> int:
    """A process (a fork of this one) that goes on with the search of a run, as `ekgfx prune --resume` does."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            with Run.reopen(path) as run:
                result = search(
                    traced,
                    nets.batches(size=12),
                    flops=0.5,
                    on_step=lambda step: run.append(HISTORY, step.to_json()),
                    resume_from=run.lines(HISTORY),
                )
                run.write_json("plan.json", result.plan.to_json())
            code = 0
        finally:
            os._exit(code)
    return child


def history(path: Path) -> list[dict[str, Any]]:
    """What was found, without the time that it took."""
    return [{k: v for k, v in step.items() if k not in ("seconds", "eta")} for step in read_lines(path / HISTORY)]


@pytest.mark.parametrize("kills", [12, pytest.param(300, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("make", [nets.cnn, nets.vit])
def test_killed_at_random(make: Any, kills: int, tmp_path: Path) -> None:
    """Every kill comes at a moment between the start and a little more than the time that is left; the last process is
    let go. A search that is done before its kill is begun anew, so that every kill hits one that is at work."""
    traced = make()
    Run.create(tmp_path / "undisturbed").close()
    start = time.monotonic()
    assert os.waitpid(searching(traced, tmp_path / "undisturbed"), 0)[1] == 0
    whole = time.monotonic() - start
    expected = history(tmp_path / "undisturbed")
    assert len(expected) > 4
    draw = random.Random(kills)
    hit, lengths, number = 0, set(), 0
    Run.create(tmp_path / "0").close()
    while hit < kills:
        path = tmp_path / str(number)
        child = searching(traced, path)
        time.sleep(draw.random() * 1.1 * whole)
        os.kill(child, signal.SIGKILL)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        hit += killed
        lengths.add(len(history(path)))
        assert history(path) == expected[: len(history(path))]
        if not killed:
            check(path, tmp_path / "undisturbed", expected)
            number += 1
            Run.create(tmp_path / str(number)).close()
    assert os.waitpid(searching(traced, tmp_path / str(number)), 0)[1] == 0
    check(tmp_path / str(number), tmp_path / "undisturbed", expected)
    assert len(lengths) > 3  # they came at different moments


def check(path: Path, undisturbed: Path, expected: list[dict[str, Any]]) -> None:
    assert history(path) == expected
    assert (path / "plan.json").read_bytes() == (undisturbed / "plan.json").read_bytes()
