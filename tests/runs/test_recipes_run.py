"""Every recipe that comes with the package runs from beginning to end, shrunken; and says what it measured."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ekgfx.cli import summary
from ekgfx.settings import recipe
from tests.runs.test_paper_recipes import DEEP, SHALLOW, check, dry_run, images

FAST: dict[str, Any] = {"pretrain__batch_size": 16, "pretrain__workers": 0, "export__latency": False}


def test_every_recipe_is_run():
    here = {"quickstart", "cifar10-resnet56", "imagenet-vit-small", "finetune-on-my-folder"}
    assert set(recipe.names()) == here | {"cifar10-mobilenetv2", *SHALLOW, *DEEP}


@pytest.mark.parametrize("name", recipe.names())
def test_it_names_its_result_or_says_that_there_is_none(name):
    said = recipe.load(name).measured
    assert said.startswith("not yet measured") or re.search(r"\d+(\.\d+)?%.*seed \d+.*torch.*\d{4}-\d\d-\d\d", said)


def test_quickstart(tmp_path, capsys):
    changes = {"pretrain__epochs": 1, "search__flops": 0.8, "weights": "auto", "finetune__batch_size": 256}
    run = dry_run(tmp_path, "quickstart", **{**FAST, **changes, "pretrain__batch_size": 256})
    check(run, 0.8, 10)
    assert run.has("model.onnx")
    timed = {(1, "dense"): 0.3, (1, "pruned"): 0.15, (64, "dense"): 8.0, (64, "pruned"): 5.0}
    timings = [
        {"provider": "cpu", "precision": "fp32", "batch": batch, "network": network, "median_ms": ms}
        for (batch, network), ms in timed.items()
    ]
    (run.path / "export.json").write_text(json.dumps({"latency": {"timings": timings}}))
    capsys.readouterr()
    summary.show(run.path)
    *_, gained, advice = capsys.readouterr().out.strip().splitlines()
    assert gained.startswith("gained: 2.00 times as fast on cpu fp32 batch 1, 1.60 times as fast on cpu fp32 batch 64;")
    assert advice.startswith("your own model: ekgfx prune my_model.py:factory")
    settings = run.manifest["settings"]
    run.update(settings={**settings, "search": {**settings["search"], "flops": 0.5, "align": 1}})
    for ms, hint in ((0.29, True), (0.12, False)):  # of 0.3, at 80% of the MACs at most: half of what they promise
        timings[1]["median_ms"] = timings[3]["median_ms"] = ms
        timings[2]["median_ms"] = 0.3
        (run.path / "export.json").write_text(json.dumps({"latency": {"timings": timings}}))
        summary.show(run.path)
        assert ("fewer MACs brought little speed" in capsys.readouterr().out) is hint


def test_cifar10_resnet56(tmp_path):
    """With a network of twenty layers: each step asks every group."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 10)):
        pictures = draw.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", images=pictures, labels=np.arange(count, dtype=np.uint8) % 10)
    changes = {"model": "ekgfx.models:resnet20_cifar", "data": f"npz:{tmp_path}", "search__flops": 0.97}
    check(dry_run(tmp_path, "cifar10-resnet56", **changes), 0.97, 10)


def test_imagenet_vit_small(tmp_path):
    """With timm's smallest transformer; whole heads and multiples of eight go."""
    data = images(tmp_path / "images", 72)
    changes = {"model": "timm:test_vit", "input": "1x3x64x64", "search__flops": 0.9, "export__fp16": False}
    run = dry_run(tmp_path, "imagenet-vit-small", data=data, **changes, export__latency=False)
    check(run, 0.9, 1000)
    assert run.has("model.onnx")


@pytest.mark.sweep
def test_imagenet_vit_small_at_full_size(tmp_path):
    data = images(tmp_path / "images", 256)
    run = dry_run(tmp_path, "imagenet-vit-small", data=data, search__accept=12, export__onnx=False)
    check(run, 0.55, 1000)


def folder(path: Path, classes: int) -> str:
    """Random pictures in one folder for each class, without a split."""
    draw = np.random.default_rng(0)
    for number in range(classes):
        (path / f"class-{number}").mkdir(parents=True)
        for picture in range(5):
            pixels = draw.integers(0, 256, (72, 80, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"class-{number}" / f"{picture}.png")
    return f"folder:{path}"


def test_finetune_on_my_folder(tmp_path):
    """With timm's smallest residual network."""
    data = folder(tmp_path / "images", 3)
    changes = {"model": "timm:test_resnet", "classes": 3, "input": "1x3x64x64", "search__flops": 0.95}
    fast = {**FAST, "pretrain__epochs": 1, "pretrain__batch_size": 4}
    run = dry_run(tmp_path, "finetune-on-my-folder", data=data, **fast, **changes)
    check(run, 0.95, 3)
    assert run.has("model.onnx")
