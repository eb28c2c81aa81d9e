"""Criteria that `benchmarks/ranking.py cut` tries and the package does not have."""

import torch
from torch import fx
from torch_pruning.pruner import importance as peers  # type: ignore[import-untyped]

from ekgfx.axes import axes, membership
from ekgfx.graph.gates import Gate
from ekgfx.graph.groups import ChannelGroup
from ekgfx.graph.plan import Plan
from ekgfx.search.importance import Scores, by_channel, changes_at, samples_along
from ekgfx.search.importance_peers import by_weights
from ekgfx.search.problem import Problem
from ekgfx.search.reward import Knowledge
from ekgfx.tracing.traced import TracedModel

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
            if not any(group.axis in axes(dim) for dim in traced.dims.get(user.name, ())):
                break
            node = user
        ends[node] = None
    return tuple(
        Gate(node.name, d, membership(dim, group.axis))
        for node in ends
        for d, dim in enumerate(traced.dims.get(node.name, ()))
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
