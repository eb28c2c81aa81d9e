"""Evaluating a step's candidates: the first batch with all of them, the others only while a candidate can still win."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ekgfx.plan import Plan
from ekgfx.search.forks import Branch, Forks, Walk
from ekgfx.search.problem import Problem
from ekgfx.search.reward import Evaluation, Knowledge, Terms, judge, least_terms, total
from ekgfx.sliced import SubNetwork

Unit = tuple[int, int]
"""One candidate on one batch, by their numbers."""

Kept = Mapping[int, Mapping[str, Any]]
"""Values of the current network that were kept, by the number of the batch and by node."""


class Outcome(NamedTuple):
    """What became of a candidate. evaluation: None for one that was left early, when its −ℛ was found to be `at_least`
    that. logits: of an evaluated one, per batch; None where there was no room to hold them."""

    evaluation: Evaluation | None
    at_least: float | None = None
    logits: tuple[Tensor, ...] | None = None


@dataclass
class Race:
    """The candidates of one step under way.

    current: the network that they differ from; branches: the candidates. kept: values of the current network. holding:
    whether the candidates' logits are held.
    """

    problem: Problem
    forks: Forks
    current: SubNetwork
    branches: Sequence[Branch]
    knowledge: Knowledge | None
    kept: Kept
    holding: bool
    terms: dict[Unit, Terms] = field(default_factory=dict)
    logits: dict[Unit, Tensor] = field(default_factory=dict)

    def run(self, units: Iterable[Unit]) -> None:
        """Evaluates candidates on batches; the results are in `terms` and `logits`."""
        batches: dict[int, list[int]] = {}
        for number, batch in units:
            batches.setdefault(batch, []).append(number)
        done: list[Unit] = []
        found: list[Tensor] = []
        with torch.no_grad():
            for batch, numbers in sorted(batches.items()):
                numbers.sort(key=lambda number: self.branches[number].fork.at)
                inputs = self.problem.batches[batch].inputs
                ahead = [self.branches[number].fork for number in numbers]
                walk = Walk(self.forks, self.current, inputs, ahead, self.kept.get(batch, {}))
                for number in numbers:
                    branch = self.branches[number]
                    output = branch.go_on(inputs, walk.to(branch.fork))
                    terms, logits = judge(self.problem.objective, self.problem.batches, self.knowledge, batch, output)
                    done.append((number, batch))
                    found.append(terms)
                    if self.holding:
                        self.logits[number, batch] = logits
        if found:
            self.terms |= dict(zip(done, map(tuple, torch.stack(found).tolist()), strict=True))

    def so_far(self, number: int, batches: int) -> float:
        """−ℛ of a candidate on its first batches."""
        return sum(self.terms[number, batch][1] for batch in range(batches))

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
    accept: int = 1,
    kept: Kept | None = None,
) -> list[Outcome]:
    """The reward (eq. 4) of sub-networks that differ from the current one, `plan`, in one group each.

    candidates: (group, plan of the sub-network). accept: how many of the best are wanted. kept: values of the current
    network that are known.

    Without early stops every candidate sees every batch. With them, all see the first batch, the `accept` best there
    see all, and the others go on until what they have, and the least that any network can add to it, is more than the
    worst of those: then they cannot be among the best. Equal rewards are told apart as ever, by order.
    """
    current, groups = problem.network(plan), problem.traced.groups
    branches = [
        Branch(current, forks, groups[group].axis, groups.kept(candidate), rescale=problem.rescale)
        for group, candidate in candidates
    ]
    batches = range(len(problem.batches))
    holding = room_for_logits(problem, knowledge, len(candidates)) > 0
    race = Race(problem, forks, current, branches, knowledge, kept or {}, holding)
    least = least_terms(problem.objective, problem.batches, knowledge) if problem.computing.early_stop else None
    if least is None or len(candidates) <= accept or len(batches) == 1:
        race.run((number, batch) for batch in batches for number in range(len(candidates)))
        return [finished(race, number) for number in range(len(candidates))]
    race.run((number, 0) for number in range(len(candidates)))
    best = sorted(range(len(candidates)), key=lambda number: race.so_far(number, 1))[:accept]
    race.run((number, batch) for number in best for batch in batches[1:])
    worst = max(race.so_far(number, len(batches)) for number in best)
    outcomes = {number: finished(race, number) for number in best}
    running = [number for number in range(len(candidates)) if number not in best]
    for batch in batches[1:]:
        for number in running:
            bound = race.so_far(number, batch) + sum(least[batch:])
            if worst < bound < math.inf:
                race.forget(number)
                outcomes[number] = Outcome(None, at_least=bound)
        running = [number for number in running if number not in outcomes]
        race.run((number, batch) for number in running)
    outcomes |= {number: finished(race, number) for number in running}
    return [outcomes[number] for number in range(len(candidates))]


def finished(race: Race, number: int) -> Outcome:
    """The outcome of a candidate that saw every batch."""
    batches = range(len(race.problem.batches))
    evaluation = total(race.terms[number, batch] for batch in batches)
    return Outcome(evaluation, None, tuple(race.logits[number, b] for b in batches) if race.holding else None)


def room_for_logits(problem: Problem, knowledge: Knowledge | None, candidates: int) -> int:
    """Bytes for the logits of all candidates: 0 where nobody needs them, or they would take more than a quarter of the
    cache."""
    if knowledge is None or not problem.ensemble:
        return 0
    size = candidates * sum(logits.numel() * logits.element_size() for logits in knowledge)
    return size if size <= problem.computing.cache // 4 else 0
