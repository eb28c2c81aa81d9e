"""The algebra by hand, and its soundness: every equation that was stated still holds after any cut."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ekgfx.axes import (
    ONE,
    Axis,
    Prod,
    Sum,
    axes,
    count,
    fixed,
    freeze,
    membership,
    positions,
    resolve,
    show,
    split,
    unify,
)
from ekgfx.errors import RuleError


def test_joined_axes_are_one() -> None:
    a, b = Axis(4), Axis(4)
    unify(a, b)
    assert resolve(a) is resolve(b)


def test_frozen_wins_and_keeps_its_reason() -> None:
    a, b = Axis(4), Axis(4, frozen="because")
    unify(a, b)
    assert resolve(a).frozen == "because"
    freeze(a, "another")
    assert resolve(a).frozen == "because"


def test_an_axis_takes_the_form_of_a_product_and_everybody_sees_it() -> None:
    channels, heads, features = Axis(12), Axis(3), Axis(4)
    elsewhere = Sum((channels, Axis(2)))
    unify(channels, Prod((heads, features)))
    assert resolve(channels) == Prod((heads, features))
    assert show(elsewhere) == "(3·4 + 2)"


def test_refining_a_frozen_axis_freezes_its_parts() -> None:
    a, b, c = Axis(6, frozen="input"), Axis(2), Axis(3)
    unify(a, Prod((b, c)))
    assert (b.frozen, c.frozen) == ("input", "input")


def test_sums_align_from_the_left() -> None:
    a, b, c, d = Axis(3), Axis(6), Axis(5), Axis(4)
    unify(Sum((a, b)), Sum((c, d)))
    # boundaries at 3, 5, 9: c = a + 2, b = 2 + d
    assert [x.size for x in axes(c)] == [3, 2] and next(axes(c)) is resolve(a)
    assert list(axes(b)) == [list(axes(c))[1], resolve(d)]


def test_products_align_at_common_factors() -> None:
    a, b, c, d = Axis(6), Axis(4), Axis(3), Axis(8)
    unify(Prod((a, b)), Prod((c, d)))
    assert [x.size for x in axes(a)] == [3, 2] and [x.size for x in axes(d)] == [2, 4]


def test_products_without_common_factor_freeze_with_the_reason() -> None:
    a, b, c, d = Axis(4), Axis(9), Axis(6), Axis(6)
    unify(Prod((a, b)), Prod((c, d)), "reshape in m")
    assert all(x.frozen and "reshape in m" in x.frozen and "do not divide" in x.frozen for x in (a, b, c, d))


def test_a_sum_cuts_a_product_between_and_inside_its_rows() -> None:
    rows, columns, x, y = Axis(4), Axis(5), Axis(7), Axis(13)
    unify(Sum((x, y)), Prod((rows, columns)))  # 7 = one row and two columns of the second
    assert [a.size for a in axes(rows)] == [1, 1, 2] and [a.size for a in axes(columns)] == [2, 3]
    assert x.size == 7 and not any(a.frozen for a in axes(y))


def test_a_channel_shuffle_ties_its_halves() -> None:
    a, b, inner = Axis(4), Axis(4), Axis(4)
    unify(Sum((a, b)), Prod((Axis(2, frozen="groups"), inner)))
    assert resolve(a) is resolve(inner) is resolve(b)


def test_trivial_factors_vanish_and_leading_sums_distribute() -> None:
    a, b, x = Axis(2), Axis(3), Axis(4)
    assert resolve(Prod((ONE, a, Axis(1)))) is a
    assert resolve(Prod((Sum((a, b)), x))) == Sum((Prod((a, x)), Prod((b, x))))
    assert resolve(Prod((x, Sum((a, b))))) == Prod((x, Sum((a, b))))


def test_the_batch_keeps_its_identity_through_fixed_dimensions() -> None:
    batch, constant = Axis(2, frozen="batch", batch=True), Axis(2, frozen="zeros")
    unify(constant, batch)
    assert count(constant, {batch: 7}) == 7 and not fixed(constant)
    windows = Axis(8, frozen="zeros")
    unify(windows, Prod((batch, Axis(4, frozen="windows"))))
    assert count(windows, {batch: 7}) == 28


def test_what_equals_something_fixed_stays_and_is_not_taken_apart() -> None:
    x, rows = Axis(12), Prod((Axis(3, frozen="windows"), Axis(4, frozen="space")))
    unify(x, rows)
    assert resolve(x) is x and x.frozen == "windows"


def test_positions_and_membership_by_hand() -> None:
    a, b, c = Axis(2), Axis(3), Axis(2)
    expr = Sum((Prod((a, b)), c))  # positions a0b0 a0b1 a0b2 a1b0 a1b1 a1b2 c0 c1
    kept = {a: torch.tensor([1]), b: torch.tensor([0, 2])}
    assert positions(expr, kept).tolist() == [3, 5, 6, 7]
    assert count(expr, {a: 1, b: 2}) == 4
    assert membership(expr, b).tolist() == [0, 1, 2, 0, 1, 2, -1, -1]
    assert membership(expr, a).tolist() == [0, 0, 0, 1, 1, 1, -1, -1]


def test_an_axis_that_occurs_twice_is_told_by_its_first_occurrence() -> None:
    a = Axis(2)
    assert membership(Prod((a, a)), a).tolist() == [0, 0, 1, 1]
    assert membership(Prod((a, Axis(2), a)), a).tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("w", [3, 16, 32])
def test_rows_shifted_against_each_other_fall_into_single_positions(w: int) -> None:
    """Relative positions: w rows of 2w − 1, each padded by one, laid out flat, padded, and read in rows of 2w − 1.

    Row i is shifted by i, so that each of its positions is tied to its neighbours: nothing is left to prune.
    """
    row, rows = Axis(2 * w - 1), Axis(w)
    unify(Sum((Prod((rows, Sum((row, Axis(1))))), Axis(w - 1))), Prod((Axis(w + 1), Axis(2 * w - 1))), "reshape")
    assert {axis.size for axis in axes(row)} == {1} and fixed(row)


def test_sizes_must_agree() -> None:
    with pytest.raises(RuleError, match="4 and 5 positions"):
        unify(Axis(4), Axis(5), "add")
    with pytest.raises(ValueError, match="no position 9"):
        split(Sum((Axis(4), Axis(4))), 9)


@st.composite
def equations(draw: st.DrawFn) -> list[tuple[list[int], bool, list[int], bool]]:
    """Several ways to read dimensions of 12 or 24 positions as sums or products of shared axes."""
    forms = {12: [[12], [3, 4], [2, 6], [6, 2], [2, 2, 3]], 24: [[24], [4, 6], [2, 12], [8, 3], [3, 2, 4]]}
    sums = {12: [[5, 7], [4, 4, 4], [1, 11], [6, 6]], 24: [[12, 12], [9, 15], [8, 8, 8], [20, 4]]}
    total = draw(st.sampled_from([12, 24]))
    side = st.one_of(
        st.tuples(st.sampled_from(forms[total]), st.just(False)), st.tuples(st.sampled_from(sums[total]), st.just(True))
    )
    return [(*draw(side), *draw(side)) for _ in range(draw(st.integers(1, 5)))]


@settings(max_examples=300, deadline=None)
@given(equations(), st.randoms(use_true_random=False))
def test_every_equation_holds_after_any_cut(stated: list, rng: object) -> None:
    pool: dict[int, list[Axis]] = {}

    def axis(n: int) -> Axis:
        shared = pool.setdefault(n, [])
        if not shared or rng.random() < 0.4:
            shared.append(Axis(n))
        return rng.choice(shared)

    sides = []
    for left, left_sum, right, right_sum in stated:
        a = (Sum if left_sum else Prod)(tuple(axis(n) for n in left))
        b = (Sum if right_sum else Prod)(tuple(axis(n) for n in right))
        unify(a, b, "test")
        sides.append((a, b))
    free = dict.fromkeys(x for a, b in sides for e in (a, b) for x in axes(e) if not x.frozen)
    kept = {x: torch.tensor(sorted(rng.sample(range(x.size), rng.randint(1, x.size)))) for x in free}
    for a, b in sides:
        assert a.size == b.size == len(positions(a, {}))
        assert positions(a, kept).tolist() == positions(b, kept).tolist()
        assert len(positions(a, kept)) == count(a, {x: len(k) for x, k in kept.items()})
