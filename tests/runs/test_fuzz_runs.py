"""As test_fuzz.py, for whole runs with one malformed file under a checksum that fits it."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from ekgfx import report
from ekgfx.bank import Bank
from ekgfx.base.files import checksum
from ekgfx.errors import EkgfxError
from ekgfx.pipeline import planning
from ekgfx.pipeline.jobs import prune_job
from ekgfx.report import Facts
from ekgfx.runs import checkpoint
from ekgfx.runs.directory import Run
from ekgfx.settings.recipe import Recipe
from tests.support.fuzzing import SECONDS, bounded, mutants, of_bytes, of_json, refused

FEW, MANY = 5, 200


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """A finished run with everything that a run can hold."""
    text = """
model: ekgfx.models:digits_cnn
data: digits
search: {flops: 0.7, align: 4, train_per_class: 4, val_per_class: 4}
finetune: {epochs: 1, batch_size: 256, teachers: 2}
export: {onnx: true, batches: [1]}
"""
    path = tmp_path_factory.mktemp("whole") / "run"

    class Silent:
        def __getattr__(self, name: str) -> Callable:
            return lambda *_: None

    with Run.create(path, settings=Recipe.from_json(yaml.safe_load(text)).to_json()) as run:
        prune_job(run, Silent())
    return path


RUN_FILES = [
    "run.json",
    "plan.json",
    "history.jsonl",
    "finetune.jsonl",
    "export.json",
    "bank/bank.json",
    "model.safetensors",
]


def use_run(path: Path) -> None:
    """Everything that reads a run; each may refuse it."""
    readers = [
        lambda: checkpoint.load_run(path),
        lambda: report.page(Facts.of(path)),
        lambda: Bank.open(path / "bank", verify=False).logits(torch.tensor([0, 5])),
        lambda: Run.reopen(path).close(),
        lambda: resumed(path),
    ]
    refusals = [refused(reader) for reader in readers]
    if any(refusals):
        raise EkgfxError("refused")


def resumed(path: Path) -> None:
    with Run.reopen(path) as run:
        planning.read_result(run)
        run.has("model.onnx")


def break_run(whole: Path, folder: Path, name: str, content: bytes) -> Path:
    """A copy of a run with another content of one file, and a checksum that fits it: as who wants to do harm would."""
    path = folder / "run"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(whole, path)
    (path / name).write_bytes(content)
    if name != "run.json":
        manifest = json.loads((path / "run.json").read_text())
        if name in manifest["files"]:
            manifest["files"][name]["now"] = checksum(path / name)
            (path / "run.json").write_text(json.dumps(manifest))
    return path


def feed_run(whole: Path, folder: Path, name: str, count: int, seed: int) -> int:
    use_run(whole)
    valid = (whole / name).read_bytes()
    found = 0
    with bounded():
        for number, content in enumerate(mutants(valid, count, seed, of_bytes if name.endswith("rs") else of_json)):
            signal.alarm(SECONDS)
            path = break_run(whole, folder, name, content)
            try:
                found += refused(lambda: use_run(path))  # noqa: B023  # called at once
            except BaseException as error:
                error.add_note(f"{name}, seed {seed}, input {number}: {content[:300]!r}")
                raise
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUN_FILES)
def test_a_malformed_run_is_refused_in_one_line(name, whole_run, tmp_path):
    assert feed_run(whole_run, tmp_path, name, FEW, seed=1) > 0


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUN_FILES)
def test_many_malformed_runs(name, whole_run, tmp_path):
    assert feed_run(whole_run, tmp_path, name, MANY, seed=2) > 0
