"""Saving and loading: the same function again, and every damage or mix-up refused with a clear text."""

import copy
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import ekgfx
from ekgfx.base.files import checksum
from ekgfx.errors import PlanError, RunError
from ekgfx.graph.plan import Plan
from ekgfx.models import source
from ekgfx.runs import checkpoint
from ekgfx.runs.directory import FORMAT, Run, read_manifest

DIGITS = source.parse("ekgfx.models:digits_cnn")
IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def every_other(traced: ekgfx.TracedModel) -> Plan:
    kept = {name: tuple(range(0, group.size, 2)) for name, group in traced.groups.items()}
    return Plan(kept, traced.groups.digest)


def randomised(model: nn.Module) -> nn.Module:
    """Weights and statistics as after some training, so that a tensor left at its initial value shows."""
    generator = torch.Generator().manual_seed(2)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def pruned() -> tuple[nn.Module, Plan]:
    built = DIGITS.build()
    traced = ekgfx.trace(built.model, built.example_inputs)
    plan = every_other(traced)
    return randomised(ekgfx.prune(built.model, plan, traced)), plan


@pytest.fixture
def saved(pruned, tmp_path) -> Path:
    ekgfx.save(pruned[0], tmp_path / "run", plan=pruned[1], source=DIGITS)
    return tmp_path / "run"


def test_a_run_in_half_precision_takes_its_own_example(pruned, tmp_path):
    half = copy.deepcopy(pruned[0]).half()
    ekgfx.save(half, tmp_path / "half", plan=pruned[1], source=DIGITS)
    loaded = checkpoint.load_run(tmp_path / "half")
    (example,) = loaded.example_inputs
    assert torch.equal(loaded.model(example), half(example)) and example.dtype == torch.float16


def test_load_gives_the_same_module_and_function(pruned, saved):
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    loaded = ekgfx.load(saved)
    assert torch.rand(1) == expected_draw  # loading draws nothing from the user's generator
    assert type(loaded) is type(pruned[0])
    assert loaded.stem[0].out_channels == 8
    assert torch.equal(loaded(IMAGES), pruned[0](IMAGES))
    assert not loaded.training


def test_nothing_is_pickled(saved):
    assert {path.suffix for path in saved.iterdir() if path.name != ".lock"} == {".json", ".safetensors"}
    for path in saved.glob("*.json"):
        json.loads(path.read_text())


def test_load_with_a_factory(pruned, tmp_path):
    ekgfx.save(pruned[0], tmp_path / "run", plan=pruned[1])
    with pytest.raises(RunError, match="does not say how to build its model: pass model="):
        ekgfx.load(tmp_path / "run")
    with pytest.raises(RunError, match="pass example_inputs="):
        ekgfx.load(tmp_path / "run", model=lambda: DIGITS.build().model)
    for build, inputs in [
        (lambda: DIGITS.build().model, (IMAGES,)),
        (lambda: (DIGITS.build().model, (IMAGES,)), None),
    ]:
        assert torch.equal(ekgfx.load(tmp_path / "run", build, inputs)(IMAGES), pruned[0](IMAGES))
    ekgfx.save(pruned[0], tmp_path / "run", plan=pruned[1], example_inputs=(IMAGES,))
    assert torch.equal(ekgfx.load(tmp_path / "run", lambda: DIGITS.build().model)(IMAGES), pruned[0](IMAGES))


