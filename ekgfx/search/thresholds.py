"""What the one-step strategies share: a family of plans by size, and the largest of them within the budget."""

from collections.abc import Callable

from ekgfx.graph.plan import Plan
from ekgfx.search.problem import Problem
from ekgfx.search.recorder import Recorder
from ekgfx.search.reward import evaluate
from ekgfx.search.widths import last_width


def largest_within(problem: Problem, cut: Callable[[int], Plan], sizes: int) -> Plan:
    """The largest of the plans cut(0) ⊂ cut(1) ⊂ … ⊂ cut(sizes) within the budget; cut(0) is known to be."""
    return cut(last_width(range(sizes + 1), lambda size: problem.budget.met(cut(size))))


def record_single_step(problem: Problem, recorder: Recorder, plan: Plan) -> None:
    """Record the way from the unpruned network to `plan` as one step, measured where there is validation data."""
    removed, widths = {}, {}
    for group in problem.groups:
        kept, size = set(problem.kept(plan, group)), problem.traced.groups[group].size
        widths[group] = len(kept) / size
        removed[group] = tuple(channel for channel in range(size) if channel not in kept)
    evaluation = None
    if problem.batches:
        evaluation, _ = evaluate(problem.network(plan), problem.batches, problem.objective, None)
    recorder.accept(plan, removed=removed, widths=widths, evaluation=evaluation)
