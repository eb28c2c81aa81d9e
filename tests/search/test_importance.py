"""Importance: eq. 9 against gates inserted by hand, the peers against torch-pruning on the real modules."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.graph.plan import Plan
from ekgfx.search import IMPORTANCE, find_budget, importance
from ekgfx.search.importance import differentiable, products_along, taylor, taylor_per_sample
from ekgfx.search.importance_peers import hessian
from ekgfx.search.problem import Problem, width_rules
from ekgfx.search.reward import Objective, validation_batches
from ekgfx.tracing.traced import TracedModel
from tests.search import nets
from tests.support.models import PackedAttention, Residual, example


def problem_of(traced: TracedModel, batches: list) -> Problem:
    return Problem(
        traced=traced,
        batches=validation_batches(batches),
        objective=Objective(),
        budget=find_budget(traced, flops=0.5),
        rules=width_rules(traced, frozenset(), 1, 0.0),
        guided=False,
        ensemble=False,
        rescale=False,
    )


def two_batches(cls: type, classes: int) -> list[tuple[Tensor, Tensor]]:
    return [(example(cls, batch, seed)[0], torch.arange(batch) % classes) for batch, seed in ((6, 1), (3, 2))]


def by_gates(
    batches: list, loss_at: Callable[[Tensor, Tensor, list[Tensor]], Tensor], sizes: list[int]
) -> list[Tensor]:
    """|∂loss/∂gate| at gates of ones, per batch, summed: what eq. 9 is the activation form of."""
    total = sum(len(labels) for _, labels in batches)
    found = [torch.zeros(size, dtype=torch.float64) for size in sizes]
    for images, labels in batches:
        gates = [torch.ones(size, dtype=torch.float64, requires_grad=True) for size in sizes]
        gradients = torch.autograd.grad(loss_at(images, labels, gates) * len(labels) / total, gates)
        found = [each + gradient.abs() for each, gradient in zip(found, gradients, strict=True)]
    return found


def test_gates_of_a_residual_network() -> None:
    """The stem's channels are read twice (after the stem, after the addition): two places, each with its own |Σ|."""
    torch.manual_seed(0)
    model = Residual().double()
    batches = two_batches(Residual, 5)

    def loss_at(x: Tensor, labels: Tensor, gates: list[Tensor]) -> Tensor:
        stem, inner, late = (gate[:, None, None] for gate in gates)
        x = F.relu(model.stem(x)) * stem
        y = model.b(F.relu(model.a(x)) * inner)
        x = F.relu(F.batch_norm(x + y, None, None, model.bn.weight, model.bn.bias, True)) * late
        return F.cross_entropy(model.head(x.mean((2, 3))), labels)

    stem, inner, late = by_gates(batches, loss_at, [8, 6, 8])
    scores = taylor(problem_of(ekgfx.trace(model, example(Residual)), batches), Plan(), None)
    torch.testing.assert_close(scores["stem"], stem + late, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(scores["a"], inner, rtol=1e-10, atol=1e-14)


class Depthwise(nn.Module):
    """An inverted residual's first half, whose norms have next to no epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.n1 = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6, eps=1e-12)
        self.depth, self.n2 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6, eps=1e-12)
        self.project, self.head = nn.Conv2d(6, 4, 1), nn.Linear(4, 5)

    def forward(self, x: Tensor, gates: list[Tensor] | None = None) -> Tensor:
        before, behind = (gate[:, None, None] for gate in gates) if gates else (1, 1)
        x = F.relu6(self.n1(self.expand(x))) * before
        x = F.relu6(self.n2(self.depth(x))) * behind
        return self.head(self.project(x).mean((2, 3)))


def test_a_norm_takes_the_scale_of_a_depthwise_channel_away() -> None:
    """Before the depthwise convolution the score of every channel is zero, whatever it is worth: the norm behind it
    divides by whatever the channel is multiplied with. So it is read behind that norm."""
    torch.manual_seed(0)
    model = Depthwise().double()
    batches = [(torch.randn(n, 3, 6, 6, dtype=torch.float64), torch.arange(n) % 5) for n in (6, 3)]
    traced = ekgfx.trace(model.eval(), batches[0][0])
    scores = taylor(problem_of(traced, batches), Plan(), None)["expand"]
    model.train()
    before, behind = by_gates(batches, lambda x, labels, gates: F.cross_entropy(model(x, gates), labels), [6, 6])
    assert before.max() < 1e-9 < 1e-3 < behind.min()
    torch.testing.assert_close(scores, behind, rtol=1e-9, atol=1e-14)


class Cancelling(nn.Module):
    """Two channels; the loss is the sum of what they add, with the sign that the label says."""

    def __init__(self) -> None:
        super().__init__()
        self.two, self.out = nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.two.weight.copy_(torch.tensor([[3.0], [1.0]]))
            self.out.weight.copy_(torch.tensor([[1.0, 1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(x))


def test_samples_that_cancel_do_so_in_the_papers_sum_alone() -> None:
    """Channel 0 passes 3x on, channel 1 passes x, and the loss of a sample is ±(3x + x). Of x = 1 with +, x = 1 with −
    the sum of (∂ℛ/∂y)·y is 0 for both channels; the mean of its absolute values is 3 and 1."""
    batch = (torch.ones(2, 1), torch.tensor([[1.0], [-1.0]]))
    objective = Objective(loss=lambda output, sign: (output * sign).mean())
    problem = replace(problem_of(ekgfx.trace(Cancelling(), torch.ones(2, 1)), [batch]), objective=objective)
    assert taylor(problem, Plan(), None)["two"].tolist() == [0.0, 0.0]
    assert taylor_per_sample(problem, Plan(), None)["two"].tolist() == [3.0, 1.0]


def test_one_sample_a_batch_is_what_per_sample_means() -> None:
    """Where samples do not meet in a norm, the criterion is the paper's on batches of one sample."""
    traced = nets.vit()
    samples = [pair for batch in nets.batches() for pair in zip(*(part.split(1) for part in batch), strict=True)]
    expected = taylor(problem_of(traced, samples), Plan(), None)
    found = taylor_per_sample(problem_of(traced, nets.batches()), Plan(), None)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


def test_samples_are_found_where_they_are() -> None:
    """Samples first, folded with windows, or second, as in sequences."""

    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:  # B × 4 × 3
            x = self.a(x.reshape(-1, 2, 3)).reshape(-1, 4, 4).transpose(0, 1)
            return self.c(F.relu(self.b(x))).mean(0)

    torch.manual_seed(0)
    images, labels = torch.randn(7, 4, 3), torch.arange(7) % 5
    traced = ekgfx.trace(Folded(), torch.randn(2, 4, 3))
    ones = problem_of(traced, [(x[None], y[None]) for x, y in zip(images, labels, strict=True)])
    expected = taylor(ones, Plan(), None)
    found = taylor_per_sample(problem_of(traced, [(images, labels)]), Plan(), None)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


def test_heads_of_attention() -> None:
    """A head is a channel: everything in its query, key and value counts as one sum."""
    torch.manual_seed(0)
    model = PackedAttention().double()
    batches = two_batches(PackedAttention, 2)

    def loss_at(x: Tensor, labels: Tensor, gates: list[Tensor]) -> Tensor:
        x = model.embed(x)
        n, t, _ = x.shape
        qkv = model.qkv(model.norm(x)).view(n, t, 3, model.heads, -1) * gates[0][:, None]
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).reshape(n, t, -1)
        return F.cross_entropy(model.head((x + model.proj(y)).mean(1)), labels)

    (heads,) = by_gates(batches, loss_at, [3])
    scores = taylor(problem_of(ekgfx.trace(model, example(PackedAttention)), batches), Plan(), None)
    torch.testing.assert_close(scores["qkv"], heads, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 7, 8), (4, 6), (9,)])
