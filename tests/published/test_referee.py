"""What docs/peers.md says of the peers is what the raw results hold."""

import pytest

from benchmarks.parts.peers_referee import table
from ekgfx.base.files import read_lines
from tests.support import ROOT

LINES = list(read_lines(ROOT / "benchmarks/results/referee.jsonl"))


@pytest.mark.parametrize("row", table(LINES).strip().splitlines(), ids=lambda row: row.split(" | ")[0].strip("| "))
def test_a_row_is_what_was_measured(row: str) -> None:
    assert row in (ROOT / "docs/peers.md").read_text(encoding="utf-8").replace("**", "").splitlines()


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.get("method"))
def test_a_network_cut_by_the_plan_read_off_a_peers_is_the_peers(line: dict) -> None:
    """But OSSCAR's, which changes weights, too."""
    assert "failed" not in line
    assert line.get("differs_by", 0.0) < 1e-6 or line["method"].endswith("OSSCAR")
