"""The recipes of the paper's experiments, through every stage, on random images: shrunken, and (sweep) at full size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ekgfx.bank import Bank
from ekgfx.pipeline.jobs import prune_job
from ekgfx.runs.directory import Run
from ekgfx.settings import recipe

SHALLOW = ["imagenet-resnet18", "imagenet-mobilenetv2"]
DEEP = ["imagenet-resnet34", "imagenet-resnet50", "imagenet-resnet50-byol"]


class Silent:
    """Nobody watches."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def images(folder: Path, size: int) -> str:
    """Random pictures in folders named as ImageNet's classes are numbered; the SPEC that opens them."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        (folder / split).mkdir(parents=True)
        for number in range(count):
            picture = draw.integers(0, 256, (size, size + 10, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / split / f"{60 * number:04}_{number}.jpg")
    return f"folder:{folder}"


def dry_run(path: Path, name: str, **changes: Any) -> Run:
    """The recipe's job with few images, one epoch and random weights; everything else as it stands there."""
    few = {"weights": "none", "device": "cpu", "finetune.epochs": 1, "finetune.batch_size": 4, "finetune.workers": 0}
    asked = recipe.override(recipe.load(name), {**few, **{key.replace("__", "."): new for key, new in changes.items()}})
    with Run.create(path / "run", settings=asked.to_json()) as run:
        prune_job(run, Silent())  # type: ignore[arg-type]
    return run


def check(run: Run, keep: float, classes: int) -> None:
    results = run.manifest["results"]
    assert run.manifest["status"] == "done"
    assert results["finetuned"]["macs"] <= keep * results["before"]["macs"]
    assert results["finetuned"]["accuracy"] is not None
    bank = Bank.open(run.path / "bank")
    assert bank.row.shape == (classes,)
    assert bank.row.temperature == (10.0 if classes == 1000 else 4.0)


@pytest.mark.parametrize("name", [*SHALLOW, *(pytest.param(name, marks=pytest.mark.sweep) for name in DEEP)])
def test_imagenet_shrunken(tmp_path, name):
    data = images(tmp_path / "images", 72)
    run = dry_run(tmp_path, name, data=data, input="1x3x64x64", search__flops=0.93, export__onnx=False)
    check(run, 0.93, 1000)
    widths = [len(kept) for kept in run.read("plan.json")["kept"].values()]
    assert widths and all(width % 8 == 0 for width in widths)


@pytest.mark.sweep
@pytest.mark.parametrize("name", SHALLOW + DEEP)
def test_imagenet_at_full_size(tmp_path, name):
    """224×224, the recipe's own budget (several candidates a step, for time's sake), ONNX export and all."""
    data = images(tmp_path / "images", 256)
    run = dry_run(tmp_path, name, data=data, search__accept=12, export__fp16=False, export__latency=False)
    check(run, recipe.load(name).search.flops, 1000)
    assert run.has("model.onnx")


def test_cifar10_mobilenetv2(tmp_path):
    draw = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        pictures = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=pictures, labels=np.arange(count, dtype=np.uint8) % 10)
    changes = {"pretrain__epochs": 1, "pretrain__batch_size": 20, "search__flops": 0.97, "weights": "auto"}
    check(dry_run(tmp_path, "cifar10-mobilenetv2", data=f"npz:{tmp_path}", **changes), 0.97, 10)


def test_budgets_are_the_papers():
    budgets = {name: recipe.load(name).search.flops for name in recipe.names()}
    assert budgets["imagenet-resnet18"] == pytest.approx(1 - 0.501, abs=0.002)
    assert budgets["imagenet-resnet34"] == pytest.approx(1 - 0.451, abs=0.002)
    assert budgets["imagenet-resnet50"] == pytest.approx(1 - 0.450, abs=0.002)
    assert budgets["imagenet-resnet50-byol"] == pytest.approx(1 - 0.550, abs=0.002)
    assert budgets["cifar10-mobilenetv2"] == budgets["cifar10-resnet56"] == 0.45
