"""Groups derived by hand, and exactness of every cut of the small networks."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.errors import PlanError, PruneError
from ekgfx.surgery.check import check_pruned, differences, perturb, relative_error
from ekgfx.surgery.masked import check_masked
from tests.support.models import HAND_DERIVED, Concat, GroupNormed, Residual, Tied, TwoInputs, example
from tests.support.plans import random_plan


@pytest.fixture(params=HAND_DERIVED, ids=lambda cls: cls.__name__, scope="module")
def case(request: pytest.FixtureRequest) -> tuple[type[nn.Module], nn.Module, ekgfx.TracedModel]:
    torch.manual_seed(0)
    model = request.param().double().eval()
    perturb(model)
    return request.param, model, ekgfx.trace(model, example(request.param))


def test_groups_are_those_derived_by_hand(case: tuple) -> None:
    cls, _, traced = case
    found = {g.name: (g.size, {f"{p.parameter}:{p.dim}" for p in g.places}) for g in traced.groups.values()}
    assert found == {name: (size, set(places.split())) for name, (size, places) in cls.expected.items()}
    assert not traced.unknown_ops


@pytest.mark.parametrize("seed", range(3))
def test_every_cut_is_exact(case: tuple, seed: int) -> None:
    cls, model, traced = case
    plan = random_plan(traced, seed)
    inputs = example(cls, batch=3, seed=seed)
    assert check_masked(traced, plan, inputs) < 1e-12
    pruned = ekgfx.prune(model, plan, traced)
    assert type(pruned) is cls
    assert check_pruned(traced, plan, pruned, inputs) < 1e-12
    again = ekgfx.trace(pruned, example(cls))
    counts = {axis: len(index) for axis, index in traced.groups.kept(plan).items()}
    assert not differences(traced, counts, again)
    assert again.cost() == traced.cost(plan)


def test_a_pruned_model_trains_copies_and_reloads(case: tuple) -> None:
    cls, model, traced = case
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pruned = ekgfx.prune(model, random_plan(traced, 1), traced).train()
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1)
    output = pruned(*example(cls, batch=4))
    (output["logits"] if isinstance(output, dict) else output).square().mean().backward()
    assert all(p.grad is not None for p in pruned.parameters())
    optimizer.step()
    twin = copy.deepcopy(pruned)
    twin.load_state_dict(pruned.state_dict())
    inputs = example(cls, seed=5)
    first, second = pruned.eval()(*inputs), twin.eval()(*inputs)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items()), "pruning changed the original"


def test_macs_and_parameters_of_a_conv_by_hand() -> None:
    traced = ekgfx.trace(Concat(), torch.zeros(1, 3, 8, 8))
    # a: 64·3·4, b: 64·3·6, c: 36·9·10·5, head: 5·2
    assert traced.cost().macs == 64 * 3 * 4 + 64 * 3 * 6 + 36 * 9 * 10 * 5 + 10
    assert traced.cost().params == (12 + 4) + (18 + 6) + (450 + 5) + (10 + 2)
    cut = traced.cost(ekgfx.Plan({"a": (0,), "c": (1, 2)}))
    assert cut.macs == 64 * 3 * 1 + 64 * 3 * 6 + 36 * 9 * 7 * 2 + 4
    assert traced.groups["b"].macs == 64 * 3 * 6 + 36 * 9 * 10 * 5


def test_producers_and_gates_of_a_residual_stream() -> None:
    traced = ekgfx.trace(Residual().eval(), torch.zeros(1, 3, 8, 8))
    stream, inner = traced.groups["stem"], traced.groups["a"]
    assert stream.producers == ("stem.weight", "b.weight")
    # the stem is read behind its relu, the second conv behind addition, norm and relu; the inner conv behind its relu
    assert [gate.node for gate in stream.gates] == ["relu", "relu_2"]
    assert [gate.node for gate in inner.gates] == ["relu_1"]


def test_tied_weights_stay_tied() -> None:
    model = Tied().eval()
    pruned = ekgfx.prune(model, ekgfx.Plan({"table": (0, 3, 7)}), example_inputs=example(Tied))
    assert pruned.out.weight is pruned.table.weight
    assert pruned.table.weight.shape == (11, 3)


def test_group_norm_keeps_equal_members() -> None:
    pruned = ekgfx.prune(
        GroupNormed().eval(), ekgfx.Plan({"a#0": (1, 2), "a#1": (0, 1)}), example_inputs=torch.zeros(2, 3, 8, 8)
    )
    assert (pruned.norm.num_groups, pruned.norm.num_channels) == (2, 4)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"stemm": (0,)}, "did you mean 'stem'"),
        ({"stem": ()}, "keeps no channel of 'stem'"),
        ({"stem": (0, 8)}, "numbers below 8"),
        ({"stem": (2, 1)}, "not ascending"),
    ],
)
def test_plans_that_do_not_fit_are_refused(kept: dict, message: str) -> None:
    traced = ekgfx.trace(Residual(), torch.zeros(1, 3, 8, 8))
    with pytest.raises(PlanError, match=message):
        traced.subnetwork(ekgfx.Plan(kept))


def test_a_plan_of_another_model_is_refused() -> None:
    one, other = (
        ekgfx.trace(Residual(), torch.zeros(1, 3, 8, 8)),
        ekgfx.trace(TwoInputs(), (torch.zeros(2, 4), torch.zeros(2, 6))),
    )
    with pytest.raises(PlanError, match="another model"):
        other.subnetwork(ekgfx.Plan({}, structure=one.groups.digest))


def test_an_input_may_be_called_as_a_builtin_is() -> None:
    """nn.Sequential's forward takes `input`, and torch.fx renames such a name when it copies a graph."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double().eval()
    traced = ekgfx.trace(model, torch.zeros(2, 4, dtype=torch.float64))
    (group,) = traced.groups
    plan, x = ekgfx.Plan({group: (1, 5, 6)}), torch.randn(3, 4, dtype=torch.float64)
    pruned = ekgfx.prune(model, plan, traced)
    assert check_masked(traced, plan, (x,)) < 1e-12
    assert check_pruned(traced, plan, pruned, (x,)) < 1e-12
    assert (pruned[0].out_features, pruned[2].in_features) == (3, 3)


