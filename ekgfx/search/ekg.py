"""The EKG search: greedy steps, each to the candidate that the ensemble knowledge rewards most."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ekgfx.errors import BudgetError, PlanError
from ekgfx.graph.plan import Plan
from ekgfx.search.candidates import Proposal, important_first, worth_evaluating
from ekgfx.search.details import PAPER, Details
from ekgfx.search.forks import Forks, Keeper
from ekgfx.search.importance import Criterion, Scores, scored
from ekgfx.search.problem import DROP, Budget, Problem
from ekgfx.search.race import Known, Outcome, evaluate_candidates, room_for_logits
from ekgfx.search.ranking import ranking_of
from ekgfx.search.recorder import Recorder
from ekgfx.search.result import Candidate, Step, apply_step
from ekgfx.search.reward import Evaluation, Knowledge, assess, ensemble_knowledge

TOLERANCE = 1e-3
"""Relative difference between a recorded loss and the one found again on resuming that is still the same data."""


@dataclass(frozen=True)
class State:
    """Where a search stands: Θᵢ. plan and widths (ratio per unit); knowledge T over `members` sub-networks, None in
    an unguided search."""

    plan: Plan
    widths: Mapping[str, float]
    knowledge: Knowledge | None
    members: int = 1


@dataclass(frozen=True)
class Pace:
    """How far a step goes. width: r, the ratio that a group made by one layer loses at once. accept: how many of the
    best candidates are taken together; the paper takes one."""

    width: float = 0.2
    accept: int = 1


@dataclass(frozen=True)
class Turn:
    """What a step does. evaluated: the candidates that the filter left, with their outcomes; threshold: the filter's;
    best: the best of them, the best first; first: the outcome of the very best; taken: what is accepted."""

    evaluated: Sequence[tuple[Proposal, Outcome]]
    threshold: float | None
    best: Sequence[Proposal]
    first: Outcome
    taken: Sequence[Proposal]


@dataclass(frozen=True)
class Method:
    """How steps are made: what scores the channels, how far a step goes, what the authors' program does otherwise; and
    the forks of the graph."""

    criterion: Criterion
    pace: Pace
    details: Details
    forks: Forks


def run(
    problem: Problem, criterion: Criterion, recorder: Recorder, *, pace: Pace = Pace(), details: Details = PAPER
) -> None:
    """Search until the budget holds, going on after what `recorder` has of an earlier search.

    Other budgets of the recorder, all of them looser, are met on the way: their searches take the same steps, until a
    candidate would overshoot the one or the other. There the other has a turn of its own, of which only that is
    computed in which it differs, and where it leads elsewhere, it leaves. So each ends where its search alone would.

    Raises BudgetError when no group can shrink further.
    """
    state = State(problem.full(), dict.fromkeys(problem.rules, 1.0), problem.unpruned if problem.guided else None)
    go_on(problem, recorder, state, 0, Method(criterion, pace, details, Forks(problem.traced)))


def go_on(problem: Problem, recorder: Recorder, state: State, number: int, method: Method) -> None:
    """Search from `state`, where `number` steps have led, until the budget holds."""
    recorded = tuple(recorder.steps[number:])
    others = dict(recorder.others)

    def leave(label: str, turn: Turn | None = None) -> None:
        """Another budget's way from here on: by a turn of its own, or as an earlier search went."""
        began = time.monotonic()
        own, there = recorder.leave(label, number), replace(problem, budget=others.pop(label))
        if turn is not None:
            go_on(there, own, move(there, own, state, turn), number + 1, method)
        elif not there.budget.met(own.plan):
            go_on(there, own, state, number, method)
        recorder.skip(began)

    for past in (*recorded, None):
        for label, budget in recorder.others.items():
            if label in others and (budget.met(state.plan) or recorder.begun(label) == number):
                leave(label)
        if past is None:
            break
        state = replay(problem, state, past)
        recorder.resumed()
        number += 1
    while not problem.budget.met(state.plan):
        mine, theirs = turns(problem, state, others, method)
        for label, turn in theirs.items():
            if turn.taken != mine.taken:
                leave(label, turn)
        state = move(problem, recorder, state, mine)
        number += 1
        for label, budget in list(others.items()):
            if budget.met(state.plan):
                leave(label)


