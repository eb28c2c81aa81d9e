"""Importance of every channel: how much the reward would change without it (eq. 9)."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ekgfx.axes import Axis, membership, positions
from ekgfx.distributed import team
from ekgfx.groups import ChannelGroup
from ekgfx.plan import Plan
from ekgfx.search.forks import Keeper
from ekgfx.search.problem import Problem
from ekgfx.search.reward import Knowledge
from ekgfx.sliced import SubNetwork

Scores = dict[str, Tensor]
"""Importance per group: float64, one value for every channel of the uncut group, 0 where it is already removed."""

Criterion = Callable[[Problem, Plan, Knowledge | None], Scores]
"""Scores the channels of the current sub-network, given its plan and the knowledge T."""


def taylor(problem: Problem, plan: Plan, knowledge: Knowledge | None, keeper: Keeper | None = None) -> Scores:
    """S_c = Σ_batches Σ_places |Σ_{batch, space} (∂ℛ/∂y_c)·y_c| at the activations that carry the group (eq. 9).

    A group that no activation carries takes Σ |∂ℛ/∂θ·θ| over its parameters instead, summed per channel.
    keeper: takes values of the forward passes, which are those of the sub-network's evaluation.
    """
    network = differentiable(problem.network(plan))
    if problem.computing.amp == "fp16":
        network.amp, keeper = None, None  # gradients of a mean over many pixels are below what fp16 can hold
    kept = problem.traced.groups.kept(plan)
    groups = [problem.traced.groups[name] for name in problem.rules]
    gates = {gate.node for group in groups for gate in group.gates}
    bare = sorted({name for group in groups if not group.gates for name in carriers(group)})
    owners = team().owners([batch.samples for batch in problem.batches])
    found = [torch.zeros(sum(group.size for group in groups), dtype=torch.float64) for _ in owners]
    for number, batch in enumerate(problem.batches):
        if owners[number] != team().rank:
            continue
        scores = dict(zip((g.name for g in groups), found[number].split([g.size for g in groups]), strict=True))
        with torch.enable_grad():
            output, values = network.run(batch.inputs, capture=gates if keeper is None else gates | keeper.wanted)
            target = None if knowledge is None else knowledge[number]
            negative = problem.objective.terms(output, batch.target, target)[1]
        if keeper is not None:
            keeper.take(number, values)
        sources = {node: values[node] for node in sorted(gates)} | {name: network.weights[name] for name in bare}
        derivatives = torch.autograd.grad(negative, list(sources.values()), allow_unused=True)
        gradients = dict(zip(sources, derivatives, strict=True))
        share = problem.objective.share(batch, problem.batches)

        for group in groups:
            for gate in group.gates:
                if gradients[gate.node] is not None:
                    index = gate.index[positions(problem.traced.dims[gate.node][gate.dim], kept)]  # type: ignore[arg-type]
                    change = gradients[gate.node] * sources[gate.node].detach()  # all at once would take as much memory
                    scores[group.name] += share * per_channel(change, gate.dim, index, group.size).abs()
            for name, dim in carriers(group).items() if not group.gates else ():
                if gradients[name] is not None:
                    index = channel_index(problem, name, dim, group.axis, kept)
                    change = gradients[name] * sources[name].detach()
                    scores[group.name] += share * per_channel(change.abs(), dim, index, group.size)
    whole = sum(team().gathered(torch.stack(found)))  # batch after batch, whoever computed them
    assert isinstance(whole, Tensor)
    return dict(zip((g.name for g in groups), whole.split([g.size for g in groups]), strict=True))


def differentiable(network: SubNetwork) -> SubNetwork:
    """The same network on copies of its weights that gradients are taken of, whatever the model's own ask for."""
    network.weights = {
        name: weight.detach().requires_grad_(weight.is_floating_point()) for name, weight in network.weights.items()
    }
    return network


def per_channel(values: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """Sums of `values` over everything but the channel. index: channel of each position along `dim`, −1 for none.
    Returns float64 on the CPU, one sum per channel."""
    rest = [d for d in range(1, values.dim()) if d != dim]
    part = values.sum(rest) if rest else values  # by sample in its own precision, which is quick, and then in float64
    sums = (part if dim == 0 else part.movedim(-1, 0)).reshape(values.shape[dim], -1).sum(1, dtype=torch.float64).cpu()
    own = index >= 0
    return torch.zeros(size, dtype=torch.float64).index_add_(0, index[own], sums[own])


def carriers(group: ChannelGroup) -> dict[str, int]:
    """Parameters on the output side of a group (all of its parameters where none is), with the dimension."""
    producing = {place.parameter: place.dim for place in reversed(group.places) if place.parameter in group.producers}
    return producing or {place.parameter: place.dim for place in reversed(group.places)}


def channel_index(problem: Problem, name: str, dim: int, axis: Axis, kept: Mapping[Axis, Tensor]) -> Tensor:
    """For every position that a sub-network keeps of a parameter's dimension, the channel of `axis`, −1 for none."""
    expr = problem.traced.weight_dims()[name][dim]
    return membership(expr, axis)[positions(expr, kept)]
