"""Values are what their annotations say, or one line says what they are not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from ekgfx.base.schema import read, show
from ekgfx.errors import RunError


@dataclass(frozen=True)
class Inner:
    share: float
    kind: Literal["a", "b", 1] = "a"


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    many: tuple[int, ...] = ()
    table: Mapping[str, Sequence[Inner]] = field(default_factory=dict)
    free: Any = None
    maybe: int | None = None


def test_what_fits_is_taken_with_defaults_filled_in():
    value = {
        "name": "x",
        "inner": {"share": 1},
        "many": [1, 2],
        "table": {"k": [{"share": 0.5, "kind": 1}]},
        "free": [{}],
    }
    made = read(Outer, value, "file", RunError)
    assert made == Outer("x", Inner(1.0), (1, 2), {"k": (Inner(0.5, 1),)}, [{}])
    assert type(made.inner.share) is float
    assert read(int | None, None, "file", RunError) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, "unknown key nmae in file; did you mean name"),
        ({"inner": {"share": 1, "kin": "a"}}, "unknown key inner.kin in file; did you mean kind"),
        ({"inner": {}}, "file has no inner.share"),
        ({"inner": 3}, "inner of file must be keys with values, got 3"),
        ({"inner": {"share": "1"}}, "inner.share in file must be a number; got '1'"),
        ({"inner": {"share": True}}, "inner.share in file must be a number; got True"),
        ({"inner": {"share": float("nan")}}, "inner.share in file must be a finite number; got nan"),
        ({"inner": {"share": 10**400}}, "inner.share in file must be a number of 64 bits; got 1000"),
        ({"inner": {"share": 1, "kind": "c"}}, "inner.kind in file must be one of a, b, 1; got 'c'"),
        ({"inner": {"share": 1, "kind": True}}, "inner.kind in file must be one of a, b, 1; got True"),
        ({"inner": {"share": 1, "kind": []}}, "inner.kind in file must be one of"),
        ({"many": [1.5]}, "many in file must be a whole number; got 1.5"),
        ({"many": [2**63]}, "many in file must be a number of 64 bits"),
        ({"many": "12"}, "many in file must be a list; got '12'"),
        ({"table": {1: []}}, "table in file must be text; got 1"),
        ({"table": {"k": [{"share": None}]}}, "table.k.share in file must be a number; got None"),
        ({"maybe": "x"}, "maybe in file must be a whole number; got 'x'"),
        ({"name": None}, "name in file must be text; got None"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(RunError) as caught:
        read(Outer, {"name": "x", "inner": {"share": 1}, **change}, "file", RunError)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_large_value_is_not_repeated_whole():
    assert len(show("x" * 10**6)) <= 90
    assert len(show([["x" * 50] * 50] * 50)) <= 90
