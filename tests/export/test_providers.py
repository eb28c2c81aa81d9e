"""Which providers are there; none of these tests needs a GPU, and all hold with one."""

import onnxruntime as ort
import pytest
import torch
from ekgfx.export import PROVIDERS, Presence, providers
from ekgfx.export.providers import provider

from ekgfx.errors import ExportError


def test_the_cpu_is_always_there():
    here = providers()
    assert "cpu" in here.present
    assert set(here.present) | set(here.missing) == set(PROVIDERS)
    assert not set(here.present) & set(here.missing)


def test_what_is_missing_is_one_calm_line():
    here = Presence(("cpu",), {"cuda": "no CUDA device", "tensorrt": "no CUDA device", "cuda-graph": "broken"})
    assert here.note == "cuda, tensorrt not available: no CUDA device; cuda-graph not available: broken"
    assert Presence(("cpu",)).note == ""
    assert "\n" not in providers().note


def test_unknown_provider():
    with pytest.raises(ExportError, match="unknown provider 'npu'; there are cpu, cuda"):
        provider("npu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_unreachable_provider_says_why_and_what_there_is():
    with pytest.raises(ExportError, match="'cuda' cannot be used: .*; present here: cpu"):
        provider("cuda")


def test_build_without_a_provider(monkeypatch):
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    providers.cache_clear()
    try:
        assert "built without it (install onnxruntime-gpu)" in providers().missing["cuda"]
    finally:
        providers.cache_clear()


@pytest.mark.skipif(
    torch.cuda.is_available() or "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="needs the GPU build of onnxruntime on a machine without a GPU",
)
def test_device_without_its_libraries(monkeypatch, capfd):
    """torch sees a GPU, onnxruntime cannot start on it: the reason is given, and nothing else is printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    providers.cache_clear()
    try:
        reason = providers().missing["cuda"]
    finally:
        providers.cache_clear()
    assert "\n" not in reason
    assert len(reason) > 20
    assert capfd.readouterr() == ("", "")


def test_precision_that_is_stated_is_the_one_computed_in():
    stated = {(name, asked): entry[0] for name, p in PROVIDERS.items() for asked, entry in p.precisions.items()}
    assert stated["cuda", "fp32"] == "fp32"
    assert PROVIDERS["cuda"].precisions["fp32"][1]["use_tf32"] == "0"
    assert PROVIDERS["cuda"].precisions["tf32"][1]["use_tf32"] == "1"
    # TensorRT multiplies fp32 networks in TF32, whatever it is asked.
    assert stated["tensorrt", "fp32"] == "tf32"
    assert ("cpu", "tf32") not in stated
