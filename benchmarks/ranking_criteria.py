"""Criteria that `benchmarks/ranking.py` tries and the package does not have."""

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch_pruning.pruner import importance as peers  # type: ignore[import-untyped]

from ekgfx.axes import axes, membership
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.groups import ChannelGroup, Gate
from ekgfx.graph.plan import Plan
from ekgfx.search.importance import Scores, by_channel, changes_at, channel_index, samples_along
from ekgfx.search.importance_peers import by_weights
from ekgfx.search.problem import Problem
from ekgfx.search.reward import Knowledge
from ekgfx.tracing.trace import TracedModel

SAMPLED = 20_000
"""Most positions of an operator's input that its Gram matrix is of."""

l2 = by_weights(peers.GroupMagnitudeImportance(p=2))
"""L2 norm of the group's weights."""


def squares(problem: Problem, plan: Plan, knowledge: Knowledge | None) -> Scores:
    """Σ_samples Σ_places (Σ_space (∂ℛ/∂y)·y)²: the diagonal of the Fisher information of the channels' scales."""
    network = problem.network(plan)
    groups = [problem.traced.groups[name] for name in problem.rules]
    network.weights = {name: weight.detach() for name, weight in network.weights.items()}
    places = dict.fromkeys((gate.node, gate.dim) for group in groups for gate in group.gates)
    network.sources = {node for node, _ in places}
    scores = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in groups}
    for batch in problem.batches:
        with torch.enable_grad():
            output, values = network.run(*batch.inputs, capture=network.sources)
            negative = problem.objective.terms(output, batch.target, None)[1]
        rows = {place: samples_along(problem.traced, place[0], batch.samples) for place in places}
        changes, _ = changes_at(negative, {place: values[place[0]] for place in places}, (), rows)
        for group in groups:
            for gate in group.gates:
                sums = by_channel(changes[gate.node, gate.dim], gate.index, group.size)
                scores[group.name] += sums.square().sum(0) * batch.samples
    return scores


def least_squares(problem: Problem, plan: Plan, knowledge: Knowledge | None) -> Scores:
    """What the readers of a channel lose when it is removed and they are refitted to what is left (greedily, as optimal
    brain surgeon), relative to what their outputs vary: ΔE = tr W_c [(G⁻¹)_cc]⁻¹ W_cᵀ over the readers of the group."""
    traced = problem.traced
    readers: dict[str, list[fx.Node]] = {name: [] for name in problem.rules}
    for name in readers:
        axis = traced.groups[name].axis
        for operation in traced.operations:
            weight = operation.args.get("weight")
            linear = str(operation.target) in ("aten.conv2d.default", "aten.linear.default")
            if linear and isinstance(weight, fx.Node) and axis in set(axes(traced.dims[weight.name][1])):
                readers[name].append(operation.node)
    inputs = {node: traced.operation(node).args["input"].name for nodes in readers.values() for node in nodes}
    network = SubNetwork(traced, {})
    grams: dict[fx.Node, Tensor] = {}
    with torch.no_grad():
        for batch in problem.batches:  # one, in this benchmark
            _, values = network.run(*batch.inputs, capture=set(inputs.values()))
            grams |= {node: gram(columns(traced, node, values[name])) for node, name in inputs.items()}
    scores = {}
    for name, nodes in readers.items():
        group = traced.groups[name]
        parts = []
        for node in nodes:
            weight = traced.weights[traced.operation(node).args["weight"].name]
            channel = channel_index(problem, weight, 1, group.axis, {})
            w = traced.tensor(weight).detach().double().flatten(1)
            parts.append((grams[node], w, channel.repeat_interleave(w.shape[1] // len(channel))))
        scores[name] = surgeon(parts, group.size)
    return scores


def columns(traced: TracedModel, node: fx.Node, x: Tensor) -> Tensor:
    """The input of a linear operator as positions × inputs, a sample of them."""
    operation = traced.operation(node)
    if x.dim() == 4:
        args = operation.args
        kernel = traced.tensor(traced.weights[args["weight"].name]).shape[2:]
        x = F.unfold(x, kernel, args["dilation"], args["padding"], args["stride"]).transpose(1, 2)
    x = x.flatten(0, -2)
    if len(x) > SAMPLED:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:SAMPLED]]
    return x


def gram(x: Tensor) -> Tensor:
    """Covariance, with the ridge that keeps it invertible."""
    x = (x - x.mean(0)).double()
    found = x.T @ x / len(x)
    return found + torch.eye(len(found), dtype=found.dtype) * (
        found.diagonal().mean() * 10 * len(found) / len(x) + 1e-12
    )


def surgeon(readers: list[tuple[Tensor, Tensor, Tensor]], size: int) -> Tensor:
    """The error at which each of `size` channels goes, never less than that of those which went before.

    readers: Gram matrix D × D, weight O × D, channel of each of the D inputs.
    """
    state = []
    for gram_matrix, weight, channel in readers:
        scale = float((weight @ gram_matrix * weight).sum()) or 1.0
        own = [torch.nonzero(channel == c).flatten() for c in range(size)]
        state.append([torch.linalg.inv(gram_matrix), weight.clone(), own, scale])
    left, scores, worst = set(range(size)), torch.zeros(size, dtype=torch.float64), 0.0
    while left:
        losses = torch.zeros(size, dtype=torch.float64)
        for inverse, weight, own, scale in state:
            for c in left:
                block = inverse[own[c]][:, own[c]]
                w = weight[:, own[c]]
                losses[c] += (torch.linalg.solve(block, w.T) * w.T).sum() / scale
        gone = min(left, key=lambda c: float(losses[c]))
        worst = max(worst, float(losses[gone]))
        scores[gone] = worst * (1 + 1e-9 * (size - len(left)))  # the order of removal decides between equals
        left.remove(gone)
        for entry in state:
            inverse, weight, own, _ = entry
            at = own[gone]
            back = torch.linalg.solve(inverse[at][:, at], inverse[at])
            entry[1] = weight - weight[:, at] @ back
            entry[0] = inverse - inverse[:, at] @ back
            rest = torch.cat([own[c] for c in left]) if left else at
            keep = torch.zeros(len(inverse), dtype=torch.bool).index_fill_(0, rest, True)
            entry[1][:, ~keep] = 0.0
    return scores


def early_gates(traced: TracedModel, group: ChannelGroup) -> tuple[Gate, ...]:
    """Where a group's activations were read at first: at the end of each producer's chain of norms, activations and
    sums, which any convolution ends."""
    ends = {}
    for operation in traced.operations:
        produced, weight = operation.effect.produces, operation.args.get("weight")
        if produced is None or not isinstance(weight, fx.Node) or group.axis not in axes(produced[1]):
            continue
        node = operation.node
        while len(node.users) == 1:
            (user,) = node.users
            reader = traced.operation(user)
            if reader is None or not reader.effect.carries:
                break
            if not any(group.axis in axes(dim) for dim in traced.dims[user.name]):
                break
            node = user
        ends[node] = None
    return tuple(
        Gate(node.name, d, membership(dim, group.axis))
        for node in ends
        for d, dim in enumerate(traced.dims[node.name])
        if group.axis in axes(dim)
    )


def kind(traced: TracedModel, group: ChannelGroup) -> str:
    """What the group is in a network of inverted residuals."""
    if any(
        traced.tensor(place.parameter).dim() == 4 and traced.tensor(place.parameter).shape[1] == 1
        for place in group.places
    ):
        return "depthwise"
    return "stream" if len(group.producers) > 1 else "other"