def test_products_are_summed_in_parts(shape: tuple[int, ...], monkeypatch) -> None:
    monkeypatch.setattr(importance, "PRODUCTS", 50)  # a sample or two
    a, b = torch.randn(2, *shape, dtype=torch.float64)
    for dim in range(len(shape)):
        expected = (a * b).movedim(dim, 0).reshape(shape[dim], -1).sum(1)
        torch.testing.assert_close(products_along(a, b, dim), expected, rtol=1e-12, atol=1e-12)


def test_gradients_are_taken_from_the_first_activation_on() -> None:
    """Nothing is recorded before, and weights ask for none but those that are scored themselves."""
    traced = ekgfx.trace(Residual().double(), example(Residual))
    gates = [gate.node for group in traced.groups.values() for gate in group.gates]
    network = differentiable(problem_of(traced, two_batches(Residual, 5)).network(Plan()), ["head.weight"])
    network.sources = gates
    names = [node.name for node in traced.graph.nodes if node.op == "call_function"]
    _, values = network.run(example(Residual), capture=names)
    first = min(names.index(gate) for gate in gates)
    assert values[names[first]].is_leaf
    assert [values[name].requires_grad for name in names] == [at >= first for at in range(len(names))]
    assert [name for name, weight in network.weights.items() if weight.requires_grad] == ["head.weight"]
    with torch.no_grad():
        assert not any(value.requires_grad for value in network.run(example(Residual), capture=names)[1].values())


