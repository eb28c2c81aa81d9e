"""Whatever is in a file: it is taken, or refused by one EkgfxError in one line; never anything else, never for long,
never with much memory.

Each target is fed changed forms of a valid file. `pytest -m sweep tests/test_fuzz.py` feeds more than 10,000 in all.
"""

import copy
import io
import json
import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from ekgfx import checkpoint, pipeline, recipe, report
from ekgfx.bank import Bank
from ekgfx.data.arrays import read_npz
from ekgfx.data.sources import decode
from ekgfx.errors import EkgfxError
from ekgfx.files import checksum
from ekgfx.models import digits_cnn
from ekgfx.plan import Plan
from ekgfx.report import Facts
from ekgfx.run import Run
from ekgfx.training_state import load_state, save_state
from ekgfx.weights import load_weights
from tests.fuzzing import mutants, of_bytes, of_json

SECONDS = 20
"""Longest that one input may take: a hang, not a slow machine."""
MEMORY = 3 * 2**30
"""Most address space that one input may add."""
LONGEST = 1000
"""Most characters of an error."""
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
    save_state(file, model, optimizer, scaler, {"seed": 1}, [{"number": 1, "loss": 0.1, "lr": 0.1, "seconds": 1.0}])


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


@contextmanager
def bounded() -> Iterator[None]:
    """Stops what takes too long, and what asks for too much memory."""

    def late(*_: object) -> None:
        raise TimeoutError(f"still at it after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def refused(use: Callable[[], object]) -> bool:
    """Whether it was refused; anything but an EkgfxError in one line passes through, and fails the test."""
    try:
        use()
    except EkgfxError as error:
        said = str(error)
    else:
        return False
    assert said.strip(), "the error says nothing"
    assert len(said) < LONGEST, f"an error nobody can read: {said}"
    return True


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

    with Run.create(path, settings=recipe.parse(yaml.safe_load(text)).to_json()) as run:
        pipeline.prune_job(run, Silent())
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
        pipeline.read_result(run)
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
    assert feed_run(whole_run, tmp_path, name, 5, seed=1) > 0


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUN_FILES)
def test_many_malformed_runs(name, whole_run, tmp_path):
    assert feed_run(whole_run, tmp_path, name, 200, seed=2) > 0


def test_the_sweep_is_large_enough():
    assert len(TARGETS) * MANY + len(RUN_FILES) * 200 >= 10_000


def test_the_bounds_bite():
    with pytest.raises(MemoryError), bounded():
        np.empty(2 * MEMORY, dtype=np.uint8)
    before = signal.getsignal(signal.SIGALRM)
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGALRM)).start()
    with pytest.raises(TimeoutError), bounded():
        time.sleep(5)
    assert signal.getsignal(signal.SIGALRM) is before
