"""A search that is killed at random moments, again and again, ends as one that nobody disturbed."""

import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from ekgfx.base.files import read_lines
from ekgfx.runs.directory import Run
from ekgfx.search import search
from tests.search import nets
from tests.support.processes import ready, start

HISTORY = "history.jsonl"


def searching(name: str, path: Path) -> None:
    """Goes on with the search of a run, as `ekgfx prune --resume` does."""
    torch.set_num_threads(1)
    with Run.reopen(path) as run:
        result = search(
            ready(name),
            nets.batches(size=12),
            flops=0.5,
            on_step=lambda step: run.append(HISTORY, step.to_json()),
            resume_from=run.lines(HISTORY),
        )
        run.write_json("plan.json", result.plan.to_json())


def history(path: Path) -> list[dict[str, Any]]:
    """What was found, without the time that it took."""
    return [{k: v for k, v in step.items() if k not in ("seconds", "eta")} for step in read_lines(path / HISTORY)]


@pytest.mark.parametrize("kills", [20, pytest.param(300, marks=pytest.mark.sweep)])
@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_killed_at_random(name: str, kills: int, tmp_path: Path) -> None:
    """Every kill comes when a search has found none, one or two steps more, and a random part of a step's time later. A
    search that is done before its kill is begun anew, so that every kill that counts hits one at work."""
    Run.create(tmp_path / "undisturbed").close()
    start(time.sleep, 0).join()  # the server of processes is there now
    begin = time.monotonic()
    process = start(searching, name, tmp_path / "undisturbed")
    process.join()
    assert process.exitcode == 0
    expected = history(tmp_path / "undisturbed")
    assert len(expected) > 4
    a_step = (time.monotonic() - begin) / len(expected)
    draw = random.Random(kills)
    hit, lengths, number = 0, list[int](), 0
    Run.create(tmp_path / "0").close()
    while hit < kills:
        path = tmp_path / str(number)
        steps = len(history(path)) + draw.randrange(3)
        process = start(searching, name, path)
        while process.is_alive() and len(history(path)) < steps:
            time.sleep(0.001)
        time.sleep(draw.random() * a_step)
        process.kill()
        process.join()
        assert history(path) == expected[: len(history(path))]
        if process.exitcode == 0:
            check(path, tmp_path / "undisturbed", expected)
            number += 1
            Run.create(tmp_path / str(number)).close()
        else:
            hit += 1
            lengths.append(len(history(path)))
    process = start(searching, name, tmp_path / str(number))
    process.join()
    check(tmp_path / str(number), tmp_path / "undisturbed", expected)
    print(f"{hit} kills of {name}, steps on disk {sorted(Counter(lengths).items())}; {number + 1} searches")
    assert len(set(lengths)) > 3  # they came at different moments


def check(path: Path, undisturbed: Path, expected: list[dict[str, Any]]) -> None:
    assert history(path) == expected
    assert (path / "plan.json").read_bytes() == (undisturbed / "plan.json").read_bytes()
