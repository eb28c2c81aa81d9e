"""What docs/repair.md says was measured is what the raw results hold."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINES = [json.loads(line) for line in (ROOT / "benchmarks/results/repair.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("line", LINES, ids=lambda line: f"{line['network']}, {line['plan']}")
def test_a_row_is_what_was_measured(line: dict) -> None:
    digits = 1 if line["network"] == "resnet50" else 2  # of 250 images, and of 10,000
    before = next(other["before"] for other in LINES if other["network"] == line["network"] and "before" in other)
    shown = [f"{score['accuracy']:.{digits}%}" for score in (before, line["reestimated"], line["repaired"])]
    row = f"| {' | '.join(shown)} | {line['cpu_seconds']:.0f} |"
    assert row in (ROOT / "docs/repair.md").read_text(encoding="utf-8").replace("**", "")


def test_the_other_importance_is_what_was_measured() -> None:
    line = json.loads((ROOT / "benchmarks/results/repair_per_sample.jsonl").read_text())
    page = (ROOT / "docs/repair.md").read_text(encoding="utf-8").replace("**", "")
    assert f"{line['reestimated']['accuracy']:.1%} right after the cut" in page
    assert f"{line['repaired']['accuracy']:.1%} repaired, in {line['cpu_seconds']:.0f} CPU seconds" in page