def test_removed_channels_score_zero_and_the_others_are_scored_in_the_sub_network() -> None:
    torch.manual_seed(0)
    model = Residual().double()
    traced, batches = ekgfx.trace(model, example(Residual)), two_batches(Residual, 5)
    plan = Plan({"stem": (0, 2, 3, 7), "a": (1, 4)})
    pruned = ekgfx.prune(model, plan, traced=traced)
    inside = taylor(problem_of(traced, batches), plan, None)
    alone = taylor(problem_of(ekgfx.trace(pruned, example(Residual)), batches), Plan(), None)
    for name, kept in plan.kept.items():
        torch.testing.assert_close(inside[name][list(kept)], alone[name], rtol=1e-9, atol=1e-14)
        assert inside[name].count_nonzero() == len(kept)


def test_frozen_weights_are_scored_too() -> None:
    traced = nets.cnn()
    expected = taylor(problem_of(traced, nets.batches()), Plan(), None)
    traced.model.requires_grad_(False)
    with torch.no_grad():
        found = taylor(problem_of(traced, nets.batches()), Plan(), None)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_groups_without_an_activation_take_their_parameters() -> None:
    torch.manual_seed(0)
    traced = nets.cnn()
    name = "fuse.0"
    group = replace(traced.groups[name], gates=())
    bare = problem_of(traced, nets.batches())
    traced.groups._groups[name] = group
    scores = taylor(bare, Plan(), None)
    parameters = [traced.tensor(parameter) for parameter in group.producers]
    expected = torch.zeros(group.size, dtype=torch.float64)
    for batch in bare.batches:
        loss = F.cross_entropy(batch.inputs.into(bare.network(Plan())), batch.target) * batch.samples / 24
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            expected += (gradient * parameter).abs().flatten(1).sum(1).detach().double()
    torch.testing.assert_close(scores[name], expected, rtol=1e-4, atol=1e-9)


