"""What docs/peers.md says of the peers is what the raw results hold."""

import pytest
import torch
from torch import nn

import ekgfx
from benchmarks.parts.peers_reading import kept_by
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


def test_the_channels_that_are_left_are_read_off_a_network() -> None:
    """By statistics where parameters are alike, and not at all where those are, too."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3)).eval()
    traced = ekgfx.trace(model, torch.zeros(2, 3, 8, 8))
    plan = ekgfx.Plan({"0": (1, 2, 5)}, traced.groups.digest)
    with pytest.raises(ValueError, match="0: which channels were kept cannot be told"):
        kept_by(traced, ekgfx.prune(model, plan, traced))
    model[1].running_mean.copy_(torch.arange(6.0))
    assert kept_by(traced, ekgfx.prune(model, plan, traced)) == plan
