"""What docs/budgets.md says of whole blocks is what the raw results hold."""

from pathlib import Path

from ekgfx.base.files import read_lines

ROOT = Path(__file__).resolve().parents[1]


def test_width_and_depth_are_what_was_measured() -> None:
    width, ranked, depth = read_lines(ROOT / "benchmarks/results/depth.jsonl")
    said = " ".join((ROOT / "docs/budgets.md").read_text(encoding="utf-8").split())
    assert width["repaired"] == ranked["repaired"] and len(depth["dropped"]) == 1
    assert f"at {depth['macs']:.1%} of its MACs" in said
    assert f"on {depth['images']} images and judged on {depth['tested']} others" in said
    assert f"width alone has {width['repaired']:.2%}" in said
    points, reach = depth["against_width"]
    assert f"dropped {depth['repaired']:.2%}: {points:.2f} ± {reach:.2f} points more" in said
    assert f"unpruned {depth['unpruned']:.2%}" in said
