"""Evaluating a step's candidates: the first batch with all of them, the others only while a candidate can still win."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ekgfx.distributed.team import team
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.plan import Plan
from ekgfx.search.forks import Branch, Forks, Walk
from ekgfx.search.problem import Problem
from ekgfx.search.ranking import Ranking
from ekgfx.search.reward import Evaluation, Knowledge, Terms, judge, least_terms, total

Unit = tuple[int, int]
"""One candidate on one batch, by their numbers."""

Kept = Mapping[int, Mapping[str, Any]]
"""Values of the current network that were kept, by the number of the batch and by node."""


Known = dict[tuple[str, tuple[int, ...]], dict[int, Terms]]
"""The terms of candidates, by their group and what they keep of it, and by the number of the batch."""


class Outcome(NamedTuple):
    """What became of a candidate. evaluation: None for one that was left early, when its −ℛ was found to be `at_least`
    that. logits: of the best, per batch; None where there was no room to hold them."""

    evaluation: Evaluation | None
    at_least: float | None = None
    logits: tuple[Tensor, ...] | None = None

    @property
    def negative(self) -> float:
        """−ℛ, to rank by; a candidate that was left early comes after all others."""
        return math.inf if self.evaluation is None else -self.evaluation.reward


@dataclass
class Race:
    """The candidates of one step under way.

    current: the network that they differ from; branches: the candidates, and plans, theirs. kept: values of the current
    network. holding: whether the candidates' logits are held. ranking: which are best.
    """

    problem: Problem
    forks: Forks
    current: SubNetwork
    branches: Sequence[Branch]
    plans: Sequence[Plan]
    knowledge: Knowledge | None
    kept: Kept
    holding: bool
    ranking: Ranking
    terms: dict[Unit, Terms] = field(default_factory=dict)
    logits: dict[Unit, Tensor] = field(default_factory=dict)
    owners: dict[Unit, int] = field(default_factory=dict)

    def run(self, units: Iterable[Unit]) -> None:
        """Evaluates candidates on batches that they have not seen, each on one of the processes; the results are in
        `terms` on all of them, and in `logits` where they were computed."""
        mates = team()
        wanted = sorted(
            set(units) - self.terms.keys(), key=lambda unit: (unit[1], self.branches[unit[0]].fork.at, unit[0])
        )
        owners = dict(zip(wanted, mates.owners([self.effort(unit) for unit in wanted]), strict=True))
        mine = [unit for unit in wanted if owners[unit] == mates.rank]
        found: dict[Unit, Tensor] = {}
        with torch.no_grad():
            for batch, group in groupby(mine, key=lambda unit: unit[1]):
                here = list(group)
                ahead = [self.branches[number].fork for number, _ in here]
                inputs = self.problem.batches[batch].inputs
                walk = Walk(self.forks, self.current, inputs, ahead, self.kept.get(batch, {}))
                for unit in here:
                    branch = self.branches[unit[0]]
                    output = branch.go_on(inputs, walk.to(branch.fork))
                    found[unit], logits = judge(
                        self.problem.objective, self.problem.batches, self.knowledge, batch, output
                    )
                    if self.holding:
                        self.logits[unit] = logits
        table = torch.zeros(len(wanted), 4, dtype=torch.float64)
        if found:
            table[[wanted.index(unit) for unit in found]] = torch.stack(list(found.values())).cpu()
        self.terms |= dict(zip(wanted, map(tuple, mates.all_reduce(table).tolist()), strict=True))
        self.owners |= owners

    def effort(self, unit: Unit) -> float:
        """What it takes to evaluate a candidate on a batch."""
        nodes = self.branches[unit[0]].fork.nodes
        return self.problem.batches[unit[1]].samples * sum(self._effort.get(node.name, 0) for node in nodes)

    @cached_property
    def _effort(self) -> dict[str, int]:
        return self.forks.effort(self.current.kept)

    def answers(self, number: int) -> tuple[Tensor, ...]:
        """The logits of a candidate per batch, from the processes that have them."""
        assert self.knowledge is not None
        return tuple(
            team().broadcast(self.logits.get((number, batch), torch.empty_like(logits)), self.owners[number, batch])
            for batch, logits in enumerate(self.knowledge)
        )

    def bound(self, number: int, batches: int, least: Sequence[float]) -> float:
        """The least −ℛ that a candidate can have after what it has on its first batches. least: of any network, on each
        batch."""
        return sum(self.terms[number, batch][1] for batch in range(batches)) + sum(least[batches:])

    def forget(self, number: int) -> None:
        """Lets go of the logits of a candidate."""
        for batch in range(len(self.problem.batches)):
            self.logits.pop((number, batch), None)


def evaluate_candidates(
    problem: Problem,
    forks: Forks,
    plan: Plan,
    candidates: Sequence[tuple[str, Plan]],
    knowledge: Knowledge | None,
    *,
    ranking: Ranking,
    accept: int = 1,
    kept: Kept | None = None,
    known: Known | None = None,
) -> list[Outcome]:
    """The reward (eq. 4) of sub-networks that differ from the current one, `plan`, in one unit each.

    candidates: (unit, plan of the sub-network). ranking: which are best. accept: how many of these are wanted. kept:
    values of the current network that are known. known: what an earlier race from the same network found of these
    candidates; it takes in what this one finds.

    Without early stops every candidate sees every batch. With them, all see the first batch, the `accept` best there
    see all, and the others go on, batch by batch, until they are behind the `accept` best that have seen all even with
    the least −ℛ that any network can have on the other batches: then they cannot be among the best. Before each
    batch the one that stands best so far goes ahead to its end, which may make the others' case hopeless. Equals are
    told apart by the ranking, as ever.
    """
    current, groups = problem.network(plan), problem.traced.groups
    branches = [
        Branch(current, forks, problem.cuts(unit), groups.kept(candidate), rescale=problem.rescale)
        for unit, candidate in candidates
    ]
    holding = room_for_logits(problem, knowledge, len(candidates)) > 0
    plans = [candidate for _, candidate in candidates]
    race = Race(problem, forks, current, branches, plans, knowledge, kept or {}, holding, ranking)
    known = {} if known is None else known
    names = [(unit, candidate.kept.get(unit, ())) for unit, candidate in candidates]
    race.terms |= {(number, b): terms for number, name in enumerate(names) for b, terms in known.get(name, {}).items()}
    least = least_terms(problem.objective, problem.batches, knowledge) if problem.computing.early_stop else None
    bounds = {} if least is None else eliminate(race, least, accept)
    batches = range(len(problem.batches))
    race.run((number, b) for number in range(len(candidates)) for b in batches if number not in bounds)
    outcomes = [
        Outcome(None, bounds[number]) if number in bounds else Outcome(total(race.terms[number, b] for b in batches))
        for number in range(len(candidates))
    ]
    for (number, b), terms in race.terms.items():
        known.setdefault(names[number], {})[b] = terms
    if not holding:
        return outcomes
    (best,) = ranking.best(plans, [outcome.negative for outcome in outcomes])
    if all((best, b) in race.owners for b in batches):
        outcomes[best] = outcomes[best]._replace(logits=race.answers(best))
    return outcomes


def eliminate(race: Race, least: Sequence[float], accept: int) -> dict[int, float]:
    """Evaluates candidates until they are done or cannot be among the `accept` best; the bounds of those that cannot.

    least: the least −ℛ that any network can have on each batch.
    """
    batches, running = range(len(least)), list(range(len(race.branches)))
    race.run((number, 0) for number in running)
    done: list[float] = []
    bounds: dict[int, float] = {}

    def at_best(number: int, batch: int) -> float:
        """How a candidate stands if nothing after what it has shown before `batch` could be better."""
        return race.ranking.standing(race.plans[number], race.bound(number, batch, least))

    def leave(batch: int) -> None:
        """Lets those go that cannot win after what they have shown before `batch`."""
        for number in running.copy():
            last = race.ranking.behind(sorted(done)[accept - 1]) if len(done) >= accept else math.inf
            if last < at_best(number, batch) < math.inf:
                bounds[number] = race.bound(number, batch, least)
                race.forget(number)
                running.remove(number)

    for batch in batches[1:]:
        leave(batch)
        leaders = sorted(running, key=lambda number: at_best(number, batch))[: 1 if done else accept]
        race.run((number, b) for number in leaders for b in batches[batch:])
        done += [at_best(number, len(batches)) for number in leaders]
        running = [number for number in running if number not in leaders]
        leave(batch)
        if any((number, batch) not in race.terms for number in running):
            ahead = -(-team().size // len(running))  # where there are more processes, further batches at once
            race.run((number, b) for number in running for b in batches[batch : batch + ahead])
    return bounds


def room_for_logits(problem: Problem, knowledge: Knowledge | None, candidates: int) -> int:
    """Bytes for the logits of all candidates: 0 where nobody needs them, or they would take more than a quarter of the
    cache."""
    if knowledge is None or not problem.ensemble:
        return 0
    size = candidates * sum(logits.numel() * logits.element_size() for logits in knowledge)
    return size if size <= problem.computing.cache // 4 else 0
