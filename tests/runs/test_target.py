"""Targets as they are typed, and the widths that hardware likes."""

import pytest
import torch

from ekgfx.errors import RecipeError
from ekgfx.latency.target import Staircase, Target, staircase


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("cuda:fp16:batch=64", Target("cuda", "fp16", 64)),
        ("cpu", Target("cpu", "fp32", 1)),
        ("cpu:batch=8:threads=1", Target("cpu", "fp32", 8, 1)),
        ("cpu:int8:batch=8", Target("cpu", "int8", 8)),
        ("cuda:tf32", Target("cuda", "tf32", 1)),
    ],
)
def test_is_read_back_from_its_text(text: str, target: Target) -> None:
    assert Target.parse(text) == target == Target.parse(str(target))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("npu", "unknown target 'npu': layers can be timed on cpu and cuda"),
        ("tensorrt:fp16", "unknown target 'tensorrt:fp16'"),
        ("cuda:int8", "cannot read 'int8' in target 'cuda:int8'"),
        ("cpu:tf32", "cannot read 'tf32' in target 'cpu:tf32'"),
        ("cuda:batch=0", "cannot read 'batch=0'"),
        ("cuda:batch=many", "cannot read 'batch=many'"),
        ("cuda:fp32:64", "cannot read '64'"),
        ("", "unknown target ''"),
        ("cpu:batch=" + 5000 * "9", "cannot read 'batch=999"),
    ],
)
def test_anything_else_is_refused(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as error:
        Target.parse(text)
    assert len(str(error.value)) < 500


def test_staircases(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [staircase("cuda", p).tile for p in ("fp16", "bf16", "int8", "tf32", "fp32")] == [8, 8, 8, 4, 4]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert staircase("cpu", "fp32") == Staircase(16, 4)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert staircase("cpu", "fp32") == Staircase(8, 4)
