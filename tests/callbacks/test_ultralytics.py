"""Ultralytics' trainer trains the pruned network: with a stand-in that does what it does, and with the library."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ekgfx
from ekgfx.callbacks.ultralytics import keep
from ekgfx.errors import EkgfxWarning, RecipeError


class Head(nn.Conv2d):
    nc = 3


class Network(nn.Module):
    """As Ultralytics': layers in `model`, and the description that they were built from."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), Head(8, 4, 1))
        self.yaml = {"backbone": [[-1, 1, "Conv", [8]]], "head": []}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class Trainer:
    """In the order of Ultralytics': the callback, then the network, from the description or from a checkpoint."""

    def __init__(self, callbacks: list[Callable[[Any], None]], world_size: int = 1, classes: int = 3) -> None:
        self.world_size, self.data = world_size, {"nc": classes}
        for callback in callbacks:
            callback(self)

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> nn.Module:
        return Network()


class Yolo:
    def __init__(self) -> None:
        self.model: nn.Module = Network()
        self.predictor: Any = object()
        self.callbacks: list[Callable[[Any], None]] = []

    def add_callback(self, event: str, callback: Callable[[Any], None]) -> None:
        assert event == "on_pretrain_routine_start"
        self.callbacks.append(callback)


def halved(model: nn.Module, **options: Any) -> nn.Module:
    traced = ekgfx.trace(model, torch.zeros(2, 3, 8, 8))
    return ekgfx.prune(model, ekgfx.Plan({name: tuple(range(4)) for name in traced.groups}), traced, **options)


def test_a_description_of_the_network_before_the_cut_is_told_of() -> None:
    with pytest.warns(EkgfxWarning, match=r"Network\.yaml describes the network before the cut.*keep\(yolo, pruned\)"):
        halved(Network())


def test_a_trainer_is_given_the_pruned_network_and_takes_up_its_checkpoints() -> None:
    yolo = Yolo()
    pruned, before = halved(yolo.model, graphs="allow"), yolo.model
    keep(yolo, pruned)
    assert yolo.model is pruned and yolo.predictor is None and before is not pruned
    assert Trainer(yolo.callbacks).get_model(cfg=yolo.model.yaml) is pruned
    checkpoint = halved(Network(), graphs="allow")
    assert Trainer(yolo.callbacks).get_model(weights=checkpoint) is pruned
    assert torch.equal(pruned.model[0].weight, checkpoint.model[0].weight)
    yolo.model = checkpoint  # what Ultralytics puts there when a training ends
    assert Trainer(yolo.callbacks).get_model(weights=yolo.model) is checkpoint


def test_what_a_trainer_cannot_train_is_said() -> None:
    yolo = Yolo()
    keep(yolo, halved(yolo.model, graphs="allow"))
    with pytest.raises(RecipeError, match="2 processes"):
        Trainer(yolo.callbacks, world_size=2)
    with pytest.raises(RecipeError, match="3 classes apart, and the data have 5"):
        Trainer(yolo.callbacks, classes=5).get_model()
    with pytest.raises(RecipeError, match="not one of the pruned network"):
        Trainer(yolo.callbacks).get_model(weights=Network())


@pytest.mark.skipif(importlib.util.find_spec("ultralytics") is None, reason="ultralytics is not installed")
@pytest.mark.filterwarnings("ignore")
def test_ultralytics_trains_the_pruned_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2
    import numpy as np
    from ultralytics import YOLO

    for kind, content in (("images", None), ("labels", "0 0.5 0.5 0.4 0.4\n")):
        (tmp_path / kind).mkdir()
        for i in range(2):
            if content is None:
                cv2.imwrite(str(tmp_path / kind / f"{i}.jpg"), np.full((32, 32, 3), 60 * i, dtype=np.uint8))
            else:
                (tmp_path / kind / f"{i}.txt").write_text(content)
    (tmp_path / "data.yaml").write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames:\n  0: thing\n")
    (tmp_path / "tiny.yaml").write_text(
        "nc: 1\nbackbone:\n  - [-1, 1, Conv, [16, 3, 2]]\n  - [-1, 1, C2f, [16, True]]\n  - [-1, 1, Conv, [32, 3, 2]]\n"
        "head:\n  - [[1, 2], 1, Detect, [nc]]\n"
    )
    monkeypatch.chdir(tmp_path)
    yolo = YOLO("tiny.yaml")
    traced = ekgfx.trace(yolo.model, torch.zeros(2, 3, 32, 32))
    plan = ekgfx.search(traced, flops=0.6, strategy="uniform", importance="magnitude").plan
    keep(yolo, ekgfx.prune(yolo.model, plan, traced))
    shapes = [tuple(p.shape) for p in yolo.model.parameters()]
    yolo.train(data="data.yaml", epochs=1, imgsz=32, batch=2, workers=0, device="cpu", plots=False, verbose=False)
    assert [tuple(p.shape) for p in yolo.model.parameters()] == shapes
    assert yolo.val(data="data.yaml", imgsz=32, workers=0, device="cpu", plots=False, verbose=False) is not None
