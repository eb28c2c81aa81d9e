"""A network of another library is cut as any other is, and remains that library's, where it is installed."""

import importlib.util

import pytest

from benchmarks.common import apart
from benchmarks.parts.coverage_libraries import measure

LIGHT = {
    "open_clip:ViT": "open_clip",
    "torchvision:ConvNeXt": "torchvision",
    "smp:unet-labels": "segmentation_models_pytorch",
    "monai:AttentionUnet": "monai",
    "ultralytics:yolov8n-cls": "ultralytics",
    "torchaudio:ConvTasNet": "torchaudio",
}


@pytest.mark.parametrize("name", LIGHT)
def test_a_network_of_a_library_is_cut_exactly(name: str) -> None:
    package = LIGHT[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    row = apart(measure, name, start="fork")
    assert row["status"] == "ok" and row["class"] and not row["graphs"] and row["share"] > 0.95, row
    assert not row["api"] and not row["onnx"] and not row["training"], row