class Chain(nn.Module):
    """conv → norm → conv → norm → classifier: what torch-pruning understands on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.b, self.bn, self.head = nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.an(self.a(x)))
        return self.head(F.relu(self.bn(self.b(x))).mean((2, 3)))


PEERS = {
    "magnitude": tp.importance.GroupMagnitudeImportance(p=1),
    "fpgm": tp.importance.FPGMImportance(),
    "bn-scale": tp.importance.BNScaleImportance(),
    "lamp": tp.importance.LAMPImportance(),
}


@pytest.mark.parametrize("name", PEERS)
def test_peers_are_torch_prunings_own_scores(name: str) -> None:
    torch.manual_seed(0)
    traced = nets.traced(Chain())
    scores = IMPORTANCE[name](problem_of(traced, nets.batches()), Plan(), None)
    graph = tp.DependencyGraph().build_dependency(traced.model, torch.randn(2, 1, 8, 8))
    for layer in ("a", "b"):
        module = traced.model.get_submodule(layer)
        group = graph.get_pruning_group(module, tp.prune_conv_out_channels, list(range(module.out_channels)))
        torch.testing.assert_close(scores[layer], PEERS[name](group).detach().double(), rtol=1e-5, atol=1e-7)


def test_hessian_is_torch_prunings_on_per_sample_gradients() -> None:
    torch.manual_seed(0)
    traced = nets.traced(Chain())
    batches = nets.batches(samples=6, size=6)
    scores = hessian(problem_of(traced, batches), Plan(), None)
    model, (images, labels) = traced.model, batches[0]
    output = problem_of(traced, batches).network(Plan())(images)
    squares = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for loss in F.cross_entropy(output, labels, reduction="none"):
        gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        squares = [square + gradient**2 / 6 for square, gradient in zip(squares, gradients, strict=True)]
    for parameter, square in zip(model.parameters(), squares, strict=True):
        parameter.grad = square
    graph = tp.DependencyGraph().build_dependency(model, torch.randn(2, 1, 8, 8))
    group = graph.get_pruning_group(model.b, tp.prune_conv_out_channels, list(range(12)))
    expected = tp.importance.GroupHessianImportance()(group)
    torch.testing.assert_close(scores["b"], expected.detach().double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["magnitude", "fpgm", "lamp"])
def test_peers_score_heads_in_the_sub_network(name: str) -> None:
    """One score per head, the same as on the pruned model; removed heads score zero."""
    traced = nets.vit()
    plan = Plan({"blocks.0.qkv": (0, 2), "embed": tuple(range(0, 12, 2))})
    scores = IMPORTANCE[name](problem_of(traced, nets.batches()), plan, None)
    alone = ekgfx.trace(ekgfx.prune(traced.model, plan, traced=traced), torch.randn(2, 1, 8, 8))
    expected = IMPORTANCE[name](problem_of(alone, nets.batches()), Plan(), None)
    for group, kept in plan.kept.items():
        torch.testing.assert_close(scores[group][list(kept)], expected[group], rtol=1e-5, atol=1e-7)
        assert scores[group].count_nonzero() == len(kept)


def test_bn_scale_needs_batch_norm() -> None:
    with pytest.raises(ekgfx.EkgfxError, match="has none"):
        IMPORTANCE["bn-scale"](problem_of(nets.vit(), nets.batches()), Plan(), None)


def test_bn_scale_takes_the_magnitude_of_groups_without_a_norm() -> None:
    problem = problem_of(nets.cnn(), nets.batches())
    scale, magnitude = (IMPORTANCE[name](problem, Plan(), None) for name in ("bn-scale", "magnitude"))
    assert torch.equal(scale["block.se.reduce"], magnitude["block.se.reduce"])
    assert not torch.equal(scale["fuse.0"], magnitude["fuse.0"])


def test_a_group_of_biases_alone_cannot_be_scored_by_weights() -> None:
    problem = problem_of(nets.traced(Chain()), nets.batches())
    groups = problem.traced.groups
    biases = tuple(place for place in groups["b"].places if place.parameter.endswith("bias"))
    groups._groups["b"] = replace(groups["b"], places=biases)
    with pytest.raises(ekgfx.EkgfxError, match="cannot score group 'b'"):
        IMPORTANCE["magnitude"](problem, Plan(), None)
