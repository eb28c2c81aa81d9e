"""One step of the search in each of the ways that are compared, with time and memory."""

import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ekgfx.execution.subnetwork import kernel_names
from ekgfx.graph.plan import Plan
from ekgfx.search.candidates import worth_evaluating
from ekgfx.search.details import PAPER
from ekgfx.search.ekg import Pace, State, combine, keeper_of, propose
from ekgfx.search.forks import Forks
from ekgfx.search.importance import taylor
from ekgfx.search.problem import Computing, Problem
from ekgfx.search.race import Outcome, evaluate_candidates
from ekgfx.search.ranking import ranking_of
from ekgfx.search.reward import assess
from ekgfx.surgery.masked import MaskedNetwork, mask_tensor
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.evaluation import batch_statistics

WAYS = ("masked", "sliced", "prefixes", "contiguous", "all")
PACE = Pace()
"""The paper's: one group a step."""


def in_the_way(way: str, problem: Problem, early_stop: bool = True) -> Problem:
    """The problem as it is computed in one of the ways."""
    computing = {
        "contiguous": Computing(early_stop=early_stop),
        "all": Computing(early_stop=early_stop, channels_last=True),
    }.get(way, Computing(cache=0))
    return replace(problem, computing=computing, batches=tuple(map(computing.prepared, problem.batches)))


def timed(
    problem: Problem, state: State, way: str, pace: Pace = PACE, early_stop: bool = True, every: int = 1
) -> dict[str, Any]:
    """Seconds of the step from `state` by its parts, the candidates' −ℛ by group, and what is removed.

    importance: scores of all channels. candidate: mean over those evaluated. accepted: the network that the step goes
    to, evaluated again. every: of masked and sliced candidates, only each n-th is evaluated.
    """
    problem, plan, knowledge = in_the_way(way, problem, early_stop), state.plan, state.knowledge
    forks = Forks(problem.traced)
    keeper = keeper_of(problem, forks, state)
    start = clock(problem.traced)
    scores = taylor(problem, problem.full() if way == "masked" else plan, knowledge, keeper)
    importance = clock(problem.traced) - start
    if way == "masked":  # that of the uncut network takes as long; whom to remove is decided as in the others
        scores = taylor(problem, plan, knowledge)
    found = [propose(problem, state, group, scores, pace, PAPER) for group in problem.rules]
    proposals = [proposal for proposal in found if proposal is not None]
    chosen, _ = worth_evaluating(proposals, {proposal.group: proposal.lost for proposal in proposals})
    sample = chosen[::every] if way in ("masked", "sliced") else chosen
    pairs = [(proposal.group, proposal.plan) for proposal in sample]
    ranking = ranking_of(problem, plan, knowledge)
    start = clock(problem.traced)
    if way == "masked":
        outcomes = [Outcome(masked(problem, candidate, knowledge)) for _, candidate in pairs]
    elif way == "sliced":
        outcomes = [
            Outcome(assess(problem.network(candidate), problem.batches, problem.objective, knowledge)[0])
            for _, candidate in pairs
        ]
    else:
        outcomes = evaluate_candidates(
            problem, forks, plan, pairs, knowledge, ranking=ranking, accept=pace.accept, kept=keeper.kept
        )
    candidate = (clock(problem.traced) - start) / len(pairs)
    best = ranking.best([proposal.plan for proposal in sample], [o.negative for o in outcomes], pace.accept)
    taken = combine(problem, state, [sample[i] for i in best], scores, pace, PAPER)
    start = clock(problem.traced)
    if way == "masked":
        masked(problem, taken[-1].plan, knowledge)
    elif way in ("sliced", "prefixes") or len(taken) > 1:  # or what is known of the best is used
        assess(problem.network(taken[-1].plan), problem.batches, problem.objective, knowledge)
    accepted = clock(problem.traced) - start
    negatives = {
        group: None if outcome.evaluation is None else -outcome.evaluation.reward
        for (group, _), outcome in zip(pairs, outcomes, strict=True)
    }
    return {
        "importance": importance,
        "candidate": candidate,
        "accepted": accepted,
        "candidates": len(chosen),
        "step": importance + candidate * len(chosen) + accepted,
        "stopped": sum(value is None for value in negatives.values()),
        "negatives": negatives,
        "removed": {group: list(cut) for proposal in taken for group, cut in proposal.removed.items()},
    }


def masked(problem: Problem, plan: Plan, knowledge: Any) -> Any:
    """A candidate in the authors' way: the model itself at full size, its cut weights zero."""
    traced = problem.traced
    kept = traced.groups.kept(plan)
    if not problem.rescale:  # no BatchNorm; layer norms over masked channels need the graph
        return assess(MaskedNetwork(traced, kept), problem.batches, problem.objective, knowledge)[0]
    kernels, weights = kernel_names(traced), {}
    for name, dims in traced.weight_dims().items():
        full = traced.tensor(name)
        cut = mask_tensor(full, dims, kept)
        if cut is not full:
            weights[name] = cut * (full.norm() / cut.norm().clamp_min(1e-12)) if name in kernels else cut

    def network(*inputs: Tensor) -> Any:
        return torch.func.functional_call(traced.model, weights, inputs)

    with batch_statistics(traced.model):
        return assess(network, problem.batches, problem.objective, knowledge)[0]


def clock(traced: TracedModel) -> float:
    """CPU seconds of this process; on a GPU wall seconds, when it is done with what it was given."""
    device = next(traced.model.parameters()).device
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
