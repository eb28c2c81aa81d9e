"""Widths, by hand and against the authors' recorded search for the last width."""

import pytest

from ekgfx.search.details import AUTHORS, PAPER
from ekgfx.search.widths import WidthRule, last_width
from tests.support.reference import Reference, resnet56_cost


@pytest.mark.parametrize(
    ("size", "width", "kept"),
    [
        (16, 1.0, 16),
        (16, 0.8, 13),
        (32, 0.8, 26),
        (64, 0.8, 52),
        (16, 0.0, 1),
        (16, 0.01, 1),
        (5, 0.6, 3),
        (10, 0.7, 7),
    ],
)
def test_keeps_the_channels_whose_rank_is_below_c_times_w(size: int, width: float, kept: int) -> None:
    assert WidthRule.of(size).kept(width) == kept


def test_one_layer_loses_r_and_a_shared_stream_less() -> None:
    assert WidthRule.of(16, producers=1).next_width(1.0, 0.2) == 0.8
    assert WidthRule.of(64, producers=10).next_width(1.0, 0.2) == 0.98
    assert WidthRule.of(16, producers=10).next_width(1.0, 0.2) == 1 - 1 / 16  # never less than one channel
    assert WidthRule.of(16).next_width(0.1, 0.2) == 0.0


def test_repeated_steps_do_not_drift() -> None:
    rule, width, kept = WidthRule.of(16), 1.0, []
    while width > 0:
        width = rule.next_width(width, 0.2)
        kept.append(rule.kept(width))
    assert kept == [13, 10, 7, 4, 1]


def test_aligned_widths_are_multiples_or_whole() -> None:
    rule = WidthRule.of(30, align=8)
    assert [rule.kept(w) for w in (1.0, 0.9, 0.8, 0.5, 0.1, 0.0)] == [30, 30, 24, 16, 8, 8]
    assert rule.kept(rule.next_width(1.0, 0.01)) == 24  # a step is at least one multiple
    assert WidthRule.of(6, align=8).kept(0.5) == 3  # narrower than the alignment: not aligned
    assert WidthRule.of(64, align=8, min_width=0.3).minimum == 24


def test_last_width_is_the_smallest_reduction_within_the_budget() -> None:
    for limit in range(3, 10):
        assert last_width(range(3, 10), lambda count, limit=limit: count <= limit) == limit


def test_resnet_cost_by_hand() -> None:
    assert resnet56_cost([16] * 10 + [32] * 10 + [64] * 10) == 126_837_376


def test_last_width_against_the_recorded_cases(reference: Reference) -> None:
    """The program's search for the last width, exactly; and ours, which is right where its rounding is not."""
    golden = reference.json("fine_search_golden.json")
    differing = 0
    for case in golden["cases"]:
        budget = case["target_rate"] * golden["ori"][1]
        for gate, width, kept, flops in case["results_gate_newwidth_kept_flops"]:
            rule = WidthRule.of(reference.json("gates.json")[gate]["channels"], 10 if gate % 10 == 0 else 1)

            def cost(count: int, gate: int = gate, case: dict = case) -> int:
                return resnet56_cost([*case["kept"][:gate], count, *case["kept"][gate + 1 :]])

            def met(count: int, cost=cost, budget: float = budget) -> bool:
                return cost(count) <= budget

            start = rule.next_width(case["widths"][gate], 0.2)
            if not cost(rule.kept(start)) < budget:
                continue
            theirs = AUTHORS.last_width(rule, start, case["kept"][gate], met)
            assert theirs == pytest.approx(width, abs=1e-9)
            assert rule.kept(theirs) == kept
            assert cost(kept) == flops
            ours = rule.kept(PAPER.last_width(rule, start, case["kept"][gate], met))
            assert met(ours)
            assert ours + 1 == case["kept"][gate] or not met(ours + 1)
            differing += ours != kept
    assert differing  # the rounding does add or lose channels somewhere
