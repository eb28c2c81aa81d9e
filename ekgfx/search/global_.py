"""One threshold on importance for all groups: the channels that matter least in the whole network go first."""

import torch

from ekgfx.graph.plan import Plan
from ekgfx.search.candidates import important_first
from ekgfx.search.importance import Criterion, Scores
from ekgfx.search.problem import Problem
from ekgfx.search.recorder import Recorder
from ekgfx.search.thresholds import largest_within


def run(problem: Problem, criterion: Criterion, recorder: Recorder) -> None:
    """Rank the channels of all groups together and keep the first, as many as the budget allows; one recorded step."""
    if recorder.steps:  # it was done before
        return
    scores = criterion(problem, problem.full(), problem.at_once)
    ranked = torch.cat([scores[group] for group in problem.groups]).sort(descending=True).values.tolist()

    def cut(count: int) -> Plan:
        return above(problem, scores, ranked[count - 1] if count else float("inf"))

    recorder.go(largest_within(problem, cut, len(ranked)))


def above(problem: Problem, scores: Scores, threshold: float) -> Plan:
    """Every group with the channels whose importance reaches `threshold`, rounded up to an allowed width."""
    plan = problem.full()
    for group, rule in problem.rules.items():
        orders = {g: important_first(range(len(scores[g])), scores[g]) for g in problem.of(group)}
        reached = sum(int((scores[g] >= threshold).sum()) for g in orders)
        plan = problem.cut(plan, group, orders, rule.kept(reached / sum(map(len, orders.values()))))
    return plan
