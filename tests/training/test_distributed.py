"""Several processes find bit for bit what one finds; real processes, connected by gloo."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ekgfx.base.files import read_lines
from ekgfx.cli import main
from ekgfx.cli.work import work
from ekgfx.distributed import team as distributed
from ekgfx.distributed.team import ALONE, Team, team
from ekgfx.errors import TeamError
from ekgfx.runs.directory import Run, read_manifest
from ekgfx.search import search
from tests.cli.conftest import TINY, environment
from tests.search.test_race import batches, sure, untimed
from tests.support.processes import ready, together


def test_work_is_shared_evenly_and_by_all_alike() -> None:
    assert Team(0, 2).owners([1, 5, 3, 1]) == [1, 0, 1, 1]
    assert Team(1, 3).owners([2, 2]) == [0, 1]
    assert Team().owners([3, 1]) == [0, 0]
    assert team() == ALONE


def telling() -> Any:
    mates = team()
    table = torch.zeros(2, 2, dtype=torch.float64)
    table[mates.rank] = 0.1 + mates.rank
    torch.manual_seed(mates.rank)
    model = nn.BatchNorm1d(3)
    model.weight.data.normal_()
    mates.broadcast_model(model)
    sent = mates.broadcast(torch.full((2,), float(mates.rank)), 1)
    told, heard = mates.broadcast_object(mates.rank), mates.all_gather_object(mates.rank)
    return mates.all_reduce(table).tolist(), sent.tolist(), told, heard, model.weight.tolist()


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    first, second = together(2, tmp_path, telling)
    assert first == second
    assert first[:4] == ([[0.1, 0.1], [1.1, 1.1]], [1.0, 1.0], 0, [0, 1])


CASES: dict[str, dict[str, Any]] = {
    "plain": {"early_stop": False},
    "early": {},
    "cacheless": {"cache": 0, "accept": 2},
    "magnitude": {"importance": "magnitude", "knowledge": "none"},
}


def searches(name: str) -> Any:
    """Plan and history of every case."""
    traced = sure(lambda: ready(name), torch.float32)
    data = batches(traced)
    found = {case: search(traced, data, flops=0.85, **options) for case, options in CASES.items()}
    return {case: (result.plan, untimed(result)) for case, result in found.items()}


SIZES = {"cnn": [2, 3], "vit": [3], "downsampling": [4]}
"""The last has three groups: there are more processes than candidates, and they share their batches."""


@pytest.mark.parametrize("name", SIZES)
def test_searches_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    """Plan and history, with what was left early."""
    check_sizes(name, SIZES[name], tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("name", SIZES)
def test_many_processes(name: str, tmp_path: Path) -> None:
    check_sizes(name, [5, 7, 20], tmp_path)


def check_sizes(name: str, sizes: list[int], folder: Path) -> None:
    (expected,) = together(1, folder, searches, name)
    assert expected["early"][1] != expected["plain"][1]
    for size in sizes:
        for found in together(size, folder, searches, name):
            assert found == expected


def torchrun(folder: Path, *arguments: object) -> subprocess.Popen:
    """`ekgfx prune` on two processes, as a user starts it."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*launch, "-m", "ekgfx", "prune", *map(str, arguments)],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def follower(launcher: int) -> int:
    """The second process that a torchrun started, by its RANK."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and b"RANK=1" in (entry / "environ").read_bytes().split(b"\0"):
                return int(entry.name)
    raise AssertionError("there is no second process")


def killed_and_resumed(folder: Path, now: Callable[[Path], bool]) -> None:
    """Two processes under torchrun do tiny.yaml in `run`; one is killed when `now` says so, and the job is resumed. One
    process does the same in `one`."""
    job = torchrun(folder, "--recipe", "tiny.yaml", "-o", "run")
    while not now(folder / "run"):
        assert job.poll() is None, job.stderr.read()
        time.sleep(0.01)
    os.kill(follower(job.pid), signal.SIGKILL)
    _, said = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "another process of this job died" in said
    assert read_manifest(folder / "run")["status"] == "interrupted"
    again = torchrun(folder, "--resume", "run")
    assert again.wait() == 0, again.stderr.read()
    assert read_manifest(folder / "run")["status"] == "done"
    main(["prune", "--recipe", str(folder / "tiny.yaml"), "-o", str(folder / "one")])


PROC = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc")


def test_a_job_that_lost_a_process_says_so_though_it_is_told_to_end_meanwhile(tmp_path: Path, monkeypatch) -> None:
    """The connection breaks, and torchrun's signal comes while run.json is written."""
    update = Run.update

    def told_to_end(run: Run, **facts: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        update(run, **facts)

    def broken(_: Any) -> None:
        monkeypatch.setattr(Run, "update", told_to_end)
        with distributed._watching():
            raise RuntimeError("Connection closed by peer")

    before = signal.signal(signal.SIGTERM, distributed._ended)
    try:
        with Run.create(tmp_path / "run", status="running") as run, pytest.raises(TeamError):
            work(run, broken)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert read_manifest(tmp_path / "run")["status"] == "interrupted"


@PROC
def test_training_that_lost_a_process_goes_on(tmp_path: Path) -> None:
    """Killed after the first epochs of fine-tuning. Plan and memory bank are one process's; weights are so up to
    rounding, which training amplifies."""
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 1, batch_size: 256", "epochs: 4, batch_size: 64"))
    killed_and_resumed(tmp_path, lambda run: (run / "finetune.safetensors").exists())
    for name in ("plan.json", "bank/bank.json", "bank/teacher-0.rows", "bank/teacher-1.rows"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    losses = [[epoch["loss"] for epoch in read_lines(tmp_path / run / "finetune.jsonl")] for run in ("run", "one")]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    results = [read_manifest(tmp_path / run)["results"] for run in ("run", "one")]
    assert results[0]["searched"] == results[1]["searched"]
    assert results[0]["finetuned"]["accuracy"] == pytest.approx(results[1]["finetuned"]["accuracy"], abs=0.03)


@PROC
def test_a_process_that_dies_ends_the_job_which_can_go_on(tmp_path: Path) -> None:
    """Two processes under torchrun, one of them killed in the search; resumed, they find what one alone finds."""
    (tmp_path / "tiny.yaml").write_text(TINY.replace("epochs: 1, batch_size: 256", "epochs: 0").replace("0.7", "0.3"))
    killed_and_resumed(tmp_path, lambda run: len(read_lines(run / "history.jsonl")) >= 2)
    assert (tmp_path / "run" / "plan.json").read_bytes() == (tmp_path / "one" / "plan.json").read_bytes()
    weights, alone = (load_file(tmp_path / run / "model.safetensors") for run in ("run", "one"))
    assert weights.keys() == alone.keys() and all(torch.equal(weights[name], alone[name]) for name in weights)
    found, expected = (
        [{**step, "seconds": 0, "eta": 0} for step in read_lines(tmp_path / run / "history.jsonl")]
        for run in ("run", "one")
    )
    assert found == expected
