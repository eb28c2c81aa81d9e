"""What a search leaves behind: the plan, and the history of the sub-networks it went through; all of it JSON-able."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Self

from ekgfx.base.schema import read, show
from ekgfx.errors import PlanError
from ekgfx.graph.plan import Plan
from ekgfx.search.shown import Widths, html_of, line_of, plot
from ekgfx.settings.budgets import label_of, which

MOST_CHANNELS = 2**20
"""More than any layer has: a group that claims more is damage."""


@dataclass(frozen=True)
class Measure:
    """A sub-network on the validation data. loss: label loss per sample; reward: ℛ of eq. 4 (higher is better); both
    None where the search saw no data. accuracy: fraction of right classes, None where the targets are not classes.
    macs (per sample) and params: its cost."""

    loss: float | None
    reward: float | None
    accuracy: float | None
    macs: int
    params: int


@dataclass(frozen=True)
class Candidate:
    """One sub-network that a step could have gone to: `group` cut to `kept` channels (width ratio `width`).

    at_least: where its evaluation was left early because it could not be the best any more, what −ℛ was found to be at
    least; the measure then has its cost alone. None for all others.
    """

    group: str
    width: float
    kept: int
    measure: Measure
    at_least: float | None = None


@dataclass(frozen=True)
class Step:
    """One accepted step of a search: Θᵢ → Θᵢ₊₁.

    number: i + 1. removed: the channels this step takes away, per group. widths: the width ratio of those groups
    afterwards. measure: of the new sub-network; kept_fraction: its cost over that of the unpruned model, in the
    budget's unit. candidates: what was evaluated. threshold: of the candidate filter, None where nothing was filtered.
    seconds: this step; eta: seconds until the budget at the pace so far (an estimate). towards: in a search to several
    budgets, the one whose way has left that to the tightest, on which all others steps are ("flops=0.75"). dropped: the
    residual blocks that this step drops.
    """

    number: int
    removed: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, float]
    measure: Measure
    kept_fraction: float
    candidates: tuple[Candidate, ...] = ()
    threshold: float | None = None
    seconds: float = 0.0
    eta: float = 0.0
    towards: str | None = None
    dropped: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        told = asdict(self)
        return told if self.dropped else {key: value for key, value in told.items() if key != "dropped"}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The step that `to_json` described. Raises PlanError when fields are missing, unknown or of another type."""
        step: Self = read(cls, value, "a step of the history", PlanError)
        return step


