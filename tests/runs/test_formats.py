"""Every file that ekgfx writes states its format, itself or through run.json; what is newer is refused, with advice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ekgfx
from ekgfx.bank import Bank, store
from ekgfx.base.files import checksum
from ekgfx.errors import EkgfxError
from ekgfx.graph.plan import VERSION, Plan
from ekgfx.models import digits_cnn
from ekgfx.runs import checkpoint
from ekgfx.runs import directory as run
from ekgfx.runs.directory import Run
from ekgfx.training import state as training_state


@pytest.fixture
def saved(tmp_path) -> Path:
    """run.json, plan.json and model.safetensors of a small network."""
    model, images = digits_cnn().eval(), torch.zeros(2, 1, 8, 8)
    traced = ekgfx.trace(model, images)
    plan = Plan({"fuse.0": tuple(range(32))}, traced.groups.digest)
    ekgfx.save(ekgfx.prune(model, plan, traced), tmp_path / "run", plan=plan, source=None)
    return tmp_path / "run"


def load(path: Path) -> None:
    ekgfx.load(path, model=digits_cnn, example_inputs=(torch.zeros(2, 1, 8, 8),))


def rewritten(path: Path, name: str, **entries: object) -> None:
    """A JSON file with other entries, and a checksum that fits it."""
    value = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps({**value, **entries}))
    if name != "run.json":
        accept(path, name)


def accept(path: Path, name: str) -> None:
    manifest = json.loads((path / "run.json").read_text())
    manifest["files"][name]["now"] = checksum(path / name)
    (path / "run.json").write_text(json.dumps(manifest))


def test_run_json(saved):
    load(saved)
    rewritten(saved, "run.json", format=run.FORMAT + 1)
    with pytest.raises(EkgfxError, match=r"run\.json has format .*upgrade ekgfx"):
        load(saved)


def test_plan_json(saved):
    rewritten(saved, "plan.json", version=VERSION + 1)
    with pytest.raises(EkgfxError, match=r"plan has format version .*upgrade ekgfx"):
        load(saved)


def test_model_safetensors(saved):
    file = saved / checkpoint.WEIGHTS
    newer = {"ekgfx_format": str(run.FORMAT + 1), "plan": checkpoint.read_plan(saved).digest}
    save_file(load_file(file), file, newer)
    accept(saved, checkpoint.WEIGHTS)
    with pytest.raises(EkgfxError, match=r"model\.safetensors has format .*upgrade ekgfx"):
        load(saved)


def test_checkpoint_of_a_training(tmp_path, monkeypatch):
    model = digits_cnn()
    parts = (model, torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", enabled=False), {"seed": 0})
    file = tmp_path / "finetune.safetensors"
    with monkeypatch.context() as newer:
        newer.setattr(training_state, "FORMAT", training_state.FORMAT + 1)
        training_state.save_state(file, *parts, [], {}, {})
    with pytest.raises(EkgfxError, match=r"checkpoint format .*upgrade ekgfx"):
        training_state.load_state(file, *parts)


def test_bank(tmp_path):
    rows = np.zeros(2, np.dtype([("sample", "<u4"), ("values", "<f2", (3,))]))
    rows.tofile(tmp_path / "teacher-0.rows")
    teacher = {"step": 0, "loss": 0.1, "infidelity": 0.0, "file": checksum(tmp_path / "teacher-0.rows")}
    manifest = {"format": store.FORMAT, "shape": [3], "top_k": None, "temperature": 4.0, "teachers": [teacher]}
    (tmp_path / "bank.json").write_text(json.dumps(manifest))
    Bank.open(tmp_path)
    (tmp_path / "bank.json").write_text(json.dumps({**manifest, "format": store.FORMAT + 1}))
    with pytest.raises(EkgfxError, match=r"bank format .*upgrade ekgfx"):
        Bank.open(tmp_path)


def test_lines_and_exports_go_with_their_run(saved):
    """history.jsonl, finetune.jsonl, export.json, dense.safetensors: nobody reads them before run.json was accepted."""
    rewritten(saved, "run.json", format=run.FORMAT + 1)
    from ekgfx import report

    for read in (Run.reopen, report.Facts.of, checkpoint.load_run):
        with pytest.raises(EkgfxError, match="upgrade ekgfx"):
            read(saved)


@pytest.mark.parametrize("change", ["shape", "rows", "none"])
def test_a_bank_whose_description_does_not_fit_its_rows_is_refused(tmp_path, change):
    kind = np.dtype([("sample", "<u4"), ("values", "<f2", (3,))])
    teachers = []
    for number, count in enumerate((2, 3 if change == "rows" else 2)):
        file = tmp_path / f"teacher-{number}.rows"
        np.zeros(count, kind).tofile(file)
        teachers.append({"step": number, "loss": 0.1, "infidelity": 0.0, "file": checksum(file)})
    shape, teachers = ([4] if change == "shape" else [3]), ([] if change == "none" else teachers)
    manifest = {"format": 1, "shape": shape, "top_k": None, "temperature": 4.0, "teachers": teachers}
    (tmp_path / "bank.json").write_text(json.dumps(manifest))
    with pytest.raises(EkgfxError, match="does not describe the rows beside it"):
        Bank.open(tmp_path)
