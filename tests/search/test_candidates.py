"""The candidate filter, and what the user may say to leave alone."""

import math

import pytest
import torch

import ekgfx
from ekgfx.errors import PlanError
from ekgfx.search.candidates import important_first
from ekgfx.search.ignore import ignored_groups
from ekgfx.search.otsu import trimmed_otsu
from tests.support.models import Residual, example
from tests.support.reference import Reference


def test_threshold_lies_half_way_between_two_clusters() -> None:
    # 10 values: 2 are trimmed at either end; 1 2 3 | 10 11 12 remain, the cut is between 3 and 10.
    assert trimmed_otsu([-5, 0, 3, 1, 2, 11, 10, 12, 99, 1000]) == 6.5


def test_few_values_have_no_threshold() -> None:
    assert trimmed_otsu([1.0, 2.0, 3.0, 4.0]) == math.inf  # 2 are left after trimming


def test_the_high_class_holds_two_values() -> None:
    """1 2 3 100 remain. 100 alone would be the best high class; the authors' program takes two or more: 1 2 | 3 100."""
    assert trimmed_otsu([-9, -9, 1, 2, 3, 100, 999, 999]) == 2.5


def test_equal_values_pass() -> None:
    assert trimmed_otsu([0.0] * 20) == 0.0


def test_recorded_thresholds_and_choices(reference: Reference) -> None:
    for step in reference.lines("search_steps_0-3.jsonl"):
        scores = step["mask_marking_scores"]
        threshold = trimmed_otsu(scores)
        assert threshold == pytest.approx(step["otsu_threshold"], rel=1e-12)
        assert [int(score <= threshold) for score in scores] == step["do_check"]


def test_ties_keep_the_lower_channel() -> None:
    assert important_first([0, 1, 2, 4], torch.tensor([0.0, 2.0, 0.0, 9.0, 2.0])) == [1, 4, 0, 2]


@pytest.fixture(scope="module")
def groups() -> ekgfx.graph.groups.Groups:  # type: ignore[name-defined]
    return ekgfx.trace(Residual().double(), example(Residual)).groups


@pytest.mark.parametrize(
    ("patterns", "ignored"),
    [
        ([], set()),
        (["a"], {"stem", "a"}),  # the module's weight is in both groups
        (["a.bias"], {"a"}),
        (["he*"], {"stem"}),
        (["s?em", "*.bias"], {"stem", "a"}),
    ],
)
def test_patterns_name_groups_parameters_or_modules(groups, patterns: list[str], ignored: set[str]) -> None:
    assert ignored_groups(groups, patterns) == ignored


def test_a_pattern_that_matches_nothing_is_an_error(groups) -> None:
    with pytest.raises(PlanError, match=r"'stam' matches no .*; did you mean 'stem'"):
        ignored_groups(groups, ["stam"])
    with pytest.raises(PlanError, match="ekgfx groups"):
        ignored_groups(groups, ["zzzzzzzzzz"])
