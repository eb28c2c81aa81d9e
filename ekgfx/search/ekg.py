"""The EKG search: greedy steps, each to the candidate that the ensemble knowledge rewards most."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ekgfx.errors import BudgetError, PlanError
from ekgfx.plan import Plan
from ekgfx.search.candidates import Proposal, important_first, worth_evaluating
from ekgfx.search.details import Details
from ekgfx.search.forked import Prefixes, evaluate_candidates
from ekgfx.search.importance import Criterion, Scores
from ekgfx.search.problem import Problem
from ekgfx.search.recorder import Recorder
from ekgfx.search.result import Candidate, Step, apply_step
from ekgfx.search.reward import Evaluation, Knowledge, ensemble_knowledge, evaluate

TOLERANCE = 1e-3
"""Relative difference between a recorded loss and the one found again on resuming that is still the same data."""


@dataclass(frozen=True)
class State:
    """Where a search stands: Θᵢ. plan and widths (ratio per group); knowledge T over `members` sub-networks, None in
    an unguided search."""

    plan: Plan
    widths: Mapping[str, float]
    knowledge: Knowledge | None
    members: int = 1


def run(
    problem: Problem,
    criterion: Criterion,
    recorder: Recorder,
    unpruned: Knowledge,
    *,
    step: float,
    details: Details,
    history: Sequence[Step],
) -> None:
    """Search until the budget holds, going on after `history`; the accepted steps go to `recorder`.

    unpruned: T₀ = O(D_val; Θ₀). step: r, the width that a group made by one layer loses at once.

    Raises BudgetError when no group can shrink further.
    """
    prefixes = Prefixes(problem.traced)
    state = State(problem.full(), dict.fromkeys(problem.rules, 1.0), unpruned if problem.guided else None)
    for past in history:
        state = replay(problem, state, past)
        recorder.again(past)
    while not problem.budget.met(state.plan):
        scores = criterion(problem, state.plan, state.knowledge)
        proposals = propose(problem, state, scores, step, details)
        if not proposals:
            raise BudgetError(
                f"no group can shrink further at {problem.budget.fraction(state.plan):.1%} of the "
                f"{problem.budget.unit}, and the budget is {problem.budget.keep:.1%}; raise it, lower align or "
                "min_width, or ignore fewer groups"
            )
        stake = {p.group: details.stake(scores[p.group], p, state.widths[p.group]) for p in proposals}
        chosen, threshold = worth_evaluating(proposals, stake)
        evaluations = evaluate_candidates(
            problem, prefixes, state.plan, [(p.group, p.plan) for p in chosen], state.knowledge
        )
        best = max(range(len(chosen)), key=lambda i: evaluations[i].reward)
        state, evaluation = accept(problem, state, chosen[best])
        recorder.accept(
            state.plan,
            removed={chosen[best].group: chosen[best].removed},
            widths={chosen[best].group: chosen[best].width},
            evaluation=evaluation,
            candidates=[candidate(problem, p, e) for p, e in zip(chosen, evaluations, strict=True)],
            threshold=threshold,
        )


def propose(problem: Problem, state: State, scores: Scores, step: float, details: Details) -> list[Proposal]:
    """The candidates Φ: every group that can, at width w_l − r_l with r_l = max(1/C_l, r/n_l), without the channels of
    least importance. Where that overshoots the budget, the smallest reduction that still reaches it."""
    proposals = []
    for group, rule in problem.rules.items():
        kept = problem.kept(state.plan, group)
        order = important_first(kept, scores[group])

        def cut(count: int, group: str = group, order: Sequence[int] = order) -> Plan:
            return state.plan.with_kept(group, order[:count])

        def within(count: int, cut: Callable[[int], Plan] = cut) -> bool:
            return problem.budget.met(cut(count))

        width = rule.next_width(state.widths[group], step)
        if rule.kept(width) >= len(kept):
            continue
        if problem.budget.fraction(cut(rule.kept(width))) < problem.budget.keep:
            width = details.last_width(rule, width, len(kept), within)
        count = rule.kept(width)
        removed = tuple(sorted(order[count:]))
        proposals.append(Proposal(group, width, cut(count), removed, float(scores[group][list(removed)].sum())))
    return proposals


def accept(problem: Problem, state: State, best: Proposal) -> tuple[State, Evaluation]:
    """Θᵢ₊₁ is the best candidate (eq. 3 and 7); the knowledge takes its logits in (eq. 8)."""
    evaluation, logits = evaluate(problem.network(best.plan), problem.batches, problem.objective, state.knowledge)
    widths = {**state.widths, best.group: best.width}
    if state.knowledge is None or not problem.ensemble:
        return State(best.plan, widths, state.knowledge), evaluation
    knowledge = ensemble_knowledge(state.knowledge, state.members, logits)
    return State(best.plan, widths, knowledge, state.members + 1), evaluation


def replay(problem: Problem, state: State, past: Step) -> State:
    """The state after a recorded step, its logits computed again.

    Raises PlanError when the step does not fit the model, or gives another loss than was recorded.
    """
    sizes = {name: group.size for name, group in problem.traced.groups.items()}
    plan = apply_step(state.plan, past, sizes)
    (group,) = past.removed
    again, evaluation = accept(problem, state, Proposal(group, past.widths[group], plan, past.removed[group], 0.0))
    recorded = past.measure.loss
    if recorded is None or abs(evaluation.loss - recorded) > TOLERANCE * max(abs(recorded), TOLERANCE):
        raise PlanError(
            f"step {past.number} of the history has loss {recorded}, here it gives {evaluation.loss:.6g}; the history "
            "was made with other weights or other data: start the search anew"
        )
    return again


def candidate(problem: Problem, proposal: Proposal, evaluation: Evaluation) -> Candidate:
    """A proposal and its evaluation, for the record."""
    kept = len(problem.kept(proposal.plan, proposal.group))
    return Candidate(proposal.group, proposal.width, kept, problem.measure(proposal.plan, evaluation))