class Tied(nn.Module):
    """Input and output projections share one weight; the inner linear has a norm whose buffers count."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8, bias=False)
        self.inner = nn.Linear(8, 12)
        self.norm = nn.BatchNorm1d(12)
        self.back = nn.Linear(12, 8)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = nn.Parameter(torch.randn(6, 8))
        self.again = nn.Linear(8, 6, bias=False)
        self.again.weight = self.head.weight

    def forward(self, x):
        x = self.back(self.norm(self.inner(self.embed(x))).relu())
        return self.head(x) + self.again(x * 2)


def test_tied_weights_and_types_survive(tmp_path):
    inputs = (torch.randn(4, 6),)
    model = Tied().eval()
    traced = ekgfx.trace(model, inputs)
    plan = every_other(traced)
    pruned = randomised(ekgfx.prune(model, plan, traced)).double()
    ekgfx.save(pruned, tmp_path / "run", plan=plan, example_inputs=inputs)
    loaded = ekgfx.load(tmp_path / "run", Tied)
    assert loaded.again.weight is loaded.head.weight
    assert torch.equal(loaded(inputs[0].double()), pruned(inputs[0].double()))


def test_a_run_pruned_further_stands_alone(saved, tmp_path):
    again = source.parse(str(saved))
    built = checkpoint.build(again)
    traced = ekgfx.trace(built.model, built.example_inputs)
    plan = every_other(traced)
    smaller = ekgfx.prune(built.model, plan, traced)
    ekgfx.save(smaller, tmp_path / "second", plan=plan, source=again)
    shutil.rmtree(saved)
    loaded = checkpoint.load_run(tmp_path / "second")
    assert loaded.model.stem[0].out_channels == 4
    assert loaded.normalization == built.normalization
    assert torch.equal(loaded.model(IMAGES), smaller(IMAGES))


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damaged_files_are_refused(saved, name, damage):
    file = saved / name
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-7])
    with pytest.raises(RunError, match=f"{name} (was changed or cut short|is missing)"):
        ekgfx.load(saved)


def adopt(run: Path, *files: Path) -> None:
    """Copies files into a run and records them as its own, as somebody who mixes runs by hand would."""
    with Run.reopen(run) as opened:
        for file in files:
            with opened.replacing(file.name) as partial:
                shutil.copy(file, partial)
    assert read_manifest(run)["files"][file.name]["now"] == checksum(run / file.name)


def test_weights_of_another_plan_are_refused(pruned, saved, tmp_path):
    other = pruned[1].with_kept("fuse.0", range(3))
    built = DIGITS.build()
    smaller = ekgfx.prune(built.model, other, example_inputs=built.example_inputs)
    ekgfx.save(smaller, tmp_path / "other", plan=other, source=DIGITS)
    adopt(saved, tmp_path / "other" / "model.safetensors")
    with pytest.raises(PlanError, match=r"model\.safetensors was made by another plan"):
        ekgfx.load(saved)


def test_plan_of_another_model_is_refused(saved):
    with pytest.raises(PlanError, match=r"was not made from this Tied: the plan was made for another model"):
        ekgfx.load(saved, Tied, (torch.randn(4, 6),))


def test_newer_weights_are_refused(pruned, saved, tmp_path):
    checkpoint.save_tensors(
        pruned[0], tmp_path / "model.safetensors", {"ekgfx_format": str(FORMAT + 1), "plan": pruned[1].digest}
    )
    adopt(saved, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match=f"has format {FORMAT + 1}, this ekgfx reads up to {FORMAT}"):
        ekgfx.load(saved)


def test_weights_without_a_tensor_are_refused(pruned, saved, tmp_path):
    metadata = {"ekgfx_format": str(FORMAT), "plan": pruned[1].digest}
    checkpoint.save_tensors(pruned[0].stem, tmp_path / "model.safetensors", metadata)
    adopt(saved, tmp_path / "model.safetensors")
    with pytest.raises(RunError, match="does not hold the weights of this model: .*Missing key"):
        ekgfx.load(saved)


def test_full_disk_is_one_line(pruned, tmp_path):
    """A real file system that is too small, where mounting one is allowed."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(RunError, match="No space left on device.*; free some space") as caught:
            ekgfx.save(pruned[0], small / "run", plan=pruned[1], source=DIGITS)
        assert "\n" not in str(caught.value)
        assert not (small / "run" / "model.safetensors").exists()
    finally:
        subprocess.run(["umount", small], check=True)
