"""What docs/landscape.md says of its two studies is what the raw results hold."""

from typing import Any

import numpy as np
import pytest

from benchmarks.landscape_study import POTENTIALS, PREDICTORS, summary
from ekgfx.base.files import read_lines
from tests.support import ROOT

TITLES = dict(
    zip(
        PREDICTORS,
        ("validation loss", "EKG's reward (negative)", "condition number", "loss after the repair"),
        strict=True,
    )
)


@pytest.mark.parametrize(("name", "count"), [("digits", 36), ("resnet20", 30)])
def test_a_study_is_what_was_measured(name: str, count: int) -> None:
    lines = list(read_lines(ROOT / f"benchmarks/results/landscape_{name}.jsonl"))
    said = " ".join((ROOT / "docs/landscape.md").read_text(encoding="utf-8").replace("**", "").split())
    found: dict[str, Any] = summary(lines)
    assert len(lines) == count and f"{count} sub-networks of" in said
    for predictor, title in TITLES.items():
        cells = [interval(found[after][predictor]) for after in POTENTIALS]
        assert f"| {title} | {' | '.join(cells)} |" in said
    assert interval(found["potential"]["condition - validation"]) in said
    before, after = (np.array([line[key] for line in lines]) for key in POTENTIALS)
    assert f"{(after < before).sum()} of the {count}" in said
    assert f"{after.mean():.3f} instead of {before.mean():.3f} on the average" in said


def interval(values: list[float]) -> str:
    return "{:.2f} ({:.2f} … {:.2f})".format(*values).replace("-", "−")
