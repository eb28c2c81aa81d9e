"""What docs/latency.md and README say of INT8 is what the raw results hold."""

import json

import pytest

from tests.support import ROOT

FOUND = json.loads((ROOT / "benchmarks/results/int8.json").read_text())
PAGE = (ROOT / "docs/latency.md").read_text(encoding="utf-8").replace("**", "")


@pytest.mark.parametrize("name", FOUND["scores"])
def test_a_row_is_what_was_measured(name: str) -> None:
    cells = [name, f"{FOUND['scores'][name]:.1%}", f"{FOUND['bytes'][name] / 1e6:.1f} MB"]
    for measured in FOUND["latency"].values():
        timing = next(t for t in measured["timings"] if t["network"] == name)
        cells += [f"{timing['median_ms']:.1f}", f"{timing['p95_ms']:.1f}"]
        ratios = [s["ratio"] for s in measured["speedups"] if s["network"] == name]
        cells += [f"{r['value']:.2f}× ({r['low']:.2f}–{r['high']:.2f})" for r in ratios] or [""]
    assert f"| {' | '.join(cells)} |" in PAGE


def test_readme_has_the_same_speed_ups() -> None:
    said = (ROOT / "README.md").read_text(encoding="utf-8").replace("**", "")
    for name in ("dense int8", "pruned", "pruned int8"):
        ratios = [
            next(s["ratio"]["value"] for s in measured["speedups"] if s["network"] == name)
            for measured in FOUND["latency"].values()
        ]
        assert f"{FOUND['scores'][name]:.1%} at {ratios[0]:.2f}× and {ratios[1]:.2f}×" in said


def test_the_sweep_is_what_was_measured() -> None:
    rows = [json.loads(line) for line in (ROOT / "benchmarks/results/int8_sweep.jsonl").read_text().splitlines()]
    ok = [row for row in rows if row["status"] == "ok"]
    size = sorted(row["bytes"][1] / row["bytes"][0] for row in ok)[len(ok) // 2]
    near, same = (sum(row["agreement"] >= least for row in ok) for least in (0.9, 1.0))
    assert f"{len(ok)} of {len(rows)} quantize and run; the file has {size:.0%} of the bytes in the median" in PAGE
    assert f"{near} give at least 90% of the answers of fp32, {same} all of them" in PAGE
