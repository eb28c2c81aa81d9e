"""Importance criteria of other methods, computed by torch-pruning on stand-ins for our groups' layers.

torch-pruning scores a group of layers of which it knows the pruning function. For every place of a group we hand it a
layer of the right kind whose weight holds one row per kept channel: a linear layer for every matrix or kernel, a norm
for the scale of a norm. (Its formulas look at one channel's entries only, so it makes no difference whether the channel
is an input or an output of the real layer.) The adapter thus also serves parameters that belong to no layer, and
channels that are many positions wide, such as attention heads.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch_pruning.dependency import Dependency, Group, Node  # type: ignore[import-untyped]
from torch_pruning.pruner import function, importance  # type: ignore[import-untyped]

from ekgfx.errors import PlanError
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.groups import ChannelGroup
from ekgfx.graph.plan import Plan
from ekgfx.search.importance import Criterion, Scores, channel_index, differentiable
from ekgfx.search.own import check_gradient
from ekgfx.search.problem import Problem
from ekgfx.search.reward import Knowledge

Scorer = Callable[[Group], Tensor | None]

NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    "aten.batch_norm": nn.BatchNorm1d,
    "aten.layer_norm": nn.LayerNorm,
}
"""Operators whose scale torch-pruning knows as a norm's."""

MAGNITUDE = importance.GroupMagnitudeImportance(p=1)


def by_weights(scorer: Scorer) -> Criterion:
    """A criterion that looks only at the weights of the current sub-network."""

    def criterion(problem: Problem, plan: Plan, knowledge: Knowledge | None) -> Scores:
        weights, groups = problem.network(plan).weights, problem.traced.groups
        return {name: _score(problem, plan, groups[name], weights, {}, scorer) for name in problem.groups}

    return criterion


magnitude = by_weights(MAGNITUDE)
"""L1 norm of the group's weights."""
fpgm = by_weights(importance.FPGMImportance())
"""Distance from the other filters of the group (geometric median)."""
lamp = by_weights(importance.LAMPImportance())
"""Layer-adaptive magnitude."""


def bn_scale(problem: Problem, plan: Plan, knowledge: Knowledge | None) -> Scores:
    """|γ| of the group's BatchNorms (network slimming, GBN); groups without one are scored by magnitude.

    Raises PlanError when no group has a BatchNorm.
    """
    scales = norm_scales(problem.traced)
    if nn.BatchNorm1d not in scales.values():
        raise PlanError("bn-scale needs BatchNorm, and this model has none; use another importance, such as taylor")
    return by_weights(importance.BNScaleImportance())(problem, plan, knowledge)


def hessian(problem: Problem, plan: Plan, knowledge: Knowledge | None) -> Scores:
    """Optimal brain damage: θ²·h per channel, h the mean of the squared per-sample gradients of −ℛ (diagonal Fisher).

    One backward pass per validation sample: the dearest of the criteria.
    """
    groups = [problem.traced.groups[name] for name in problem.groups]
    names = sorted({place.parameter for group in groups for place in group.places})
    network = differentiable(problem.network(plan), names)
    weights = [network.weights[name] for name in names]
    squares = [torch.zeros_like(weight) for weight in weights]
    samples = sum(batch.samples for batch in problem.batches)
    for number, batch in enumerate(problem.batches):
        with torch.enable_grad():
            output = batch.inputs.into(network)
        target = None if knowledge is None else knowledge[number]
        for sample in range(batch.samples):
            with torch.enable_grad():
                one = [_sample(value, sample) for value in (output, batch.target, target)]
                negative = problem.objective.terms(*one)[1]
            check_gradient(negative)
            for square, gradient in zip(
                squares, torch.autograd.grad(negative, weights, retain_graph=True, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    square += gradient.square() / samples
    curvature = dict(zip(names, squares, strict=True))
    scorer = importance.GroupHessianImportance()
    return {g.name: _score(problem, plan, g, network.weights, curvature, scorer) for g in groups}


def norm_scales(graph: AxisGraph) -> dict[str, Callable[[int], nn.Module]]:
    """Parameters that are the scale of a norm → the kind of layer that torch-pruning knows them by."""
    scales = {}
    for operation in graph.operations:
        kind = next((kind for op, kind in NORMS.items() if str(operation.target).startswith(op)), None)
        weight = operation.args.get("weight")
        if kind is not None and isinstance(weight, fx.Node) and weight.name in graph.weights:
            scales[graph.weights[weight.name]] = kind
    return scales


def _score(
    problem: Problem,
    plan: Plan,
    group: ChannelGroup,
    weights: Mapping[str, Tensor],
    curvature: Mapping[str, Tensor],
    scorer: Scorer,
) -> Tensor:
    """torch-pruning's score of the channels that the sub-network keeps of a group; 0 for the others."""
    kept = problem.kept(plan, group.name)
    scores = torch.zeros(group.size, dtype=torch.float64)
    layers = list(_stand_ins(problem, plan, group, weights, curvature))
    found = scorer(_tp_group(layers, len(kept)))
    if found is None:
        found = MAGNITUDE(_tp_group(layers, len(kept)))
    if found is None:
        raise PlanError(
            f"torch-pruning cannot score group {group.name!r}: no layer of it has a weight; ignore the group"
        )
    scores[list(kept)] = found.detach().double().cpu().nan_to_num()
    return scores


def _stand_ins(
    problem: Problem, plan: Plan, group: ChannelGroup, weights: Mapping[str, Tensor], curvature: Mapping[str, Tensor]
) -> Iterator[nn.Module]:
    """One layer per place of the group, with a row for every kept channel; its gradient holds the curvature."""
    axes_kept = problem.traced.groups.kept(plan)
    scales = norm_scales(problem.traced)
    for place in group.places:
        weight = weights[place.parameter].detach()
        index = channel_index(problem, place.parameter, place.dim, group.axis, axes_kept)
        rows = rows_of(weight, place.dim, index)
        bend = rows_of(curvature[place.parameter], place.dim, index) if curvature else None
        if place.parameter in scales:
            for column in range(rows.shape[1]):
                layer = scales[place.parameter](len(rows))
                yield _with_weight(layer, rows[:, column], None if bend is None else bend[:, column])
        elif weight.dim() > 1:
            yield _with_weight(nn.Linear(1, 1, bias=False), rows, bend)


def rows_of(weight: Tensor, dim: int, index: Tensor) -> Tensor:
    """The entries of every channel in a row of their own: kept channels × entries. index: channel per position."""
    own = torch.nonzero(index >= 0).flatten()
    order = own[index[own].argsort(stable=True)]
    channels = len(index[own].unique())
    return weight.movedim(dim, 0)[order.to(weight.device)].reshape(channels, -1)


def _with_weight(layer: nn.Module, weight: Tensor, gradient: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight.contiguous())
    layer.weight.grad = None if gradient is None else gradient.contiguous()
    return layer


def _tp_group(layers: list[nn.Module], channels: int) -> Group:
    """torch-pruning's group over all channels of the layers."""
    group = Group()
    for layer in layers:
        node = Node(layer, grad_fn=None)
        prune = function.prune_linear_out_channels
        if isinstance(layer, nn.BatchNorm1d):
            prune = function.prune_batchnorm_out_channels
        elif isinstance(layer, nn.LayerNorm):
            prune = function.prune_layernorm_out_channels
        group.add_dep(Dependency(trigger=prune, handler=prune, source=node, target=node), list(range(channels)))
        group[-1].root_idxs = list(range(channels))
    return group


def _sample(value: Any, sample: int) -> Any:
    """One sample of every tensor, as a batch of one."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[sample : sample + 1], value)
