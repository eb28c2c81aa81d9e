"""Teaching an operator: a real custom operator, first unknown, then known."""

import inspect
import re

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import RuleError
from ekgfx.rules import Call, Effect, Rule, lookup, rule
from ekgfx.rules.registry import _RULES
from ekgfx.surgery.check import check_pruned, perturb
from ekgfx.surgery.masked import check_masked


@torch.library.custom_op("ekgfx_test::swap_halves", mutates_args=())
def swap_halves(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2, 1)[::-1], 1)


@swap_halves.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.ops.ekgfx_test.swap_halves(self.a(x))).mean((2, 3)))


@pytest.fixture
def taught() -> None:
    @rule("ekgfx_test.swap_halves.default")
    def swapped(call: Call) -> Effect:
        """Channels are [2]·half; the halves change places, so a cut takes the same channels of both."""
        from ekgfx.axes import Prod

        x = call["x"]
        half = call.fresh(x[1].size // 2)
        call.unify(x[1], Prod((call.constant(2, "halves"), half)))
        return Effect(x)

    yield
    del _RULES["ekgfx_test.swap_halves.default"]


def test_an_unknown_operator_freezes_what_touches_it_and_is_named() -> None:
    traced = ekgfx.trace(Net(), torch.zeros(2, 3, 4, 4))
    assert traced.unknown_ops == {"ekgfx_test.swap_halves.default": 1}
    assert list(traced.groups) == ["b"]
    reasons = {f.reason for f in traced.groups.frozen if f.parameter == "a.weight"}
    assert "ekgfx_test.swap_halves.default: no rule for this operator" in reasons


def test_what_an_unknown_operator_costs_is_what_its_rule_brings(taught: None) -> None:
    """Its input is `a`, 3·8 + 8 parameters; `b` and `head` are cut by their own group either way."""
    function = _RULES.pop("ekgfx_test.swap_halves.default")
    unknown = ekgfx.trace(Net(), torch.zeros(2, 3, 4, 4))
    _RULES["ekgfx_test.swap_halves.default"] = function
    known = ekgfx.trace(Net(), torch.zeros(2, 3, 4, 4))
    assert unknown.unknown_costs == {"ekgfx_test.swap_halves.default": 3 * 8 + 8}
    assert known.unknown_costs == {}
    assert known.prunable_parameters() - unknown.prunable_parameters() == 3 * 8 + 8
    assert unknown.groups.prunable_share == unknown.prunable_parameters() / unknown.cost().params


class Twice(Net):
    """The operator on what is frozen anyway: the input, and features that a softmax holds."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(torch.cat([torch.ops.ekgfx_test.swap_halves(torch.cat([x, x], 1))[:, :3]], 1)).softmax(1)
        return self.head(self.b(torch.ops.ekgfx_test.swap_halves(x)).mean((2, 3)))


def test_what_others_hold_too_is_not_charged_to_an_unknown_operator() -> None:
    traced = ekgfx.trace(Twice(), torch.zeros(2, 3, 4, 4))
    assert traced.unknown_ops == {"ekgfx_test.swap_halves.default": 2}
    assert traced.unknown_costs == {"ekgfx_test.swap_halves.default": 0}


def test_a_taught_operator_is_pruned_exactly(taught: None) -> None:
    model = Net().double().eval()
    perturb(model)
    traced = ekgfx.trace(model, torch.zeros(2, 3, 4, 4, dtype=torch.float64))
    assert traced.unknown_ops == {} and traced.groups["a"].size == 4
    plan = ekgfx.Plan({"a": (0, 3), "b": (1, 2)})
    x = torch.randn(3, 3, 4, 4, dtype=torch.float64)
    assert check_masked(traced, plan, (x,)) < 1e-12
    assert check_pruned(traced, plan, ekgfx.prune(model, plan, traced), (x,)) < 1e-12


def traced_with(wrong: Rule) -> ekgfx.TracedModel:
    """The network above, traced with a rule that stays for this one call."""
    rule("ekgfx_test.swap_halves.default")(wrong)
    try:
        return ekgfx.trace(Net(), torch.zeros(2, 3, 4, 4))
    finally:
        del _RULES["ekgfx_test.swap_halves.default"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            lambda call: Effect((*call["x"][:1], *call["x"][2:])),
            r"it says an output of shape (2, 4, 4), the operator's has (2, 8, 4, 4)",
        ),
        (lambda call: call.unify(call["x"][1], call["x"][2]), "cannot unify dimensions of 8 and 4 positions"),
        (lambda call: Effect([call["x"]] * 2), "it says 2 outputs, the operator has 1"),
    ],
    ids=["shape", "equation", "outputs"],
)
def test_a_rule_that_does_not_hold_freezes_what_it_touches(
    wrong: Rule, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    traced = traced_with(wrong)
    assert traced.unknown_ops == {"ekgfx_test.swap_halves.default": 1}
    assert said in traced.failed_rules["ekgfx_test.swap_halves.default"]
    assert "ekgfx_test.swap_halves.default: the rule does not hold here" in caplog.text
    assert list(traced.groups) == ["b"]
    assert any(said in f.reason for f in traced.groups.frozen if f.parameter == "a.weight")


def test_a_slip_in_a_rule_of_ours_freezes_and_is_said_by_name(caplog: pytest.LogCaptureFixture) -> None:
    def slip(call: Call) -> Effect:
        return Effect(call["input"])

    slip.__module__ = "ekgfx.rules.shape"
    traced = traced_with(slip)
    said = traced.failed_rules["ekgfx_test.swap_halves.default"]
    assert "test_rule.py:" in said and "KeyError" in said and "has no argument 'input', it has x" in said
    assert list(traced.groups) == ["b"]
    assert caplog.text.count(said) == 1


def test_a_slip_in_a_users_rule_reaches_its_author_with_the_line() -> None:
    def slip(call: Call) -> Effect:
        raise ValueError("no such thing")

    line = slip.__code__.co_firstlineno + 1
    said = rf"the rule of ekgfx_test.swap_halves.default failed at .*test_rule.py:{line}: ValueError: no such thing"
    with pytest.raises(RuleError, match=said) as caught:
        traced_with(slip)
    assert isinstance(caught.value.__cause__, ValueError)


def test_rules_ask_for_arguments_that_their_operators_have() -> None:
    """Of branches that an operator never enters aside: those two share a function with operators that have them."""
    shared = {"dim", "sizes"}, {"other"}
    for name, function in _RULES.items():
        namespace, _, rest = name.partition(".")
        if namespace == "aten":
            packet, _, overload = rest.partition(".")
            schema = getattr(getattr(torch.ops.aten, packet), overload)._schema
            asked = set(re.findall(r'call\["(\w+)"\]', inspect.getsource(function)))
            missing = asked - {a.name for a in schema.arguments}
            assert not missing or missing in shared, f"{name} has no argument {missing}"


def test_a_second_rule_for_an_operator_is_refused(taught: None) -> None:
    with pytest.raises(ValueError, match=r"swap_halves.default already has the rule swapped"):
        rule("ekgfx_test.swap_halves.default")(lambda call: Effect(call["x"]))


def test_pointwise_operators_are_those_that_pytorch_tags() -> None:
    assert lookup(torch.ops.aten.erf.default) is _RULES["pointwise"]
    assert lookup(torch.ops.aten.median.default) is None
