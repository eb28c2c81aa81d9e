"""Importance of every channel: how much the reward would change without it (eq. 9)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ekgfx.axes import Axis, axes, membership, positions
from ekgfx.data.base import generator
from ekgfx.distributed.team import team
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.groups import ChannelGroup
from ekgfx.graph.plan import Plan
from ekgfx.search.forks import Keeper
from ekgfx.search.own import check_gradient
from ekgfx.search.problem import Problem
from ekgfx.search.reward import Knowledge

Scores = dict[str, Tensor]
"""Importance per group: float64, one value for every channel of the uncut group, 0 where it is already removed."""

PRODUCTS = 1 << 17
"""Values that are multiplied at once on the CPU."""

Criterion = Callable[[Problem, Plan, Knowledge | None], Scores]
"""Scores the channels of the current sub-network, given its plan and the knowledge T."""

Keeping = TypeVar("Keeping", bound=Callable[..., Scores])


def keeping(criterion: Keeping) -> Keeping:
    """Marks a criterion that runs the sub-network on every batch: it takes a `Keeper` as its fourth argument, and shows
    it the values that the candidates of the step go on from."""
    vars(criterion)["keeps"] = True
    return criterion


def scored(criterion: Criterion, problem: Problem, plan: Plan, knowledge: Knowledge | None, keeper: Keeper) -> Scores:
    """What a criterion says; one that can fills the keeper."""
    return criterion(problem, plan, knowledge, *((keeper,) if getattr(criterion, "keeps", False) else ()))


@keeping
def taylor(
    problem: Problem,
    plan: Plan,
    knowledge: Knowledge | None,
    keeper: Keeper | None = None,
    *,
    per_sample: bool = False,
) -> Scores:
    """S_c = Σ_batches Σ_places |Σ_{batch, space} (∂ℛ/∂y_c)·y_c| at the activations that carry the group (eq. 9).

    A group that no activation carries takes Σ |∂ℛ/∂θ·θ| over its parameters instead, summed per channel.
    keeper: takes values of the forward passes, which are those of the sub-network's evaluation.
    per_sample: see `taylor_per_sample`.
    """
    network = problem.network(plan)
    if problem.computing.amp == "fp16":
        network.amp, keeper = None, None  # gradients of a mean over many pixels are below what fp16 can hold
    kept = problem.traced.groups.kept(plan)
    groups = [problem.traced.groups[name] for name in problem.groups]
    places = dict.fromkeys((gate.node, gate.dim) for group in groups for gate in group.gates)
    gates = {node for node, _ in places}
    bare = sorted({name for group in groups if not group.gates for name in carriers(group)})
    differentiable(network, bare).sources = gates
    owners = team().owners([batch.samples for batch in problem.batches])
    found = [torch.zeros(sum(group.size for group in groups), dtype=torch.float64) for _ in owners]
    for number, batch in enumerate(problem.batches):
        if owners[number] != team().rank:
            continue
        scores = dict(zip((g.name for g in groups), found[number].split([g.size for g in groups]), strict=True))
        with torch.enable_grad():
            output, values = network.run(*batch.inputs, capture=gates if keeper is None else gates | keeper.wanted)
            target = None if knowledge is None else knowledge[number]
            negative = problem.objective.terms(output, batch.target, target)[1]
        if keeper is not None:
            keeper.take(number, values)
        rows = {p: samples_along(problem.traced, p[0], batch.samples) if per_sample else None for p in places}
        changes, gradients = changes_at(
            negative, {p: values[p[0]] for p in places}, [network.weights[n] for n in bare], rows
        )
        share = problem.objective.share(batch, problem.batches)

        for group in groups:
            for gate in group.gates:
                if (gate.node, gate.dim) in changes:
                    index = gate.index[positions(problem.traced.dims[gate.node][gate.dim], kept)]  # type: ignore[arg-type]
                    sums = changes[gate.node, gate.dim]
                    scores[group.name] += share * by_channel(sums, index, group.size).abs().sum(0)
            for name, dim in carriers(group).items() if not group.gates else ():
                gradient = gradients[bare.index(name)]
                if gradient is not None:
                    index = channel_index(problem, name, dim, group.axis, kept)
                    change = (gradient * network.weights[name].detach()).abs()
                    sums = over_samples(by_sample(change, dim), dim).cpu()
                    scores[group.name] += share * by_channel(sums[None], index, group.size)[0]
    whole = sum(team().all_reduce(torch.stack(found)))  # batch after batch, whoever computed them
    assert isinstance(whole, Tensor)
    return dict(zip((g.name for g in groups), whole.split([g.size for g in groups]), strict=True))


@keeping
def taylor_per_sample(
    problem: Problem, plan: Plan, knowledge: Knowledge | None, keeper: Keeper | None = None
) -> Scores:
    """S_c = Σ_samples Σ_places |Σ_space (∂ℛ/∂y_c)·y_c|: as `taylor`, but what a channel does to one sample is not made
    up for by what it does to another.

    The sum over samples is how ℛ changes with the channel's scale. Training has brought that to about zero, whatever
    the channel is worth. Source: Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient
    Inference (ICLR 2017), whose criterion is the mean of the absolute values.
    """
    return taylor(problem, plan, knowledge, keeper, per_sample=True)


def at_random(problem: Problem, plan: Plan, knowledge: Knowledge | None) -> Scores:
    """The baseline of every comparison: numbers drawn once for all channels, the same at every step of a search."""
    draw = generator(problem.seed, 4)
    drawn = {
        group.name: torch.rand(group.size, dtype=torch.float64, generator=draw)
        for group in problem.traced.groups.values()
    }
    return {name: drawn[name] for name in problem.groups}


Activation = tuple[str, int]
"""An activation and one of its dimensions."""

Rows = tuple[int, int, int]
"""Where the samples of an activation are: their dimension, their number, and neighbouring positions of one sample."""


def samples_along(graph: AxisGraph, node: str, samples: int) -> Rows | None:
    """Where an activation's samples are; None for one that has none, which is the same for all of them."""
    for d, dim in enumerate(graph.dims.get(node, ())):
        if graph.batch in axes(dim):
            index = membership(dim, graph.batch)
            return d, samples, int((index == index[0]).cummin(0).values.sum())
    return None


