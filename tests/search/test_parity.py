"""Our search against numbers recorded from the EKG authors' program, on their ResNet-56 and their 320 images.

The differences between the best candidates are tiny (exact ties occur), so values are compared, from the recorded state
of each step, and not only the path. The default suite evaluates the chosen candidate of every step and a few cheap
ones; `pytest -m sweep` all of them, the importance of all recorded steps, step 0's epoch of training, and a step of the
search as a whole. The rest of what was recorded: the last width in tests/search/test_widths.py, thresholds in
tests/search/test_candidates.py, the fine-tuning objective in tests/training/test_loss.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
from torch import Tensor

import ekgfx
from ekgfx.graph.plan import Plan
from ekgfx.models import resnet56_cifar_projection, tensorflow_state_dict
from ekgfx.search import AUTHORS, PAPER, Step, authors_cost
from ekgfx.search.candidates import important_first
from ekgfx.search.ekg import Pace, State, propose
from ekgfx.search.forks import Forks
from ekgfx.search.importance import Scores, taylor
from ekgfx.search.problem import Budget, Problem, width_rules
from ekgfx.search.race import evaluate_candidates
from ekgfx.search.ranking import ranking_of
from ekgfx.search.reward import Evaluation, Objective, assess, ensemble_knowledge, validation_batches
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.finetune import finetune
from ekgfx.training.loss import cross_entropy
from tests.support.reference import VAL_BATCH, Reference, gate_names, resnet56_cost

FEW = {0: [14, 28, 29], 1: [6, 29], 2: [1, 29]}
"""Candidates per step in the default suite: the chosen one and some near the end of the network, which are cheap."""


@dataclass(frozen=True)
class Recorded:
    """The problem the program had, and its state at every recorded step, in our terms."""

    reference: Reference
    problem: Problem

    @cached_property
    def forks(self) -> Forks:
        return Forks(self.problem.traced)

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

    def evaluate(self, step: int, gates: Sequence[int]) -> dict[int, Evaluation | None]:
        """Candidates of a step, from its recorded state."""
        current = self.plan(self.reference.widths(step), self.orders(step))
        candidates = [(gate_names()[gate], self.candidate(step, gate)) for gate in gates]
        ranking = ranking_of(self.problem, current, self.knowledge[step], strict=True)
        found = evaluate_candidates(
            self.problem, self.forks, current, candidates, self.knowledge[step], ranking=ranking
        )
        return {gate: outcome.evaluation for gate, outcome in zip(gates, found, strict=True)}

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
            _, logits = assess(self.problem.network(plan), self.problem.batches, self.problem.objective, None)
            states.append(ensemble_knowledge(states[-1], step, logits))
        return states


@pytest.fixture(scope="module")
def untrained() -> TracedModel:
    """Their network with random weights: enough for what depends on its structure alone."""
    return ekgfx.trace(resnet56_cifar_projection().eval(), torch.randn(2, 3, 32, 32))


@pytest.fixture(scope="module")
def traced(reference: Reference, untrained: TracedModel) -> TracedModel:
    return untrained.rebound(reference.model())


@pytest.fixture(scope="module")
def structure(reference: Reference, untrained: TracedModel) -> Recorded:
    """The problem without weights and images."""
    return problem_of(reference, untrained, [])


@pytest.fixture(scope="module")
def recorded(reference: Reference, traced: TracedModel) -> Recorded:
    return problem_of(reference, traced, reference.batches())


def problem_of(reference: Reference, traced: TracedModel, batches: Sequence[tuple[Tensor, Tensor]]) -> Recorded:
    problem = Problem(
        traced=traced,
        batches=validation_batches(batches),
        objective=Objective(batch_size=AUTHORS.batch_size),
        budget=Budget.of(authors_cost(traced), 0.45, "MACs and norms"),
        rules=width_rules(traced, frozenset(), align=1, min_width=0.0),
        guided=True,
        ensemble=True,
        rescale=True,
    )
    return Recorded(reference, problem)


def test_groups_are_their_gates(reference: Reference, untrained: TracedModel) -> None:
    assert set(gate_names()) == set(untrained.groups)
    for name, gate in zip(gate_names(), reference.json("gates.json"), strict=True):
        group = untrained.groups[name]
        assert (group.size, len(group.producers)) == (gate["channels"], gate["num_call"])


def test_cost_counter(structure: Recorded) -> None:
    cost = structure.problem.budget.cost
    assert cost(Plan()) == 126_837_376
    draw = np.random.default_rng(0)
    for _ in range(5):
        kept = [int(draw.integers(1, 16 * 2 ** (gate // 10) + 1)) for gate in range(30)]
        plan = Plan({name: tuple(range(count)) for name, count in zip(gate_names(), kept, strict=True)})
        assert cost(plan) == resnet56_cost(kept)


def test_initial_knowledge_and_loss(recorded: Recorded) -> None:
    problem = recorded.problem
    found, logits = assess(problem.network(problem.full()), problem.batches, problem.objective, None)
    expected = recorded.reference.knowledge(0)
    assert (torch.cat(logits) - expected).abs().max() < 1e-4  # logits up to 13.5
    initial = recorded.reference.json("initial.json")
    assert found.loss == pytest.approx(initial["ori_loss"], rel=1e-4)
    assert found.accuracy == initial["ori_acc"]


def test_next_knowledge(recorded: Recorded) -> None:
    """T₁ from our logits of the sub-network chosen at step 0, which is gate 14's."""
    problem = recorded.problem
    _, logits = assess(problem.network(recorded.candidate(0, 14)), problem.batches, problem.objective, None)
    expected = torch.from_numpy(recorded.reference.npz("candidate_logits_step0.npz")["gate14"])
    assert (torch.cat(logits) - expected).abs().max() < 1e-4
    knowledge = ensemble_knowledge(recorded.knowledge[0], 1, logits)
    assert (torch.cat(knowledge) - recorded.reference.knowledge(1)).abs().max() < 1e-4


