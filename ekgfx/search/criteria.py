"""The criteria of importance by their names, and how to make one's own."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ekgfx.graph.plan import Plan
from ekgfx.search import importance_peers
from ekgfx.search.importance import Criterion, Scores, at_random, channel_index, taylor, taylor_per_sample
from ekgfx.search.importance_peers import rows_of
from ekgfx.search.least_squares import least_squares
from ekgfx.search.problem import Problem
from ekgfx.search.reward import Knowledge

IMPORTANCE: Mapping[str, Criterion] = {
    "taylor": taylor,
    "taylor-per-sample": taylor_per_sample,
    "magnitude": importance_peers.magnitude,
    "fpgm": importance_peers.fpgm,
    "bn-scale": importance_peers.bn_scale,
    "hessian": importance_peers.hessian,
    "lamp": importance_peers.lamp,
    "least-squares": least_squares,
    "random": at_random,
}
NEEDS_DATA = ("taylor", "taylor-per-sample", "hessian", "least-squares")


def of_weights(score: Callable[[Tensor], Tensor]) -> Criterion:
    """A criterion that looks at the current sub-network's weights alone.

    Args:
        score: what a parameter says of its channels. It is given the entries of every channel in a row of their own,
            kept channels × entries, and returns one value per row. A channel's importance is the sum over all
            parameters that hold a part of it.

    Example:
        >>> from ekgfx.search import of_weights
        >>> result = ekgfx.search(traced, batches, flops=0.55, importance=of_weights(lambda rows: rows.norm(dim=1)))
    """

    def criterion(problem: Problem, plan: Plan, knowledge: Knowledge | None) -> Scores:
        weights, axes_kept = problem.network(plan).weights, problem.traced.groups.kept(plan)
        scores = {}
        for name in problem.groups:
            group, kept = problem.traced.groups[name], list(problem.kept(plan, name))
            scores[name] = torch.zeros(group.size, dtype=torch.float64)
            for place in group.places:
                index = channel_index(problem, place.parameter, place.dim, group.axis, axes_kept)
                rows = rows_of(weights[place.parameter].detach(), place.dim, index)
                scores[name][kept] += score(rows).double().cpu()
        return scores

    return criterion
