"""Keeps the history of a search: numbers its steps, times them, and tells the user."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ekgfx.graph.plan import Plan
from ekgfx.search.problem import Budget, Problem
from ekgfx.search.result import Candidate, Step, apply_step
from ekgfx.search.reward import Evaluation, assess


class Recorder:
    """The steps so far, and where they lead: `plan`. In a search to several budgets, those to the tightest, and beside
    it the recorders of the `others`.

    on_step: called with every new step. history: the steps of an earlier, interrupted search. others: further budgets,
    by label. towards: the label of this one's, where it is one of those.

    Raises PlanError when the history removes channels that the model does not have.
    """

    def __init__(
        self,
        problem: Problem,
        on_step: Callable[[Step], None] | None = None,
        history: Sequence[Step] = (),
        others: Mapping[str, Budget] | None = None,
        towards: str | None = None,
    ) -> None:
        self.problem, self.on_step, self.others, self.towards = problem, on_step, others or {}, towards
        self.steps = [step for step in history if step.towards in (None, towards)]
        self.plan, self.ways = problem.full(), dict[str, Way]()
        self._begun = [step for step in history if step.towards not in (None, towards)]
        self._sizes = {name: group.size for name, group in problem.traced.groups.items()}
        for step in self.steps:
            self.plan = apply_step(self.plan, step, self._sizes)
        self._since = time.monotonic()

    def begun(self, label: str) -> int | None:
        """After how many steps an earlier, interrupted search left this way for another budget; None where it did
        not."""
        return next((step.number - 1 for step in self._begun if step.towards == label), None)

    def leave(self, label: str, along: int) -> "Recorder":
        """The recorder of another budget, whose way has the first `along` steps in common with this one."""
        problem = replace(self.problem, budget=self.others[label])
        own = [step for step in self._begun if step.towards == label]
        recorder = Recorder(problem, self.on_step, [*self.steps[:along], *own], towards=label)
        self.ways[label] = Way(along, recorder)
        return recorder

    def resumed(self) -> None:
        """The history is taken in, and the time of the next step begins."""
        self._since = time.monotonic()

    def skip(self, began: float) -> None:
        """The time since `began` (`time.monotonic`) is no step's."""
        self._since += time.monotonic() - began

    def go(self, plan: Plan) -> None:
        """Record the step from the current plan to `plan`, measured where there are validation data."""
        removed, widths = {}, {}
        for group in self.problem.groups:
            before, after = self.problem.kept(self.plan, group), set(self.problem.kept(plan, group))
            removed[group] = tuple(channel for channel in before if channel not in after)
            widths[group] = len(after) / self.problem.traced.groups[group].size
        evaluation, asked = None, self.problem
        if asked.batches:
            evaluation, _ = assess(asked.network(plan), asked.batches, asked.objective, asked.at_once)
        self.accept(plan, removed=removed, widths=widths, evaluation=evaluation)

    def accept(
        self,
        plan: Plan,
        *,
        removed: Mapping[str, tuple[int, ...]],
        widths: Mapping[str, float],
        evaluation: Evaluation | None,
        candidates: Sequence[Candidate] = (),
        threshold: float | None = None,
    ) -> None:
        """Record the step to `plan`, and tell the user."""
        dropped = tuple(name for name in plan.dropped if name not in self.plan.dropped)
        now = time.monotonic()
        fraction = self.problem.budget.fraction(plan)
        seconds = now - self._since
        spent = sum(step.seconds for step in self.steps) + seconds
        step = Step(
            number=len(self.steps) + 1,
            removed=removed,
            widths=widths,
            measure=self.problem.measure(plan, evaluation),
            kept_fraction=fraction,
            candidates=tuple(candidates),
            threshold=threshold,
            seconds=seconds,
            towards=self.towards,
            dropped=dropped,
            eta=spent * max(fraction - self.problem.budget.keep, 0.0) / max(1.0 - fraction, 1e-9),
        )
        self._since = now
        self.plan = plan
        self.steps.append(step)
        if self.on_step is not None:
            self.on_step(step)


class Way(NamedTuple):
    """The way to another budget. along: steps in common with the way to the tightest."""

    along: int
    recorder: Recorder
