"""docs/onnx.md shows what was measured."""

from benchmarks.common import Lines
from benchmarks.parts.coverage_onnx import page
from tests.support import ROOT


def test_the_page_is_made_from_the_raw_results() -> None:
    made = page(list(Lines(ROOT / "benchmarks" / "results" / "onnx.jsonl")))
    assert made == (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