def changes_at(
    negative: Tensor,
    places: Mapping[Activation, Tensor],
    others: Sequence[Tensor],
    rows: Mapping[Activation, Rows | None] | None = None,
) -> tuple[dict[Activation, Tensor], Sequence[Tensor | None]]:
    """Σ (∂ℛ/∂y)·y for every position along a dimension of an activation y, for all places that ℛ depends on: 1 ×
    positions, or rows × positions where `rows` says which sums are taken by themselves; float64, on the CPU. And the
    gradients of `others`.

    The gradient of an activation is looked at when it comes by, while it is in the cache, and is not kept: all of them
    together would take as much memory as the activations do.
    """
    sums: dict[Activation, Tensor] = {}
    values = {id(value): value for value in places.values() if value.requires_grad}  # two nodes may have one value

    def look(value: Tensor, gradient: Tensor) -> None:
        for place, other in places.items():
            if other is value:
                apart = None if rows is None else rows[place]
                if apart is None:
                    sums[place] = products_along(gradient, value.detach(), place[1])[None]
                else:
                    sums[place] = products_apart(gradient * value.detach(), place[1], apart)

    ends = [value for value in values.values() if value.is_leaf]
    hooks = [value.register_hook(partial(look, value)) for value in values.values() if not value.is_leaf]
    check_gradient(negative)
    gradients = torch.autograd.grad(negative, [*ends, *others], allow_unused=True)
    for hook in hooks:
        hook.remove()  # it holds the value that holds it
    for value, gradient in zip(ends, gradients, strict=False):
        if gradient is not None:
            look(value, gradient)
    shapes = [each.shape for each in sums.values()]
    flat = [negative.new_zeros(0, dtype=torch.float64), *(each.flatten() for each in sums.values())]
    found = torch.cat(flat).cpu().split([shape.numel() for shape in shapes])  # the device is asked once
    tables = [each.view(shape) for each, shape in zip(found, shapes, strict=True)]
    return dict(zip(sums, tables, strict=True)), gradients[len(ends) :]


def differentiable(network: SubNetwork, names: Iterable[str]) -> SubNetwork:
    """The same network on copies of its weights that gradients are taken of, of those in `names` alone, whatever the
    model's own ask for."""
    asked = set(names)
    network.weights = {name: weight.detach().requires_grad_(name in asked) for name, weight in network.weights.items()}
    return network


def products_along(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Σ a·b for every position along `dim`, in float64. On the CPU part by part, whose products stay in its cache."""
    rows = max(1, PRODUCTS * len(a) // max(a.numel(), 1)) if a.device.type == "cpu" else max(1, len(a))
    parts = [by_sample(x * y, dim) for x, y in zip(a.split(rows), b.split(rows), strict=True)]
    return over_samples(parts[0] if len(parts) == 1 else torch.cat(parts), dim)


def products_apart(products: Tensor, dim: int, rows: Rows) -> Tensor:
    """Sums of the products over all but samples and `dim`: samples × positions along `dim`, in float64."""
    at, samples, run = rows
    rest = [d for d in range(products.dim()) if d not in (at, dim)]
    table = (products.sum(rest) if rest else products).to(torch.float64)
    table = table if at < dim else table.T
    return table.reshape(-1, samples, run, table.shape[1]).sum((0, 2))


def by_sample(values: Tensor, dim: int) -> Tensor:
    """Sums over everything but samples and `dim`, in the values' own precision, which is quick."""
    rest = [d for d in range(1, values.dim()) if d != dim]
    return values.sum(rest) if rest else values


def over_samples(part: Tensor, dim: int) -> Tensor:
    """The sums of `by_sample` added up, in float64, for every position along `dim`."""
    positions = part if dim == 0 else part.movedim(-1, 0)
    return positions.reshape(len(positions), -1).sum(1, dtype=torch.float64)


def by_channel(sums: Tensor, index: Tensor, size: int) -> Tensor:
    """Rows of the sums of positions as rows of those of channels. index: channel of each position, −1 for none."""
    own = index >= 0
    return torch.zeros(len(sums), size, dtype=torch.float64).index_add_(1, index[own], sums[:, own])


def carriers(group: ChannelGroup) -> dict[str, int]:
    """Parameters on the output side of a group (all of its parameters where none is), with the dimension."""
    producing = {place.parameter: place.dim for place in reversed(group.places) if place.parameter in group.producers}
    return producing or {place.parameter: place.dim for place in reversed(group.places)}


def channel_index(problem: Problem, name: str, dim: int, axis: Axis, kept: Mapping[Axis, Tensor]) -> Tensor:
    """For every position that a sub-network keeps of a parameter's dimension, the channel of `axis`, −1 for none."""
    expr = problem.traced.weight_dims()[name][dim]
    return membership(expr, axis)[positions(expr, kept)]
