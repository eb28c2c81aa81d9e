"""One width ratio for all groups: the largest that the budget allows."""

from ekgfx.graph.plan import Plan
from ekgfx.search.candidates import important_first
from ekgfx.search.importance import Criterion, Scores
from ekgfx.search.problem import Problem
from ekgfx.search.recorder import Recorder
from ekgfx.search.thresholds import largest_within

WIDTHS = 4096
"""Ratios that are told apart."""


def run(problem: Problem, criterion: Criterion, recorder: Recorder) -> None:
    """Keep the same share of the most important channels in every group; one step, recorded."""
    if recorder.steps:  # it was done before
        return
    scores = criterion(problem, problem.full(), problem.at_once)

    def cut(ratio: int) -> Plan:
        return at_width(problem, scores, ratio / WIDTHS)

    recorder.go(largest_within(problem, cut, WIDTHS))


def at_width(problem: Problem, scores: Scores, width: float) -> Plan:
    """Every group at one width ratio."""
    plan = problem.full()
    for group, rule in problem.rules.items():
        orders = {g: important_first(range(len(scores[g])), scores[g]) for g in problem.of(group)}
        plan = problem.cut(plan, group, orders, rule.kept(width))
    return plan
