"""What docs/budgets.md says that a search to several budgets costs is what the raw results hold."""

import json
import statistics

from tests.support import ROOT

LINES = [json.loads(line) for line in (ROOT / "benchmarks/results/search_budgets.jsonl").read_text().splitlines()]
PAGE = " ".join((ROOT / "docs/budgets.md").read_text(encoding="utf-8").split())


def test_several_budgets_cost_what_is_said() -> None:
    every, tightest = (
        statistics.median(line["cpu_seconds"] for line in LINES if line["way"] == way) for way in ("all", "tightest")
    )
    said = f"take **{every / tightest:.2f} times** as long as a search to the tightest alone, before the repairs: "
    assert f"{said}{every:.1f} against {tightest:.1f} CPU seconds" in PAGE
    (same,) = [line["same_as_alone"] for line in LINES if "same_as_alone" in line]
    assert len(same) == 4 and all(same)