@dataclass(frozen=True)
class Point:
    """One of several budgets of a search. asked: the budget as it was given; unit, keep: of `SearchResult.settings`.
    along: steps that its way has in common with that to the tightest budget; steps: its own after these."""

    asked: Mapping[str, float | str]
    unit: str
    keep: float
    along: int
    steps: tuple[Step, ...] = ()

    @property
    def label(self) -> str:
        """How steps, files and people name it: `flops=0.75`."""
        return label_of(self.asked)


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a search.

    full: the plan of Θ₀; sizes: channels of every group. baseline: Θ₀ measured. steps: the history,
    oldest first. settings: what was asked (budget, strategy, importance, knowledge, …), for the record. points: of a
    search to several budgets, all of them, the loosest first; the rest is then of the tightest, and `at` gives others.
    """

    full: Plan
    sizes: Mapping[str, int]
    baseline: Measure
    steps: tuple[Step, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    points: tuple[Point, ...] = ()

    def at(self, **asked: float | str) -> "SearchResult":
        """The outcome for one of several budgets: what a search to that budget alone would have found.

        Args:
            asked: the budget as it was given, such as `flops=0.75`.

        Raises:
            BudgetError: the search had no such budget.

        Example:
            >>> result = ekgfx.search(traced, batches, flops=(0.9, 0.75, 0.55))
            >>> pruned = ekgfx.prune(model, result.at(flops=0.75).plan, traced)
        """
        point = self.points[which([point.asked for point in self.points], asked)]
        steps = (*self.steps[: point.along], *(replace(step, towards=None) for step in point.steps))
        settings = {**self.settings, **point.asked, "budget": {"unit": point.unit, "keep": point.keep}}
        return replace(self, steps=steps, settings=settings, points=())

    @cached_property
    def plans(self) -> tuple[Plan, ...]:
        """Θ₀, Θ₁, … Θ*: the plan after each step, the unpruned one first."""
        plans = [self.full]
        for step in self.steps:
            plans.append(apply_step(plans[-1], step, self.sizes))
        return tuple(plans)

    @property
    def plan(self) -> Plan:
        """The plan of the final sub-network."""
        return self.plans[-1]

    @property
    def history(self) -> tuple[Step, ...]:
        """The accepted steps, oldest first."""
        return self.steps

    @property
    def widths(self) -> Widths:
        """Channels before and after of every group: `result.widths["layer1.0.conv1"]` → (64, 40)."""
        kept = self.plan.kept
        return Widths({name: (size, len(kept.get(name, range(size)))) for name, size in self.sizes.items()})

    def plot(self, axes: Any = None) -> Any:
        """Draws how the loss rose while the network shrank, and the widths along the network, as a matplotlib figure.
        axes: two to draw on; None makes them."""
        return plot(self, axes)

    def __repr__(self) -> str:
        return line_of(self)

    def _repr_html_(self) -> str:
        return html_of(self)

    @property
    def losses(self) -> tuple[float, ...]:
        """Label loss of Θ₀, Θ₁, … Θ*, as `plans`; 0 where the search saw no data."""
        return tuple(measure.loss or 0.0 for measure in (self.baseline, *(step.measure for step in self.steps)))

    @property
    def final(self) -> Measure:
        """The final sub-network, measured."""
        return self.steps[-1].measure if self.steps else self.baseline

    @property
    def kept_fraction(self) -> float:
        """Cost of the final sub-network over that of the unpruned model, in the budget's unit."""
        return self.steps[-1].kept_fraction if self.steps else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return {
            "settings": dict(self.settings),
            "baseline": asdict(self.baseline),
            "steps": [step.to_json() for step in self.steps],
            "sizes": dict(self.sizes),
            "full": json.loads(self.full.to_json()),
            **({"points": [asdict(point) for point in self.points]} if self.points else {}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The result that `to_json` described. Raises PlanError when it is damaged."""
        told: _Told = read(_Told, value, "the search's result", PlanError)
        wrong = [name for name, size in told.sizes.items() if not 0 < size <= MOST_CHANNELS]
        if wrong:
            raise PlanError(f"the search's result is damaged: {show(wrong[0])} has {told.sizes[wrong[0]]} channels")
        full = Plan.from_json(json.dumps(told.full))
        steps = as_steps(told.steps)
        if any(not 0 <= point.along <= len(steps) for point in told.points):
            raise PlanError("the search's result is damaged: a budget's way leaves another where that has no step")
        return cls(full, told.sizes, told.baseline, steps, told.settings, told.points)


@dataclass(frozen=True)
class _Told:
    """The form of `SearchResult.to_json`."""

    full: Mapping[str, Any]
    sizes: Mapping[str, int]
    baseline: Measure
    steps: Sequence[Step]
    settings: Mapping[str, Any]
    points: tuple[Point, ...] = ()


def apply_step(plan: Plan, step: Step, sizes: Mapping[str, int]) -> Plan:
    """The plan after `step`. sizes: channels of every uncut group.

    Raises PlanError when the step removes channels that `plan` does not have.
    """
    for name, removed in step.removed.items():
        kept = plan.kept.get(name, tuple(range(sizes.get(name, 0))))
        gone = set(removed)
        if not gone <= set(kept):
            raise PlanError(
                f"step {step.number} of the history removes channels of {name!r} that this model does not have; "
                "the history belongs to another model or is damaged: start the search anew"
            )
        plan = plan.with_kept(name, [channel for channel in kept if channel not in gone])
    return replace(plan, dropped=(*plan.dropped, *step.dropped)) if step.dropped else plan


def as_steps(history: Sequence[Step | Mapping[str, Any]]) -> tuple[Step, ...]:
    """A history given as steps or as their JSON, checked: numbered 1, 2, 3, …, and those towards each of several
    budgets from where they leave this way."""
    steps = tuple(step if isinstance(step, Step) else Step.from_json(step) for step in history)
    for towards in dict.fromkeys((None, *(step.towards for step in steps))):
        numbers = [step.number for step in steps if step.towards == towards]
        first = 1 if towards is None else numbers[0]
        if numbers != list(range(first, first + len(numbers))):
            raise PlanError(f"the history's steps are numbered {numbers}, not 1…{len(numbers)}; it is damaged")
    return steps
