"""Our search against numbers recorded from the EKG authors' program, on their ResNet-56 and their 320 images.

The differences between the best candidates are tiny (exact ties occur), so values are compared, from the recorded state
of each step, and not only the path. The default suite evaluates the chosen candidate of every step and a few cheap
ones; `pytest -m sweep` all of them, and the importance of all recorded steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import Tensor

import ekgfx
from ekgfx.plan import Plan
from ekgfx.search import AUTHORS, authors_cost
from ekgfx.search.candidates import important_first
from ekgfx.search.forked import Prefixes, evaluate_candidates
from ekgfx.search.importance import Scores, taylor
from ekgfx.search.problem import Budget, Problem, width_rules
from ekgfx.search.reward import Evaluation, Objective, ensemble_knowledge, evaluate, validation_batches
from ekgfx.trace import TracedModel
from tests.reference import VAL_BATCH, Reference, gate_names, resnet56_cost

FEW = {0: [14, 28, 29], 1: [6, 29], 2: [1, 29]}
"""Candidates per step in the default suite: the chosen one and some near the end of the network, which are cheap."""


@dataclass(frozen=True)
class Recorded:
    """The problem the program had, and its state at every recorded step, in our terms."""

    reference: Reference
    problem: Problem

    @cached_property
    def prefixes(self) -> Prefixes:
        return Prefixes(self.problem.traced)

    def plan(self, widths: Sequence[float], orders: Sequence[np.ndarray]) -> Plan:
        """Every gate keeps the channels whose recorded rank is below its width."""
        plan = self.problem.full()
        for name, width, order in zip(gate_names(), widths, orders, strict=True):
            rule = self.problem.rules[name]
            plan = plan.with_kept(name, np.flatnonzero(order < rule.kept(width)).tolist())
        return plan

    def candidate(self, step: int, gate: int) -> Plan:
        """The recorded state of a step with one (inner) gate a step narrower."""
        widths = list(self.reference.widths(step))
        widths[gate] = round(widths[gate] - 0.2, 5)
        return self.plan(widths, self.orders(step))

    def evaluate(self, step: int, gates: Sequence[int]) -> dict[int, Evaluation]:
        """Candidates of a step, from its recorded state."""
        current = self.plan(self.reference.widths(step), self.orders(step))
        candidates = [(gate_names()[gate], self.candidate(step, gate)) for gate in gates]
        found = evaluate_candidates(self.problem, self.prefixes, current, candidates, self.knowledge[step])
        return dict(zip(gates, found, strict=True))

    def orders(self, step: int) -> list[np.ndarray]:
        """Ranks at a step: recorded at steps 0 to 2, by our importance in the recorded state at step 3."""
        return self.reference.orders(step) if step < 3 else self.last_orders

    @cached_property
    def last_orders(self) -> list[np.ndarray]:
        state = self.plan(self.reference.widths(3), self.reference.orders(2))
        scores = taylor(self.problem, state, self.knowledge[3])
        orders = []
        for name in gate_names():
            ranked = important_first(range(len(scores[name])), scores[name])
            orders.append(np.argsort(ranked))
        return orders

    @cached_property
    def knowledge(self) -> list[tuple[Tensor, ...]]:
        """T before steps 0 to 3: two are recorded, the others follow by eq. 8 from the sub-networks chosen."""
        states = [self.reference.knowledge(step).split(VAL_BATCH) for step in (0, 1)]
        for step in (2, 3):
            plan = self.plan(self.reference.widths(step), self.orders(step - 1))
            _, logits = evaluate(self.problem.network(plan), self.problem.batches, self.problem.objective, None)
            states.append(ensemble_knowledge(states[-1], step, logits))
        return states


@pytest.fixture(scope="module")
def traced(reference: Reference) -> TracedModel:
    return ekgfx.trace(reference.model(), torch.randn(2, 3, 32, 32))


@pytest.fixture(scope="module")
def recorded(reference: Reference, traced: TracedModel) -> Recorded:
    problem = Problem(
        traced=traced,
        batches=validation_batches(reference.batches()),
        objective=Objective(batch_size=AUTHORS.batch_size),
        budget=Budget.of(authors_cost(traced), 0.45, "MACs and norms"),
        rules=width_rules(traced, frozenset(), align=1, min_width=0.0),
        guided=True,
        ensemble=True,
        rescale=True,
    )
    return Recorded(reference, problem)


def test_groups_are_their_gates(reference: Reference, traced: TracedModel) -> None:
    assert set(gate_names()) == set(traced.groups)
    for name, gate in zip(gate_names(), reference.json("gates.json"), strict=True):
        group = traced.groups[name]
        assert (group.size, len(group.producers)) == (gate["channels"], gate["num_call"])


def test_cost_counter(recorded: Recorded) -> None:
    cost = recorded.problem.budget.cost
    assert cost(Plan()) == 126_837_376
    draw = np.random.default_rng(0)
    for _ in range(5):
        kept = [int(draw.integers(1, 16 * 2 ** (gate // 10) + 1)) for gate in range(30)]
        plan = Plan({name: tuple(range(count)) for name, count in zip(gate_names(), kept, strict=True)})
        assert cost(plan) == resnet56_cost(kept)


def test_initial_knowledge_and_loss(recorded: Recorded) -> None:
    problem = recorded.problem
    found, logits = evaluate(problem.network(problem.full()), problem.batches, problem.objective, None)
    expected = recorded.reference.knowledge(0)
    assert (torch.cat(logits) - expected).abs().max() < 1e-4  # logits up to 13.5
    initial = recorded.reference.json("initial.json")
    assert found.loss == pytest.approx(initial["ori_loss"], rel=1e-4)
    assert found.accuracy == initial["ori_acc"]


def test_knowledge_after_the_first_step(recorded: Recorded) -> None:
    chosen = torch.from_numpy(recorded.reference.npz("candidate_logits_step0.npz")["gate14"])
    (knowledge,) = ensemble_knowledge([recorded.reference.knowledge(0)], 1, [chosen])
    torch.testing.assert_close(knowledge, recorded.reference.knowledge(1), rtol=0, atol=1e-6)


def test_importance_at_step_0(recorded: Recorded) -> None:
    check_importance(recorded, 0)


@pytest.mark.sweep
@pytest.mark.parametrize("step", [1, 2])
def test_importance_at_later_steps(recorded: Recorded, step: int) -> None:
    check_importance(recorded, step)


@pytest.mark.parametrize("step", FEW)
def test_some_candidates(recorded: Recorded, step: int) -> None:
    check_candidates(recorded, step, FEW[step])


@pytest.mark.sweep
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_all_candidates_and_the_choice(recorded: Recorded, step: int) -> None:
    lines = [line for line in recorded.reference.lines("search_candidates_0-3.jsonl") if line["step"] == step]
    found = check_candidates(recorded, step, [line["gate"] for line in lines])
    chosen = recorded.reference.lines("search_steps_0-3.jsonl")[step]["chosen"]
    assert -found[chosen].reward == pytest.approx(min(-e.reward for e in found.values()), abs=2e-8)


def check_importance(recorded: Recorded, step: int) -> None:
    """Scores agree, and so do the ranks, except among channels whose recorded scores are equal within that accuracy."""
    problem = recorded.problem
    plan = recorded.plan(recorded.reference.widths(step), recorded.orders(step))
    scores: Scores = taylor(problem, plan, recorded.knowledge[step])
    for name, theirs, order in zip(
        gate_names(), recorded.reference.scores(step), recorded.reference.orders(step), strict=True
    ):
        # The program divides a batch's sum by 256, and so the mean over its two batches by half of that.
        ours = scores[name].numpy() * len(problem.batches)
        accuracy = 2e-3 * theirs.max()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=accuracy, err_msg=name)
        ranked = theirs[important_first(range(len(theirs)), torch.from_numpy(ours))]
        np.testing.assert_allclose(ranked, theirs[np.argsort(order)], rtol=0, atol=2 * accuracy, err_msg=name)
        removed = np.flatnonzero(theirs == 0)
        assert not ours[removed].any()


def check_candidates(recorded: Recorded, step: int, gates: Sequence[int]) -> dict[int, Evaluation]:
    """Loss and reward of candidates within float32 accuracy of the recorded ones, and their exact cost."""
    found = recorded.evaluate(step, gates)
    for line in recorded.reference.lines("search_candidates_0-3.jsonl"):
        if line["step"] == step and line["gate"] in found:
            assert found[line["gate"]].loss == pytest.approx(line["loss"], abs=2e-8), line["gate"]
            assert -found[line["gate"]].reward == pytest.approx(line["score"], abs=2e-8), line["gate"]
            assert found[line["gate"]].accuracy == line["acc"]
            assert recorded.problem.budget.cost(recorded.candidate(step, line["gate"])) == line["flops"]
    return found
