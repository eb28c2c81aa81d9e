"""What the one-step strategies share: the largest plan of a family within the budget."""

from collections.abc import Callable

from ekgfx.graph.plan import Plan
from ekgfx.search.problem import Problem
from ekgfx.search.widths import last_width


def largest_within(problem: Problem, cut: Callable[[int], Plan], sizes: int) -> Plan:
    """The largest of the plans cut(0) ⊂ cut(1) ⊂ … ⊂ cut(sizes) within the budget; cut(0) is known to be."""
    return cut(last_width(range(sizes + 1), lambda size: problem.budget.met(cut(size))))
