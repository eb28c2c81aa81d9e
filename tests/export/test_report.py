"""Exporting a pair of networks as the command line does."""

import json

import pytest
import torch
from ekgfx.export import export_report

from ekgfx.errors import ExportError
from tests.export.nets import Classifier


def test_files_parity_and_latency(tmp_path):
    dense, pruned, images = Classifier(16), Classifier(4), torch.randn(4, 3, 8, 8)
    report = export_report(
        dense, pruned, images, tmp_path, providers=("cpu",), batches=(2,), runs=10, seconds=1, threads=1, warmup=1
    )
    assert report.files == {"dense": "dense.onnx", "pruned": "model.onnx"}
    assert {file.name for file in tmp_path.iterdir()} == {"dense.onnx", "model.onnx"}
    assert set(report.parity) == {"dense", "pruned"}
    assert [s.network for s in report.latency.speedups] == ["pruned"]
    written = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert written["parity"]["pruned"]["relative"] == report.parity["pruned"].relative
    assert written["latency"]["timings"][0]["network"] == "dense"


def test_without_latency_there_is_one_file(tmp_path):
    report = export_report(Classifier(16), Classifier(4), torch.randn(2, 3, 8, 8), tmp_path, latency=False)
    assert report.files == {"pruned": "model.onnx"}
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert report.latency is None
    assert report.to_json()["latency"] is None


def test_unreachable_provider_is_refused_before_the_work(tmp_path):
    with pytest.raises(ExportError, match="unknown provider 'npu'"):
        export_report(None, Classifier(4), torch.randn(2, 3, 8, 8), tmp_path, providers=("npu",))
    assert list(tmp_path.iterdir()) == []
