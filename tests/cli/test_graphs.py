"""A module whose Python cannot express a cut, on the command line: named, recorded, or left as wide as it was."""

import json
from pathlib import Path

import ekgfx as library

NETWORK = """
import torch
from torch import nn

class Hard(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 12, 3, 2, 1), nn.Conv2d(12, 8, 3, 2, 1), nn.Linear(8 * 2 * 2, 10)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu().view(-1, 8 * 2 * 2))

def build():
    return Hard(), (torch.zeros(2, 1, 8, 8),)
"""
SETTINGS = ("--data", "digits", "--flops", "0.7", "--epochs", "0", "--search", "uniform")


def test_a_run_names_and_records_the_forwards_that_it_replaced(ekgfx) -> None:
    Path("hard.py").write_text(NETWORK)
    done = ekgfx("prune", "hard.py:build", *SETTINGS, "-o", "run")
    assert done.code == 0, done.err
    assert "another forward for the model (Hard)" in done.out + done.err
    (told,) = json.loads(Path("run/run.json").read_text())["replaced"]
    assert (told["module"], told["kind"], told["sizes"]) == ("", "Hard", "any") and "self.head" in told["source"]
    assert ekgfx("report", "run").code == 0
    assert "another forward than their class" in Path("run/report.html").read_text()
    assert library.replaced(library.load(Path("run")))


def test_where_no_forward_may_be_replaced_the_groups_in_question_stay_whole(ekgfx) -> None:
    Path("hard.py").write_text(NETWORK)
    done = ekgfx("prune", "hard.py:build", *SETTINGS, "--graphs", "forbid", "-o", "run")
    assert done.code == 0, done.err
    assert "keep all channels, since a cut needs another forward: b" in done.out + done.err
    assert len(json.loads(Path("run/plan.json").read_text())["kept"]["a"]) < 12
    assert "replaced" not in json.loads(Path("run/run.json").read_text())
    assert not library.replaced(library.load(Path("run")))
