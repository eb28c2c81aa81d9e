"""Whatever is in a file: it is taken, or refused by one EkgfxError in one line; never anything else, never for long,
never with much memory.

Each target is fed changed forms of a valid file. `pytest -m sweep tests/runs/test_fuzz.py` feeds more than 10,000
in all. (Whole runs: test_fuzz_runs.py.)
"""

import argparse
import copy
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ekgfx.export import check_parity, to_onnx
from PIL import Image

import ekgfx
from ekgfx.data.arrays import read_npz
from ekgfx.data.decoding import decode
from ekgfx.graph.plan import Plan
from ekgfx.models import digits_cnn
from ekgfx.models.weight_files import read_file
from ekgfx.models.weights import load_weights
from ekgfx.runs import checkpoint
from ekgfx.settings import recipe
from ekgfx.training.state import load_state, save_state
from tests.support.fuzzing import MEMORY, SECONDS, bounded, mutants, of_bytes, of_json, refused

FEW, MANY = 25, 1000
INPUT = torch.zeros(2, 1, 8, 8)


@cache
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return digits_cnn().eval()


@cache
def traced() -> ekgfx.TracedModel:
    return ekgfx.trace(network(), INPUT)


@dataclass(frozen=True)
class Target:
    """name: of the file; valid: makes its content, given an empty folder; change: how it is malformed; use: what reads
    it."""

    name: str
    valid: Callable[[Path], bytes]
    change: Callable
    use: Callable[[Path], object]


def saved(name: str, write: Callable[[Path], object]) -> Callable[[Path], bytes]:
    def valid(folder: Path) -> bytes:
        write(folder / name)
        return (folder / name).read_bytes()

    return valid


def plan_text() -> str:
    return Plan({"stem.0": tuple(range(9)), "fuse.0": tuple(range(0, 64, 2))}, traced().groups.digest).to_json()


def use_plan(file: Path) -> None:
    plan = Plan.from_json(file.read_text(encoding="utf-8", errors="surrogateescape"))
    traced().cost(plan)


def write_npz(file: Path) -> None:
    np.savez_compressed(file, **{name: value.numpy() for name, value in network().state_dict().items()})


def write_checkpoint(file: Path) -> None:
    """As timm and Lightning write them."""
    state = network().state_dict()
    average = {f"model.module.{name}": tensor for name, tensor in state.items()}
    content = {"epoch": 3, "state_dict": state, "ema": average, "args": argparse.Namespace(lr=0.1, model="digits")}
    torch.save(content, file)


def write_old(file: Path) -> None:
    torch.save({"net": network().state_dict(), "best": 0.5}, file, _use_new_zipfile_serialization=False)


def write_images(file: Path) -> None:
    np.savez_compressed(file, images=np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8), labels=np.arange(4))


def picture(form: str) -> Callable[[Path], bytes]:
    def valid(folder: Path) -> bytes:
        pixels = np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, form)
        return stream.getvalue()

    return valid


def trainer() -> tuple:
    model = copy.deepcopy(network())
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), torch.amp.GradScaler("cpu", enabled=False)


def write_state(file: Path) -> None:
    model, optimizer, scaler = trainer()
    model(INPUT).sum().backward()
    optimizer.step()
    save_state(
        file, model, optimizer, scaler, {"seed": 1}, [{"number": 1, "loss": 0.1, "lr": 0.1, "seconds": 1.0}], {}, {}
    )


TARGETS = [
    Target("plan.json", lambda folder: plan_text().encode(), of_json, use_plan),
    Target(
        "recipe.yaml",
        lambda folder: yaml.safe_dump(json.loads(json.dumps(recipe.load("quickstart").to_json()))).encode(),
        of_bytes,
        lambda file: recipe.load(str(file)),
    ),
    Target(
        "recipe.json.yaml",  # JSON is YAML
        lambda folder: json.dumps(recipe.load("quickstart").to_json()).encode(),
        of_json,
        lambda file: recipe.load(str(file)),
    ),
    Target(
        "w.safetensors",
        saved("w.safetensors", lambda file: checkpoint.save_tensors(network(), file)),
        of_bytes,
        lambda file: load_weights(copy.deepcopy(network()), file),
    ),
    Target("w.npz", saved("w.npz", write_npz), of_bytes, lambda file: load_weights(copy.deepcopy(network()), file)),
    Target(
        "w.pth",
        saved("w.pth", lambda file: torch.save(network().state_dict(), file)),
        of_bytes,
        lambda file: load_weights(copy.deepcopy(network()), file),
    ),
    Target(
        "w.ckpt", saved("w.ckpt", write_checkpoint), of_bytes, lambda file: load_weights(digits_cnn(), file, ema=True)
    ),
    Target("whole.pt", saved("whole.pt", lambda file: torch.save(network(), file)), of_bytes, read_file),
    Target("old.pth", saved("old.pth", write_old), of_bytes, read_file),
    Target(
        "state.safetensors",
        saved("state.safetensors", write_state),
        of_bytes,
        lambda file: load_state(file, *trainer(), {"seed": 1}),
    ),
    Target("images.npz", saved("images.npz", write_images), of_bytes, lambda file: read_npz([file])),
    Target("image.png", picture("PNG"), of_bytes, lambda file: decode(file, file.name)),
    Target("image.jpg", picture("JPEG"), of_bytes, lambda file: decode(file, file.name)),
    Target(
        "net.onnx",
        saved("net.onnx", lambda file: to_onnx(network(), INPUT, file)),
        of_bytes,
        lambda file: check_parity(network(), file, INPUT),
    ),
]


def feed(target: Target, folder: Path, count: int, seed: int) -> int:
    """How many of `count` malformed files were refused; fails with the input's number where one was not handled."""
    valid = target.valid(folder)
    file = folder / target.name
    file.write_bytes(valid)
    target.use(file)  # the file is valid before it is changed
    found = 0
    with bounded():
        for number, content in enumerate(mutants(valid, count, seed, target.change)):
            signal.alarm(SECONDS)
            file.write_bytes(content)
            try:
                found += refused(lambda: target.use(file))
            except BaseException as error:
                error.add_note(f"{target.name}, seed {seed}, input {number}: {content[:200]!r}")
                raise
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_malformed_file_is_refused_in_one_line(target, tmp_path):
    assert feed(target, tmp_path, FEW, seed=1) > 0


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_many_malformed_files(target, tmp_path):
    assert feed(target, tmp_path, MANY, seed=2) > 0


def test_the_sweep_is_large_enough():
    assert len(TARGETS) * MANY >= 10_000


def test_the_bounds_bite():
    with pytest.raises(MemoryError), bounded():
        np.empty(2 * MEMORY, dtype=np.uint8)
    before = signal.getsignal(signal.SIGALRM)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGALRM)).start()
    with pytest.raises(TimeoutError), bounded():
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is before
