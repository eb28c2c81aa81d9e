"""What docs/performance.md says of a step of fine-tuning is what the raw results hold."""

import json

import pytest

from tests.support import ROOT

FOUND = json.loads((ROOT / "benchmarks/results/training_speed.json").read_text())
PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row", FOUND["steps"], ids=lambda row: f"{row['network']}, {row['way']}")
def test_a_row_is_what_was_measured(row: dict) -> None:
    first = next(r for r in FOUND["steps"] if "any widths" in r["network"] and r["way"] == "channels last")
    cells = [row["network"], row["way"], f"{row['seconds']:.2f}", f"{first['seconds'] / row['seconds']:.2f}"]
    assert f"| {' | '.join(cells)} |" in PAGE


@pytest.mark.parametrize("kind", ["convolutions", "BatchNorm", "ReLU"])
def test_a_share_is_what_was_measured(kind: str) -> None:
    said = " ".join(PAGE.split())
    assert f"{FOUND['shares'][kind]:.0%} {kind}" in said or f"{FOUND['shares'][kind]:.0%} of it are {kind}" in said


@pytest.mark.parametrize("name", FOUND["formats"])
def test_a_network_of_timm_is_as_fast_as_was_measured(name: str) -> None:
    own, last, half = FOUND["formats"][name].values()
    assert f"| {name} | {own:.3f} | {own / last:.2f} | {own / half:.2f} |" in PAGE
