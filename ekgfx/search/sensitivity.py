"""What each group costs when it alone is cut: the first thing to know of a network before it is pruned."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ekgfx.base.markup import html_table
from ekgfx.base.units import fraction_of, percent
from ekgfx.errors import DataError, RecipeError
from ekgfx.execution.channels_last import quicker_channels_last
from ekgfx.execution.subnetwork import has_batch_norm
from ekgfx.graph.arguments import check_inputs
from ekgfx.graph.plan import Plan
from ekgfx.search import find_budget
from ekgfx.search.candidates import important_first
from ekgfx.search.company import check_mixed
from ekgfx.search.criteria import IMPORTANCE
from ekgfx.search.cuts import Key, OnCut, Worth, judged, repaired
from ekgfx.search.ignore import Ignored, as_patterns, ignored_groups
from ekgfx.search.importance import Criterion
from ekgfx.search.own import checked_criterion, name_of
from ekgfx.search.problem import Computing, Problem, tied_rules
from ekgfx.search.reward import Objective, ValidationBatch, assess, label_free, validation_batches
from ekgfx.surgery.tied import ties_of
from ekgfx.tracing.traced import TracedModel, check_traced
from ekgfx.training.loss import cross_entropy
from ekgfx.training.outputs import Logits, finder, logits_of

SHARES = (0.75, 0.5, 0.25)

Measured = Literal["accuracy", "disagreement", "error"]


@dataclass(frozen=True)
class Cut:
    """A network in which one group alone is cut. share: of its channels, as asked; kept: how many that is; macs (per
    sample) and params: of the whole network."""

    share: float
    kept: int
    macs: int
    params: int
    worth: Worth


@dataclass(frozen=True)
class GroupCost:
    """A group (or several that shrink together), its size, and its cuts, the widest first. lost: what the cuts cost on
    average, see `Sensitivity.measure`."""

    name: str
    groups: tuple[str, ...]
    size: int
    cuts: tuple[Cut, ...]
    lost: float


@dataclass(frozen=True)
class Sensitivity:
    """What every group costs, the one that costs most first.

    measure: what `lost` is of: the "accuracy" lost where there are labels, else "disagreement" with the unpruned
    network, or the "error" where there are no classes. unpruned: the network before any cut; macs, params: its cost.
    repaired: whether cuts were refitted. importance: what chose the channels. images: chosen and refitted on; judged:
    images that the figures are of.
    """

    measure: Measured
    unpruned: Worth
    macs: int
    params: int
    groups: tuple[GroupCost, ...]
    repaired: bool
    importance: str
    images: int
    judged: int
    seconds: float

    @property
    def shares(self) -> tuple[float, ...]:
        """The shares that groups were cut to, the widest first."""
        return tuple(cut.share for cut in self.groups[0].cuts)

    def value(self, worth: Worth) -> float:
        """What is shown of a network: its accuracy or agreement, else its error."""
        shown = {"accuracy": worth.accuracy, "disagreement": worth.agreement}.get(self.measure, worth.error)
        assert shown is not None
        return shown

    def text(self, worth: Worth) -> str:
        """The same, written."""
        return f"{self.value(worth):.4g}" if self.measure == "error" else percent(self.value(worth))

    def rows(self) -> list[tuple[str, ...]]:
        """A line for each group: its name, its channels, and what the network is worth at each share."""
        return [(group.name, str(group.size), *(self.text(cut.worth) for cut in group.cuts)) for group in self.groups]

    @property
    def columns(self) -> tuple[str, ...]:
        """What stands above the rows."""
        return ("group", "channels", *(f"{share:.0%} kept" for share in self.shares))

    def __str__(self) -> str:
        table = [self.columns, *self.rows()]
        wide = [max(len(row[column]) for row in table) for column in range(len(self.columns))]
        return "\n".join(
            "  ".join([row[0].ljust(wide[0]), *(cell.rjust(w) for cell, w in zip(row[1:], wide[1:], strict=True))])
            for row in table
        )

    def __repr__(self) -> str:
        return f"Sensitivity({len(self.groups)} groups; {self.caption})"

    def _repr_html_(self) -> str:
        return html_table(self.columns, self.rows(), caption=self.caption)

    @property
    def shown(self) -> str:
        """What the figures are."""
        said = {"accuracy": "accuracy", "disagreement": "agreement with the unpruned network"}
        return said.get(self.measure, "error")

    @property
    def caption(self) -> str:
        """The same, of what, in a line."""
        return (
            f"{self.shown} on {self.judged} images where one group alone is cut"
            f"{' and the network repaired' * self.repaired}; unpruned {self.text(self.unpruned)}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists and numbers."""
        return asdict(self)