def test_macs_layer_by_layer() -> None:
    """Three 1×1 convolutions on 8×8: 64·in·out each; together the cost."""
    model = torch.nn.Sequential()
    for name, (inputs, outputs) in {"a": (3, 8), "b": (8, 6), "out": (6, 2)}.items():
        model.add_module(name, torch.nn.Conv2d(inputs, outputs, 1))
    traced = ekgfx.trace(model.eval(), torch.zeros(2, 3, 8, 8))
    assert traced.layer_macs() == {"a": 64 * 24, "b": 64 * 48, "out": 64 * 12}
    plan = ekgfx.Plan({"a": (0, 1, 5), "b": (2, 4)})
    assert traced.layer_macs(plan) == {"a": 64 * 9, "b": 64 * 6, "out": 64 * 4}
    assert sum(traced.layer_macs(plan).values()) == traced.cost(plan).macs


def test_plans_survive_json() -> None:
    plan = ekgfx.Plan({"a": (0, 2), "b": (1,)}, structure="abc", rescale=True)
    assert ekgfx.Plan.from_json(plan.to_json()) == plan
    for text in ("", "[]", "{}", '{"version": 99}', '{"version": 1, "kept": {"a": "xx"}}'):
        with pytest.raises(PlanError):
            ekgfx.Plan.from_json(text)


def test_the_checks_can_fail() -> None:
    """A plan that the masked network and the sliced one disagree on must be noticed: shift one kept index."""
    model = Residual().double().eval()
    perturb(model)
    traced = ekgfx.trace(model, example(Residual))
    pruned = ekgfx.prune(model, ekgfx.Plan({"a": (0, 2)}), traced)
    assert check_pruned(traced, ekgfx.Plan({"a": (0, 3)}), pruned, example(Residual)) > 1e-3


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        ([1.0, math.nan], [1.0, math.nan], 0),
        ([1.0, math.inf], [1.0, math.inf], 0),
        ([1.0, math.nan], [1.0, 2.0], math.inf),
        ([1.0, 2.0], [1.0, math.nan], math.inf),
        ([1.0, math.inf], [1.0, -math.inf], math.inf),
        ([3.0, 1.0], [2.0, 1.0], 0.5),
        ([0, 3], [0, 4], 0.25),
        ([True, False], [True, True], 1),
    ],
)
def test_numbers_that_are_none_do_not_pass_for_equal(a: list, b: list, error: float) -> None:
    assert relative_error({"x": torch.tensor(a)}, {"x": torch.tensor(b)}) == error


def test_perturbing_leaves_numbers() -> None:
    """Also a weight of one entry, whose spread cannot be estimated."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    perturb(model)
    after = model.state_dict()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert all(not torch.equal(before[n], t) for n, t in after.items() if n != "1.num_batches_tracked")


class Preactivation(nn.Module):
    """A stream and a concatenation that norms alone read, and a convolution of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.n1, self.a = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.n2, self.b = nn.BatchNorm2d(16), nn.Conv2d(16, 12, 1)
        self.grouped, self.n3 = nn.Conv2d(12, 12, 3, groups=2), nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 2)
        y = torch.cat([x, self.a(F.relu(self.n1(x)))], 1)
        y = torch.tanh(self.b(torch.sigmoid(self.n2(y))))
        return self.last(F.silu(self.n3(self.grouped(y)))).mean((2, 3))


def test_channels_that_norms_alone_read_are_read_behind_them() -> None:
    """The stem behind both norms; `a`, of the concatenation, behind the second. A group of the grouped convolution goes
    through it by itself, to a norm; a channel within the groups is summed in it, and is read before."""
    traced = ekgfx.trace(Preactivation().eval(), torch.randn(2, 3, 12, 12))
    gates = {name: {gate.node for gate in group.gates} for name, group in traced.groups.items()}
    assert gates == {
        "stem": {"relu", "sigmoid"},
        "a": {"sigmoid"},
        "b#0": {"silu"},
        "b#1": {"tanh"},
        "grouped": {"silu"},
    }


def test_a_value_that_something_else_reads_too_is_read_where_it_is() -> None:
    """Squeeze and excitation reads the channels as they are; a post-activation stream is read by a convolution."""

    class Excited(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.se, self.norm, self.b = (
                nn.Conv2d(3, 8, 1),
                nn.Conv2d(8, 8, 1),
                nn.BatchNorm2d(8),
                nn.Conv2d(8, 2, 1),
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.b(self.norm(x) * torch.sigmoid(self.se(x.mean((2, 3), True)))).mean((2, 3))

    traced = ekgfx.trace(Excited().eval(), torch.randn(2, 3, 6, 6))
    assert [gate.node for gate in traced.groups["a"].gates] == ["conv2d", "mul"]


def test_outputs_that_hold_other_tensors_are_told_apart() -> None:
    one = torch.ones(2)
    with pytest.raises(PruneError, match=r"cache\.keys lacking, nothing besides; .*use_cache=False"):
        relative_error({"x": one}, {"x": one, "cache": {"keys": one}})
