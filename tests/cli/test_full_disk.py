"""A disk that is really full: one line, and nothing lost. Needs Linux, where a user may mount a small file system."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import command, environment

# A file system of SIZE in a namespace of its own: the job on it, then the same disk with room, and the job again.
SCRIPT = """
mkdir disk && mount -t tmpfs -o size=$SIZE none disk || exit 9
$EKGFX prune --recipe tiny.yaml -o disk/run 2> first.txt; echo $? > first
mount -o remount,size=64m disk
[ -e disk/run ] && again="--resume disk/run" || again="--recipe tiny.yaml -o disk/run"
$EKGFX prune $again 2> second.txt
echo $? > second
cp -r disk/run run
"""


@pytest.fixture(scope="module")
def namespaces() -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no file system can be mounted here")


@pytest.mark.sweep
@pytest.mark.parametrize("size", ["8k", "300k", "500k"], ids=["at once", "while pre-training", "while fine-tuning"])
def test_a_full_disk_loses_nothing(namespaces, tiny, ekgfx, tmp_path, size):
    variables = {**environment(), "SIZE": size, "EKGFX": " ".join(command())}
    subprocess.run(["unshare", "-rm", "sh", "-c", SCRIPT], cwd=tmp_path, env=variables, check=True, timeout=500)
    said = (tmp_path / "first.txt").read_text()
    assert (tmp_path / "first").read_text() == "2\n", said
    assert "No space left on device" in said.splitlines()[-1] and "free some space" in said and "Traceback" not in said
    assert (tmp_path / "second").read_text() == "0\n", (tmp_path / "second.txt").read_text()

    assert ekgfx("prune", "--recipe", tiny, "-o", "undisturbed").code == 0
    resumed, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    assert (resumed / "plan.json").read_text() == (undisturbed / "plan.json").read_text()
    assert steps(resumed / "history.jsonl") == steps(undisturbed / "history.jsonl")
    assert tensors(resumed / "model.safetensors") == tensors(undisturbed / "model.safetensors")


def steps(file: Path) -> list[dict]:
    """The steps of a search, but for how long they took."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in step.items() if name not in {"seconds", "eta"}} for step in found]


def tensors(file: Path) -> bytes:
    """What follows the header of a safetensors file."""
    content = file.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]