def turns(
    problem: Problem, state: State, others: Mapping[str, Budget], method: Method
) -> tuple[Turn, Mapping[str, Turn]]:
    """The step from `state` under the problem's budget, and under each of the others."""
    problem = problem.at(state.plan)
    method = replace(method, forks=method.forks.on(problem.traced))
    keeper = keeper_of(problem, method.forks, state)
    scores = scored(method.criterion, problem, state.plan, state.knowledge, keeper)
    known: Known = {}
    proposals = propose_all(problem, state, scores, method)
    mine = take_turn(problem, state, proposals, scores, method, keeper, known)
    theirs = {}
    for label, budget in others.items():
        there = replace(problem, budget=budget)
        own = propose_all(there, state, scores, method)
        if own != proposals or (budget.weighed and any(budget.met(proposal.plan) for proposal in own)):
            theirs[label] = take_turn(there, state, own, scores, method, keeper, known)
        else:
            taken = combine(there, state, mine.best, scores, method.pace, method.details)
            theirs[label] = replace(mine, taken=taken)
    return mine, theirs


def propose_all(problem: Problem, state: State, scores: Scores, method: Method) -> list[Proposal]:
    """The candidates of a step, Φ. BudgetError where there are none."""
    units = (*problem.rules, *problem.blocks)
    found = (propose(problem, state, unit, scores, method.pace, method.details) for unit in units)
    proposals = [proposal for proposal in found if proposal is not None]
    if not proposals:
        raise BudgetError(
            f"no group can shrink further at {problem.budget.fraction(state.plan):.1%} of the "
            f"{problem.budget.unit}, and the budget is {problem.budget.keep:.1%}; raise it, lower align or "
            "min_width, or ignore fewer groups"
        )
    return proposals


def take_turn(
    problem: Problem,
    state: State,
    proposals: Sequence[Proposal],
    scores: Scores,
    method: Method,
    keeper: Keeper,
    known: Known,
) -> Turn:
    """The best of the proposals. known: what is known of them, and will be."""
    pace, details = method.pace, method.details
    whole = {unit: torch.cat([scores[group] for group in problem.of(unit)]) for unit in problem.rules}
    narrower = [p for p in proposals if p.group in problem.rules]
    stake = {p.group: details.stake(whole[p.group], p, state.widths[p.group]) for p in narrower}
    chosen, threshold = worth_evaluating(narrower, stake)
    chosen += [p for p in proposals if p.group in problem.blocks]  # which are few, and no importance says what they are
    ranking = ranking_of(problem, state.plan, state.knowledge, details.strict_best)
    outcomes = evaluate_candidates(
        problem,
        method.forks,
        state.plan,
        [(p.group, p.plan) for p in chosen],
        state.knowledge,
        ranking=ranking,
        accept=pace.accept,
        kept=keeper.kept,
        known=known,
    )
    ranked = ranking.best([p.plan for p in chosen], [outcome.negative for outcome in outcomes], pace.accept)
    best = [chosen[i] for i in ranked]
    taken = combine(problem, state, best, scores, pace, details)
    return Turn(tuple(zip(chosen, outcomes, strict=True)), threshold, best, outcomes[ranked[0]], taken)


def move(problem: Problem, recorder: Recorder, state: State, turn: Turn) -> State:
    """The state after a step, which is recorded."""
    state, evaluation = accept(problem, state, turn.taken, turn.first)
    recorder.accept(
        state.plan,
        removed={group: removed for proposal in turn.taken for group, removed in proposal.removed.items()},
        widths={group: proposal.width for proposal in turn.taken for group in proposal.removed},
        evaluation=evaluation,
        candidates=[candidate(problem, proposal, outcome) for proposal, outcome in turn.evaluated],
        threshold=turn.threshold,
    )
    return state


def propose(problem: Problem, state: State, unit: str, scores: Scores, pace: Pace, details: Details) -> Proposal | None:
    """A unit's candidate in Φ: of a block the network without it; of a group its next width, w_l − r_l with
    r_l = max(1/C_l, r/n_l), without the channels of least importance. Where that overshoots the budget, the smallest
    reduction that still reaches it. None at its least width.
    """
    if unit in problem.blocks:
        plan = replace(state.plan, dropped=(*state.plan.dropped, problem.blocks[unit].name))
        return Proposal(unit, 0.0, plan, {}, 0.0)
    rule, now = problem.rules[unit], problem.positions(state.plan, unit)
    orders = {group: important_first(problem.kept(state.plan, group), scores[group]) for group in problem.of(unit)}

    def cut(count: int) -> Plan:
        return problem.cut(state.plan, unit, orders, count)

    width = rule.next_width(state.widths[unit], pace.width)
    if problem.budget.weighed:
        before = problem.budget.cost(state.plan)
        while rule.kept(width) > rule.minimum and problem.budget.cost(cut(rule.kept(width))) >= before:
            width = rule.next_width(width, pace.width)  # on to the next stair: a step that saves nothing is none
        if problem.budget.cost(cut(rule.kept(width))) >= before:
            return None
    if rule.kept(width) >= now:
        return None
    if problem.budget.weighed and problem.budget.met(cut(rule.kept(width))):
        # Time does not always fall with the width: off the hardware's grain a narrower layer may take longer.
        counts = range(rule.kept(width), now, rule.align)
        width = next(count for count in reversed(counts) if problem.budget.met(cut(count))) / rule.size
    elif problem.budget.fraction(cut(rule.kept(width))) < problem.budget.keep:
        width = details.last_width(rule, width, now, lambda count: problem.budget.met(cut(count)))
    count = rule.kept(width)
    removed = {group: tuple(sorted(orders[group][count * step :])) for group, step in problem.of(unit).items()}
    lost = sum(float(scores[group][list(channels)].sum()) for group, channels in removed.items())
    return Proposal(unit, width, cut(count), removed, lost)


