"""Which candidates of a step are best: by the reward (eq. 3), or by what they lose of it for what they save."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ekgfx.graph.plan import Plan
from ekgfx.search.problem import Problem
from ekgfx.search.reward import Knowledge, assess

TIE = 1e-5
"""Relative difference of −ℛ that tells nothing: it is what another memory format, number of threads or device changes
by rounding in float32: 2e-6 at most over a search of ResNet-56 (docs/performance.md), with room to spare."""

Standing = Callable[[Plan, float], float]
"""What a candidate is ranked by, the least first: of its plan and −ℛ, with which it never falls."""


@dataclass(frozen=True)
class Ranking:
    """The order of the candidates of a step.

    standing: what they are ranked by. saved: what a plan saves, which decides between those whose standing is the same
    but for `tie`, relative to it. So a search hardly depends on how its candidates are computed, and of networks that
    are equally good, as where channels do nothing, it takes the smallest. Equals in both keep their order.
    """

    standing: Standing
    saved: Callable[[Plan], float]
    tie: float = TIE

    def behind(self, standing: float) -> float:
        """What stands beyond this is certainly worse than `standing`."""
        return standing + self.tie * abs(standing)

    def best(self, plans: Sequence[Plan], negatives: Sequence[float], count: int = 1) -> list[int]:
        """Positions of the `count` best, the best first; fewer where there are fewer.

        negatives: −ℛ of each; math.inf for one that cannot be among them.
        """
        standings = [self.standing(*candidate) for candidate in zip(plans, negatives, strict=True)]
        left, found = list(range(len(plans))), list[int]()
        while left and len(found) < count:
            limit = self.behind(min(standings[i] for i in left))
            found.append(max((i for i in left if standings[i] <= limit), key=lambda i: self.saved(plans[i])))
            left.remove(found[-1])
        return found


def ranking_of(problem: Problem, plan: Plan, knowledge: Knowledge | None, strict: bool = False) -> Ranking:
    """How the candidates of the step from `plan` are ranked.

    Under a budget of MACs or parameters the best has the highest reward (eq. 3), as in the paper, whose candidates are
    made to be about equally large steps. In time they are not: a step may save a tenth of the run, or nothing where
    the last tile of channels stays or a layer waits for memory, and what saves least changes the network least and
    looks best. Under a weighed budget the greedy step therefore minimises the reward lost per millisecond saved, which
    is the greedy rule for a knapsack: over the steps that a budget allows, the losses add up to the least. A candidate
    whose reward rises loses less than nothing: there more gain and more saving are both better, and they multiply. One
    that loses no more than rounding may is the better the more it saves. What a step saves beyond the budget counts for
    nothing: the last one is not taken for being large.

    strict: rewards that differ by whatever are different, and the first of equals is best, as in the authors' program.
    """
    tie, before = 0.0 if strict else TIE, problem.budget.cost(plan)

    def saved(candidate: Plan) -> float:
        return before - problem.budget.cost(candidate)

    if not problem.budget.weighed:
        return Ranking(by_reward, (lambda _: 0.0) if strict else saved, tie)
    needed = before - problem.budget.keep * problem.budget.full

    def useful(candidate: Plan) -> float:
        """What it saves, as far as the budget asks for it: nothing is gained by going beyond."""
        return min(saved(candidate), needed)

    def among_equals(candidate: Plan) -> float:
        """Of those that reach the budget, the one that goes least beyond."""
        return 0.0 if strict else useful(candidate) - max(saved(candidate) - needed, 0.0) * TIE

    now = assess(problem.network(plan), problem.batches, problem.objective, knowledge)[0].reward
    rounding = tie * abs(now)

    def by_loss_per_saving(candidate: Plan, negative: float) -> float:
        lost = now + negative
        if abs(lost) <= rounding:
            lost = rounding
        return lost / useful(candidate) if lost > 0 else lost * useful(candidate)

    return Ranking(by_loss_per_saving, among_equals, tie)


def by_reward(plan: Plan, negative: float) -> float:
    """The highest reward first."""
    return negative