@pytest.mark.parametrize("step", [0, 1, 2])
def test_what_the_filter_looks_at(structure: Recorded, step: int) -> None:
    """From recorded scores: the sums of the program's filter, and those it means to take, which ours takes."""
    reference = structure.reference
    line = reference.lines("search_steps_0-3.jsonl")[step]
    widths, orders = reference.widths(step), reference.orders(step)
    state = State(structure.plan(widths, orders), dict(zip(gate_names(), widths, strict=True)), None)
    for gate, (name, scores) in enumerate(zip(gate_names(), reference.scores(step), strict=True)):
        importance = torch.from_numpy(scores).double()
        proposal = propose(structure.problem, state, name, {name: importance}, Pace(), PAPER)
        assert proposal is not None
        assert AUTHORS.stake(importance, proposal, widths[gate]) == pytest.approx(
            line["mask_marking_scores"][gate], rel=1e-5
        )
        # Elsewhere its rounding counts another number of channels.
        if widths[gate] == 1.0 and gate in {*range(1, 10), *range(11, 20)}:
            lost = PAPER.stake(importance, proposal, widths[gate])
            assert lost == pytest.approx(line["mask_marking_scores_if_flat"][gate], rel=1e-5), name


@pytest.mark.sweep
def test_logits_of_all_candidates_at_step_0(recorded: Recorded) -> None:
    problem = recorded.problem
    for gate, expected in recorded.reference.npz("candidate_logits_step0.npz").items():
        network = problem.network(recorded.candidate(0, int(gate.removeprefix("gate"))))
        _, logits = assess(network, problem.batches, problem.objective, None)
        assert np.abs(torch.cat(logits).numpy() - expected).max() < 1e-4, gate


@pytest.mark.sweep
def test_a_step_of_the_public_search(reference: Reference, traced: TracedModel) -> None:
    """`search` with the authors' details, as a user calls it: filter, candidates, their values and the choice."""

    class Enough(Exception):
        """Ends the search after its first step."""

    found: list[Step] = []

    def stop(step: Step) -> None:
        found.append(step)
        raise Enough

    with pytest.raises(Enough):
        ekgfx.search(
            traced,
            reference.batches(),
            cost=authors_cost(traced),
            budget=0.45,
            details=AUTHORS,
            on_step=stop,
        )
    line = reference.lines("search_steps_0-3.jsonl")[0]
    theirs = {line["gate"]: line for line in reference.lines("search_candidates_0-3.jsonl") if line["step"] == 0}
    ours = {gate_names().index(candidate.group): candidate for candidate in found[0].candidates}
    assert found[0].threshold == pytest.approx(line["otsu_threshold"] / 2, rel=1e-3)  # see check_importance
    assert ours.keys() == theirs.keys()
    for gate, candidate in ours.items():
        assert candidate.width == theirs[gate]["new_width"]
        assert candidate.measure.loss == pytest.approx(theirs[gate]["loss"], abs=2e-8)
        assert candidate.measure.reward == pytest.approx(-theirs[gate]["score"], abs=2e-8)
    assert list(found[0].removed) == [gate_names()[line["chosen"]]]
    assert found[0].measure.loss == pytest.approx(line["loss"], abs=2e-8)


@pytest.mark.sweep
def test_step_0_trains_to_their_weights(reference: Reference) -> None:
    """One epoch from the pre-trained weights. The program divides a batch's sum of losses by half of its size."""
    model = resnet56_cifar_projection()
    model.load_state_dict(tensorflow_state_dict(reference.npz("weights_pretrained.npz")), strict=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batches = [(images, labels) for images, labels in reference.batches("train_sub_idx")]
    finetune(
        model, batches, epochs=1, lr=1e-3, schedule="constant", loss=lambda output, y: 2 * cross_entropy(output, y)
    )
    expected = tensorflow_state_dict(reference.npz("weights_after_finetune.npz"))
    for name, value in model.state_dict().items():
        if name in expected:
            moved = (expected[name] - before[name]).norm()
            assert (value - expected[name]).norm() < 0.02 * moved, name


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
