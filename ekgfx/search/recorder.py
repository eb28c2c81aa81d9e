"""Keeps the history of a search: numbers its steps, times them, and tells the user."""

import time
from collections.abc import Callable, Mapping, Sequence

from ekgfx.graph.plan import Plan
from ekgfx.search.problem import Problem
from ekgfx.search.result import Candidate, Step
from ekgfx.search.reward import Evaluation


class Recorder:
    """The steps so far. on_step: called with every new step."""

    def __init__(self, problem: Problem, on_step: Callable[[Step], None] | None) -> None:
        self.problem, self.on_step = problem, on_step
        self.steps: list[Step] = []
        self._since = time.monotonic()

    def again(self, step: Step) -> None:
        """Take in a step of an earlier, interrupted search."""
        self.steps.append(step)
        self._since = time.monotonic()

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
            eta=spent * max(fraction - self.problem.budget.keep, 0.0) / max(1.0 - fraction, 1e-9),
        )
        self._since = now
        self.steps.append(step)
        if self.on_step is not None:
            self.on_step(step)