def sensitivity(
    traced: TracedModel,
    batches: Iterable[Any],
    test: Iterable[Any] | None = None,
    *,
    shares: Sequence[float | str] = SHARES,
    repair: bool = False,
    importance: str | Criterion = "taylor",
    ignore: Ignored | Sequence[Ignored] = (),
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    logits: Logits = logits_of,
    seed: int = 0,
    on_cut: OnCut | None = None,
) -> Sensitivity:
    """What each group costs when it alone is cut. The channels that stay are those that a uniform search would keep.

    Args:
        traced: the model; it is not changed.
        batches: what channels are chosen (and repairs fitted) on, with labels or without, as `search` takes them.
        test: others that the cuts are judged on; None judges on the same, which flatters the cuts. Each batch should
            mix the classes, in both.
        shares: of its channels that a group is cut to: 0.5 or "50%".
        repair: cut for real, refit each cut network (`ekgfx.repair`), and judge it with its running statistics.
            Without, BatchNorm takes the batch's statistics, as in a search; that takes a fraction of the time.
        importance: which channels stay, as in `search`.
        ignore: groups, parameters or modules that are left alone.
        loss: the label loss, as in `search`.
        logits: where the logits are in the model's output, as in `search`.
        seed: of networks that draw random numbers, of "random", and of repairs.
        on_cut: called with the number of cuts that are done, and of all.

    Raises:
        DataError: there are no batches, or they don't fit the model.
        PlanError: nothing can be cut, or an ignore pattern matches nothing.
        RecipeError: a share that is no fraction, or an unknown importance.

    Returns:
        The cost of each cut of each group; printed, a table with the group that costs most first.

    Example:
        >>> print(ekgfx.sensitivity(traced, batches, shares=(0.5,)))
    """
    began = time.monotonic()
    check_traced(traced, "sensitivity")
    asked = _shares(shares)
    if isinstance(importance, str) and importance not in IMPORTANCE:
        raise RecipeError(f"unknown importance {importance!r}; use one of {', '.join(IMPORTANCE)}")
    criterion = IMPORTANCE[importance] if isinstance(importance, str) else checked_criterion(importance)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        problem = _problem(traced, Objective(loss, finder(logits)), ignore, seed)
        given = _prepared(problem, batches, "batches")
        held = given if test is None else _prepared(problem, test, "test")
        problem = _measured(replace(problem, batches=given))
        scores = criterion(problem, problem.full(), problem.at_once)
        plans: dict[Key, Plan] = {}
        for unit, rule in problem.rules.items():
            orders = {group: important_first(range(len(scores[group])), scores[group]) for group in problem.of(unit)}
            plans |= {(unit, share): problem.cut(problem.full(), unit, orders, rule.kept(share)) for share in asked}
        real = {
            key: plan for key, plan in plans.items() if problem.positions(plan, key[0]) < problem.rules[key[0]].size
        }
        unpruned, found = (repaired if repair else judged)(problem, held, real, on_cut or (lambda done, total: None))
    measure: Measured = "error" if unpruned.agreement is None else "disagreement"
    if unpruned.accuracy is not None:
        measure = "accuracy"
    groups = []
    for unit, rule in problem.rules.items():
        cuts = []
        for share in asked:
            plan, cost = plans[unit, share], traced.cost(plans[unit, share])
            worth = found.get((unit, share), unpruned)
            cuts.append(Cut(share, problem.positions(plan, unit), cost.macs, cost.params, worth))
        lost = sum(_lost(unpruned, cut.worth) for cut in cuts) / len(cuts)
        groups.append(GroupCost(unit, tuple(problem.of(unit)), rule.size, tuple(cuts), lost))
    cost = traced.cost()
    return Sensitivity(
        measure=measure,
        unpruned=unpruned,
        macs=cost.macs,
        params=cost.params,
        groups=tuple(sorted(groups, key=lambda group: (-group.lost, -sum(cut.worth.error for cut in group.cuts)))),
        repaired=repair,
        importance=name_of(importance),
        images=sum(batch.samples for batch in given),
        judged=sum(batch.samples for batch in held),
        seconds=round(time.monotonic() - began, 2),
    )


def _lost(unpruned: Worth, worth: Worth) -> float:
    """What a cut costs."""
    if unpruned.accuracy is not None and worth.accuracy is not None:
        return unpruned.accuracy - worth.accuracy
    return worth.error if worth.agreement is None else 1.0 - worth.agreement


def _shares(shares: Sequence[float | str]) -> tuple[float, ...]:
    """The shares as fractions, the widest first."""
    found = {fraction_of(share) for share in ([shares] if isinstance(shares, float | str) else shares)}
    for share in found:
        if not isinstance(share, float) or not 0 < share < 1:
            raise RecipeError(f"share {share!r}: use fractions of the channels to keep, between 0 and 1, such as 0.5")
    if not found:
        raise RecipeError("no shares: give fractions of the channels to keep, such as (0.75, 0.5, 0.25)")
    return tuple(sorted((share for share in found if share is not None), reverse=True))


def _problem(traced: TracedModel, objective: Objective, ignore: Ignored | Sequence[Ignored], seed: int) -> Problem:
    """The units that may be cut. BudgetError where there are none."""
    ignored = ignored_groups(traced.groups, as_patterns(traced, ignore))
    rules, members = tied_rules(traced, ties_of(traced, False), ignored, 1, 0.0)
    problem = Problem(
        traced=traced,
        batches=(),
        objective=objective,
        budget=find_budget(traced, flops=0.5),  # nobody asks
        rules=rules,
        guided=False,
        ensemble=False,
        rescale=has_batch_norm(traced),
        computing=Computing(channels_last=quicker_channels_last(traced.model)),
        seed=seed,
        members=members,
    )
    if not rules:
        problem.check_reachable()
    return problem


def _prepared(problem: Problem, batches: Iterable[Any], name: str) -> tuple[ValidationBatch, ...]:
    """Batches as the model takes them. DataError where there are none, or they don't fit."""
    found = tuple(map(problem.computing.prepared, validation_batches(batches, problem.traced.model)))
    if not found:
        raise DataError(f"sensitivity: {name} holds no batch; give a list of (images, labels), or of images")
    for batch in found:
        check_inputs(problem.traced, *batch.inputs)
    return found


def _measured(problem: Problem) -> Problem:
    """With labels where there are none, and the unpruned network's logits; said where batches are sorted by class."""
    network, objective, given = problem.network(problem.full()), problem.objective, problem.batches
    if given[0].target is None:
        if objective.loss is not cross_entropy:
            raise DataError("a loss of your own needs targets, and the batches have none")
        problem = replace(problem, batches=label_free(network, given, objective))
    _, logits = assess(network, problem.batches, objective, None, check=True)
    problem = replace(problem, unpruned=logits)
    check_mixed(problem, given)
    return problem
