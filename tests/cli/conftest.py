"""Running the command line as a user does, in a folder of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.commands import Done, typed_in

# Small enough for seconds, whole enough to pass through every stage.
TINY = """
model: ekgfx.models:digits_cnn
data: digits
pretrain: {epochs: 1, batch_size: 128}
search: {flops: 0.7, align: 4, train_per_class: 4, val_per_class: 4, val_batch_size: 16, hardest_first: true}
finetune: {epochs: 1, batch_size: 256, teachers: 2}
"""


def environment() -> dict[str, str]:
    """The tree's own code, no network, one thread (so that results do not depend on how busy the machine is)."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


@pytest.fixture
def tiny(tmp_path) -> Path:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY)
    return recipe


@pytest.fixture
def ekgfx_process(tmp_path) -> Callable[..., Done]:
    """`ekgfx_process("groups", "timm:resnet18")` in a process of its own, started in the test's folder."""

    def run(*arguments: object) -> Done:
        done = subprocess.run(
            command(*arguments), cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
        )
        return Done(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def ekgfx(tmp_path, monkeypatch, capsys) -> Callable[..., Done]:
    """The same without a process's start-up, which takes longer than most commands."""
    return typed_in(tmp_path, monkeypatch, capsys)


@pytest.fixture
def refused(ekgfx) -> Callable[..., str]:
    """`refused("prune", "nonsense")` → the one line that says why.

    Checks what holds for every refusal: exit code 2, one line, no traceback.
    """

    def run(*arguments: object) -> str:
        done = ekgfx(*arguments)
        last = done.err.splitlines()[-1]
        assert done.code == 2, last
        assert last.startswith("ekgfx: ")
        return last

    return run


def command(*arguments: object) -> list[str]:
    """What a process of its own is started with."""
    return [sys.executable, "-m", "ekgfx", *map(str, arguments)]
