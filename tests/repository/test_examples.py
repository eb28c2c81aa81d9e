"""The examples are run, small."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.loss import LabelSmoothingCrossEntropy

import ekgfx
from ekgfx.models import source
from tests.support import ROOT

EXAMPLES = ROOT / "examples"
SCRIPT = Path(os.environ.get("EKGFX_TIMM_SCRIPT", ROOT / "tests" / "support" / "timm_script.py"))
"""EKGFX_TIMM_SCRIPT=FILE takes timm's own train.py instead of the script here."""


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_lightning():
    pytest.importorskip("pytorch_lightning")
    assert example("lightning_ekg").main(epochs=2) > 0.9


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """train/ with 4 images of each of 3 classes, validation/ with one."""
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 4), ("validation", 1)):
        for label in (0, 1, 2):
            (folder / split / f"class{label}").mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"class{label}" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def timm_run(tmp_path_factory) -> Path:
    """A run of a timm model with its memory bank of 12 images."""
    run = tmp_path_factory.mktemp("timm") / "run"
    asked = source.parse("timm:test_resnet", weights="none", input="1x3x32x32", classes=3)
    built = asked.build()
    traced = ekgfx.trace(built.model, built.example_inputs)
    batches = [(torch.randn(12, 3, 32, 32), torch.arange(12) % 3)]
    result = ekgfx.search(traced, batches, flops=0.9)
    ekgfx.save(ekgfx.prune(built.model, result.plan, traced), run, plan=result.plan, source=asked)
    ekgfx.build_bank(traced, result, batches, run / "bank", teachers=2)
    return run


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [[], ["--no-prefetcher", "--model-ema"]], ids=["usual", "average"])
def test_timms_training_script(tmp_path, monkeypatch, images, timm_run, options):
    """Labels and indices arrive at the bank's loss, the pruned network is trained, its checkpoint makes it again."""
    seen: list[int] = []
    forward = ekgfx.EKGLoss.forward

    def noted(loss: ekgfx.EKGLoss, outputs: list, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        assert torch.equal(labels, index // 4)
        seen.extend(index.tolist())
        return forward(loss, outputs, labels, index)

    monkeypatch.setattr(ekgfx.EKGLoss, "forward", noted)
    monkeypatch.setattr(sys, "argv", [])
    module = example("timm_train_ekg")
    monkeypatch.setattr(module.timm.data, "create_dataset", module.timm.data.create_dataset)
    monkeypatch.setattr(LabelSmoothingCrossEntropy, "forward", LabelSmoothingCrossEntropy.forward)
    told = f"--data-dir {images} --epochs 2 --batch-size 4 --lr 0.01 --warmup-epochs 0 --workers 1 --device cpu"
    module.main(timm_run, SCRIPT, [*told.split(), "--output", str(tmp_path), "--experiment", "trained", *options])
    assert len(seen) >= 24 and sorted(seen) == sorted([*range(12)] * (len(seen) // 12))  # timm may add epochs

    with (tmp_path / "trained" / "summary.csv").open() as lines:
        assert [int(line["epoch"]) for line in csv.DictReader(lines)][:2] == [0, 1]
    last = tmp_path / "trained" / "last.pth.tar"
    again = timm.create_model(f"local-dir:{timm_run / 'timm'}", checkpoint_path=str(last))
    weights = ekgfx.load(timm_run).state_dict()
    changed = [name for name, value in again.state_dict().items() if not torch.equal(value, weights[name])]
    assert changed and again.state_dict().keys() == weights.keys()


@pytest.mark.parametrize("option", ["--mixup", "--loss=bce"])
def test_what_a_bank_cannot_teach_is_refused(timm_run, option):
    with pytest.raises(SystemExit, match=r"not with a memory bank"):
        example("timm_train_ekg").main(timm_run, SCRIPT, ["--epochs", "1", option, "0.2"])


SPAWNING = """
import multiprocessing, runpy, sys
multiprocessing.set_start_method("spawn")
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv.pop(0))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_timms_training_script_with_spawned_workers(tmp_path, images, timm_run):
    """From the command line, with worker processes started as on macOS and Windows: they get the data set pickled."""
    told = f"--data-dir {images} --epochs 1 --batch-size 12 --lr 0.01 --warmup-epochs 0 --workers 1 --device cpu"
    told += f" --output {tmp_path} --experiment e"
    example = [EXAMPLES, EXAMPLES / "timm_train_ekg.py", timm_run, SCRIPT]
    subprocess.run(
        [sys.executable, "-c", SPAWNING, *map(str, example), *told.split()],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
    )
    assert [line["epoch"] for line in csv.DictReader((tmp_path / "e" / "summary.csv").open())] == ["0"]