def combine(
    problem: Problem, state: State, best: Sequence[Proposal], scores: Scores, pace: Pace, details: Details
) -> list[Proposal]:
    """The best candidates on top of each other, the best first, as far as the budget asks for them."""
    taken = [best[0]]
    for proposal in best[1:]:
        if problem.budget.met(taken[-1].plan):
            break
        so_far = replace(state, plan=taken[-1].plan)
        further = propose(problem, so_far, proposal.group, scores, pace, details)
        if further is not None:
            taken.append(further)
    return taken


def accept(
    problem: Problem, state: State, taken: Sequence[Proposal], best: Outcome | None = None
) -> tuple[State, Evaluation]:
    """Θᵢ₊₁ is the best candidate (eq. 3 and 7); the knowledge takes its logits in (eq. 8).

    best: what is known of the first of `taken`; where it is the only one, it is not evaluated again.
    """
    plan = taken[-1].plan
    widths = {**state.widths, **{proposal.group: proposal.width for proposal in taken}}
    follows = state.knowledge is not None and problem.ensemble
    if best is not None and best.evaluation is not None and len(taken) == 1 and (best.logits or not follows):
        evaluation, logits = best.evaluation, best.logits or ()
    else:
        evaluation, logits = assess(problem.network(plan), problem.batches, problem.objective, state.knowledge)
    if state.knowledge is None or not follows:
        return State(plan, widths, state.knowledge), evaluation
    knowledge = ensemble_knowledge(state.knowledge, state.members, logits)
    return State(plan, widths, knowledge, state.members + 1), evaluation


def replay(problem: Problem, state: State, past: Step) -> State:
    """The state after a recorded step, its logits computed again.

    Raises PlanError when the step does not fit the model, or gives another loss than was recorded.
    """
    sizes = {name: group.size for name, group in problem.traced.groups.items()}
    plan = apply_step(state.plan, past, sizes)
    units = [unit for unit in problem.rules if past.removed.keys() & problem.of(unit).keys()]
    widths = {unit: min(past.widths[group] for group in problem.of(unit) if group in past.widths) for unit in units}
    taken = [Proposal(unit, widths[unit], plan, past.removed, 0.0) for unit in units]
    taken += [Proposal(DROP + name, 0.0, plan, {}, 0.0) for name in past.dropped]
    again, evaluation = accept(problem, state, taken)
    recorded = past.measure.loss
    if recorded is None or abs(evaluation.loss - recorded) > TOLERANCE * max(abs(recorded), TOLERANCE):
        raise PlanError(
            f"step {past.number} of the history has loss {recorded}, here it gives {evaluation.loss:.6g}; the history "
            "was made with other weights or other data: start the search anew"
        )
    return again


def keeper_of(problem: Problem, forks: Forks, state: State) -> Keeper:
    """What keeps the current network's values for the candidates of a step, within the cache."""
    counts = {axis: len(kept) for axis, kept in problem.traced.groups.kept(state.plan).items()}
    cuts = [problem.cuts(unit) for unit in (*problem.rules, *problem.blocks)]
    samples = [batch.samples for batch in problem.batches]
    budget = problem.computing.cache - room_for_logits(problem, state.knowledge, len(cuts))
    return Keeper(forks, cuts, counts, [count / sum(samples) for count in samples], budget)


def candidate(problem: Problem, proposal: Proposal, outcome: Outcome) -> Candidate:
    """A proposal and what became of it, for the record."""
    block = proposal.group.startswith(DROP)
    kept = 0 if block else len(problem.kept(proposal.plan, next(iter(problem.of(proposal.group)))))
    measure = problem.measure(proposal.plan, outcome.evaluation)
    return Candidate(proposal.group, proposal.width, kept, measure, outcome.at_least)
