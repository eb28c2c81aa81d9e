"""What docs/budgets.md says of whole blocks is what the raw results hold."""

from typing import Any

import pytest

from ekgfx.base.files import read_lines
from tests.support import ROOT

LINES = list(read_lines(ROOT / "benchmarks/results/depth.jsonl"))


@pytest.mark.parametrize("network", ["digits", "resnet20_cifar", "vit", "resnet50"])
def test_width_and_depth_are_what_was_measured(network: str) -> None:
    said = " ".join((ROOT / "docs/budgets.md").read_text(encoding="utf-8").replace("**", "").split())
    rows: dict[str, Any] = {line["way"]: line for line in LINES if line["network"] == network}
    width, depth = rows["width, by reward"], rows["width and depth"]
    ranked = f"{rows['width, by loss per cost']['repaired']:.2%}" if network != "resnet50" else "the same rule"
    assert f"| {width['unpruned']:.2%} | {width['repaired']:.2%} | {ranked} | {depth['repaired']:.2%}, " in said
    assert len(depth["dropped"]) == (1 if network in ("digits", "resnet50") else 0)
    points, reach = depth["against_width"]
    assert f"{abs(points):.2f} ± {reach:.2f} points" in said
    assert f"| {rows['random channels']['repaired']:.2%}" in said
    if depth["dropped"]:
        assert f"dropped {rows['random channels, the same blocks']['repaired']:.2%}" in said
    searched = [line for way, line in rows.items() if not way.startswith("random")]
    assert len(searched) == (2 if network == "resnet50" else 3) and all(line["kept"] <= 0.6 for line in searched)
    assert all(line["macs"] <= 0.6 for line in rows.values() if not line["target"])
    assert all(f"repaired on {line['images']} images" in said for line in rows.values())
