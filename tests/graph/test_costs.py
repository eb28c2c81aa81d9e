"""MACs that PyTorch's counter does not know, by hand; all others are compared with it in test_families.py."""

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.rules import Call, Effect, rule
from ekgfx.rules.registry import _RULES
from ekgfx.surgery.masked import check_masked


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both, self.head = nn.Linear(3, 4), nn.Linear(3, 5), nn.Bilinear(4, 5, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.both(self.a(x), self.b(x)))


def test_a_bilinear_layer_costs_its_weight() -> None:
    traced = ekgfx.trace(Bilinear(), torch.randn(2, 3))
    assert traced.cost().macs == 3 * 4 + 3 * 5 + 4 * 5 * 6 + 6 * 2
    plan = ekgfx.Plan({"a": (0, 1), "b": (0, 1, 2), "both": (1,)})
    assert traced.cost(plan).macs == 3 * 2 + 3 * 3 + 2 * 3 * 1 + 1 * 2


class Einsum(nn.Module):
    def __init__(self, equation: str, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.equation, self.factors = equation, nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, *self.factors)


@pytest.mark.parametrize(
    ("equation", "shapes", "by_hand"),
    [
        ("nd,de->ne", [(4, 5)], 4 * 5),
        ("nd,de,ef->nf", [(4, 5), (5, 6)], 4 * 5 + 5 * 6),  # from the left; the largest product is 4·5·6
        ("nd,e,de->n", [(5,), (4, 5)], 4 * 5),  # whichever two come first: without a letter to sum, no product
        ("nd->n", [], 0),  # a sum
        ("nd,d->nd", [(4,)], 0),  # pointwise
        ("nd,ef->n", [(5, 6)], 0),  # e and f are summed before
        ("...d,de->...e", [(4, 5)], 4 * 5),
        ("nd,de", [(4, 5)], 4 * 5),
    ],
)
def test_an_einsum_costs_its_products(equation: str, shapes: list[tuple[int, ...]], by_hand: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, x = Einsum(equation, *shapes), torch.randn(3, 4)
    traced = ekgfx.trace(model, x)
    assert traced.cost().macs == by_hand
    with FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() // 2 == 3 * by_hand


@torch.library.custom_op("ekgfx_test::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


@project.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


class Custom(nn.Module):
    """4 → 6, the operator 6 → 5, 5 → 2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight, self.head = nn.Linear(4, 6), nn.Parameter(torch.randn(5, 6)), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.ops.ekgfx_test.project(self.stem(x), self.weight))


def taught(**said: object) -> ekgfx.TracedModel:
    @rule("ekgfx_test.project.default")
    def projected(call: Call) -> Effect:
        x, weight = call["x"], call["weight"]
        call.unify(x[-1], weight[1])
        out = (*x[:-1], weight[0])
        macs = {"macs": [(*out, weight[1])]} if said.pop("counted", False) else {}
        return Effect(out, **macs, **said)

    try:
        return ekgfx.trace(Custom(), torch.randn(3, 4))
    finally:
        del _RULES["ekgfx_test.project.default"]


def test_a_custom_operator_costs_what_its_rule_says() -> None:
    traced = taught(counted=True)
    assert traced.uncounted_ops == {}
    assert traced.cost().macs == 4 * 6 + 6 * 5 + 5 * 2
    assert traced.cost(ekgfx.Plan({"stem": (0, 1), "weight": (3,)})).macs == 4 * 2 + 2 * 1 + 1 * 2
    assert check_masked(traced, ekgfx.Plan({"stem": (0, 1), "weight": (3,)}), (torch.randn(3, 4),)) < 1e-5


@pytest.mark.parametrize("said", [{}, {"sums": [("x", None, -1)]}], ids=["a weight is read", "products are summed"])
def test_a_custom_operator_whose_rule_does_not_say_is_named(said: dict) -> None:
    traced = taught(**said)
    assert traced.uncounted_ops == {"ekgfx_test.project.default": 1}
    assert traced.cost().macs == 4 * 6 + 5 * 2


@pytest.mark.parametrize("said", [{"macs": ()}, {"carries": True}], ids=["none", "pointwise"])
def test_a_rule_may_say_that_nothing_is_multiplied(said: dict) -> None:
    assert taught(**said).uncounted_ops == {}
