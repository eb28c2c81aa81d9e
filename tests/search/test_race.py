"""A search that saves work finds what one finds that evaluates every candidate alone and to its end."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.search import AUTHORS, SearchResult, Step, ekg, search
from ekgfx.search.forks import Branch, Forks
from ekgfx.search.problem import Budget, Computing, Problem
from ekgfx.search.race import Outcome, Race, Unit, eliminate, evaluate_candidates
from ekgfx.search.ranking import TIE, Ranking, by_reward, ranking_of
from ekgfx.search.reward import assess, least_terms, validation_batches
from ekgfx.tracing.traced import TracedModel
from tests.search import nets
from tests.search.test_importance import problem_of

NETS = [nets.cnn, nets.vit, nets.downsampling]


def sure(make: Callable[[], TracedModel], dtype: torch.dtype = torch.float64) -> TracedModel:
    """The network, sure of what it says, as a trained one is: then candidates differ."""
    model = make().model.to(dtype)
    *_, head = (module for module in model.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        head.weight *= 8
    return ekgfx.trace(model, torch.randn(2, 1, 8, 8, dtype=dtype))


def batches(traced: TracedModel, size: int = 6, soft: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Four batches with the network's own answers for labels; `soft`: with probabilities."""
    network, dtype = traced.subnetwork(batch_stats=True), next(traced.model.parameters()).dtype
    found = []
    for images, _ in nets.batches(size=size):
        with torch.no_grad():
            answers = network(images.to(dtype))
        found.append((images.to(dtype), (answers / 3).softmax(1) if soft else answers.argmax(1)))
    return found


def plainly(problem: Problem, forks: Forks, plan: Any, candidates: Any, knowledge: Any, **_: Any) -> list[Outcome]:
    """Every candidate sliced anew and run as a whole on every batch."""
    return [
        Outcome(assess(problem.network(candidate), problem.batches, problem.objective, knowledge)[0])
        for _, candidate in candidates
    ]


@pytest.fixture
def plain(monkeypatch) -> Callable[..., SearchResult]:
    """The search that saves nothing."""

    def run(*arguments: Any, **options: Any) -> SearchResult:
        with monkeypatch.context() as patch:
            patch.setattr(ekg, "evaluate_candidates", plainly)
            return search(*arguments, **options, cache=0, early_stop=False)

    return run


def untimed(result: SearchResult) -> list[Step]:
    return [replace(step, seconds=0.0, eta=0.0) for step in result.steps]


@pytest.mark.parametrize("cache", [0, 30_000, 1 << 30])
@pytest.mark.parametrize("make", NETS)
def test_plan_and_history_are_the_plain_searchs(make: Callable[[], TracedModel], cache: int, plain) -> None:
    traced = sure(make)
    expected = plain(traced, batches(traced), flops=0.6)
    found = search(traced, batches(traced), flops=0.6, cache=cache, early_stop=False)
    assert found.plan == expected.plan
    assert untimed(found) == untimed(expected)


OPTIONS: list[dict[str, Any]] = [{}, {"accept": 2}, {"knowledge": "none"}, {"knowledge": "single"}, {"soft": True}]


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("make", NETS)
def test_early_stops_leave_out_only_what_cannot_win(
    make: Callable[[], TracedModel], case: dict[str, Any], plain
) -> None:
    """The steps are the same, and what was left is really as bad as its bound says, and worse than the best."""
    options = dict(case)
    traced, accept = sure(make), options.get("accept", 1)
    data = batches(traced, soft=options.pop("soft", False))
    expected = plain(traced, data, flops=0.6, **options)
    found = search(traced, data, flops=0.6, **options)
    assert found.plan == expected.plan
    left = 0
    for step, whole in zip(untimed(found), untimed(expected), strict=True):
        assert replace(step, candidates=()) == replace(whole, candidates=())
        best = sorted(-(c.measure.reward or 0.0) for c in whole.candidates)[:accept]
        for ours, theirs in zip(step.candidates, whole.candidates, strict=True):
            if ours.at_least is None:
                assert ours == theirs
                continue
            left += 1
            assert (ours.measure.loss, ours.measure.reward, ours.measure.accuracy) == (None, None, None)
            assert (ours.group, ours.kept, ours.measure.macs) == (theirs.group, theirs.kept, theirs.measure.macs)
            assert -(theirs.measure.reward or 0.0) >= ours.at_least > best[-1]
    assert left or case
    again = SearchResult.from_json(found.to_json())
    assert again.steps == found.steps


def test_nothing_is_left_early_where_the_record_is_wanted_or_losses_may_be_negative() -> None:
    traced = sure(nets.cnn)

    def left(**options: Any) -> int:
        result = search(traced, batches(traced), flops=0.8, **options)
        return sum(c.at_least is not None for step in result.steps for c in step.candidates)

    assert left() > 0
    assert left(early_stop=False) == 0
    assert left(details=AUTHORS) == 0
    assert left(loss=lambda output, target: F.cross_entropy(output, target)) == 0


class Written(Race):
    """A race whose terms are written down: −ℛ by candidate and batch."""

    def __init__(self, table: list[list[float]], standing: Any = by_reward) -> None:
        ranking = Ranking(standing, lambda _: 0.0)
        problem: Any = SimpleNamespace(batches=table[0])
        plans: Any = range(len(table))
        super().__init__(problem, None, None, table, plans, None, {}, False, ranking)  # type: ignore[arg-type]
        self.table, self.ran = table, list[Unit]()

    def run(self, units: Iterable[Unit]) -> None:
        for number, batch in set(units) - self.terms.keys():
            self.ran.append((number, batch))
            self.terms[number, batch] = (0.0, self.table[number][batch], 0.0, 0.0)


@pytest.mark.parametrize(
    ("accept", "table", "bounds", "units"),
    [
        # 0 looks best, ends at 19 and rules nobody out. Then 1 goes ahead to 4, and 2 is left at 3 + 2.
        (1, [[1, 9, 9], [2, 1, 1], [3, 2, 2]], {2: 5.0}, 8),
        # Of two that are wanted both must have seen all: 2 is not left at 5 (4 and 19 are those of the best), 3 is.
        (2, [[1, 9, 9], [2, 1, 1], [3, 2, 2], [20, 0, 0]], {3: 20.0}, 10),
        # 1 is left after the first batch, 3 after the second; 2 ties, which is no reason to leave.
        (1, [[1, 1, 1], [4, 0, 0], [3, 0, 0], [2, 2, 2]], {1: 4.0, 3: 4.0}, 9),
        (1, [[1], [2]], {}, 2),
    ],
)
def test_who_is_left_and_when(accept: int, table: list[list[float]], bounds: dict[int, float], units: int) -> None:
    """By hand, where a batch may add nothing."""
    race = Written(table)
    assert eliminate(race, [0.0] * len(table[0]), accept) == bounds
    assert len(race.ran) == len(set(race.ran)) == units


@pytest.mark.parametrize(("behind", "left"), [(0.5, False), (2.0, True)])
def test_who_only_rounding_puts_behind_is_not_left(behind: float, left: bool) -> None:
    """The best ends at 2; the other stands at 2 and some part of a tie, which a larger saving may decide for it."""
    race = Written([[1, 1], [2 * (1 + behind * TIE), 0]])
    assert (eliminate(race, [0.0, 0.0], 1) != {}) is left
    assert len(race.ran) == 3 + (not left)


def test_who_is_left_where_savings_count() -> None:
    """By hand: what loses most saves so much that it stands at 6/10, and the others at 1/1 and 2/2 at best."""
    saved = [1.0, 2.0, 10.0]
    race = Written([[1, 3], [2, 3], [6, 0]], standing=lambda number, negative: negative / saved[number])
    assert eliminate(race, [0.0, 0.0], 1) == {0: 1.0, 1: 2.0}
    assert len(race.ran) == 4


@pytest.mark.parametrize("accept", [1, 2])
@pytest.mark.parametrize("make", NETS)
def test_early_stops_where_savings_count(make: Callable[[], TracedModel], accept: int, plain) -> None:
    """Under a weighed budget, too, the steps are those of the plain search."""
    traced = sure(make)
    data, budget = batches(traced), Budget.of(lambda plan: traced.cost(plan).macs, 0.6, "MACs", weighed=True)
    with patch("ekgfx.search.find_budget", lambda *_, **__: budget):
        expected, found = (way(traced, data, flops=0.6, accept=accept) for way in (plain, search))
    assert found.plan == expected.plan
    left = 0
    for step, whole in zip(untimed(found), untimed(expected), strict=True):
        assert replace(step, candidates=()) == replace(whole, candidates=())
        for ours, theirs in zip(step.candidates, whole.candidates, strict=True):
            left += ours.at_least is not None
            assert ours == theirs or -(theirs.measure.reward or 0.0) >= (ours.at_least or math.inf)
    assert left or make is nets.vit or accept > 1


def test_early_stops_save_work(monkeypatch) -> None:
    """What is left is not computed, and nothing is computed twice."""
    traced = sure(nets.cnn)
    seen: list[Branch] = []
    go_on = Branch.go_on

    def counting(self: Branch, inputs: Any, read: Any) -> Any:
        seen.append(self)
        return go_on(self, inputs, read)

    monkeypatch.setattr(Branch, "go_on", counting)
    result = search(traced, batches(traced), flops=0.6)
    candidates = [candidate for step in result.steps for candidate in step.candidates]
    left = sum(candidate.at_least is not None for candidate in candidates)
    assert left
    assert 4 * len(candidates) - 3 * left <= len(seen) <= 4 * len(candidates) - left
    seen.clear()
    search(traced, batches(traced), flops=0.6, early_stop=False)
    assert len(seen) == 4 * len(candidates)


def test_ties_are_settled_as_ever() -> None:
    """Twice the same candidate: the second is not left though it cannot be better, and the first is ranked first."""
    traced = nets.cnn()
    problem = replace(problem_of(traced, nets.batches(size=6)), computing=Computing(early_stop=True))
    names = list(traced.groups)
    kept = range(traced.groups[names[-1]].size - 1)
    same = (names[-1], problem.full().with_kept(names[-1], kept))
    first, second, *_ = evaluate_candidates(
        problem, Forks(traced), problem.full(), [same] * 3, None, ranking=ranking_of(problem, problem.full(), None)
    )
    assert first.evaluation is not None
    assert first == second


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_least_terms_are_entropies(dtype: torch.dtype) -> None:
    """By hand: CE(p, q) is least at q = p, where it is H(p); for classes it is 0. Label and teacher together are twice
    their mean, which for the class 0 is (3/4, 1/8, 1/8) and (5/8, 1/8, 1/4)."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]], dtype=dtype)
    mean = torch.tensor([[0.75, 0.125, 0.125], [0.625, 0.125, 0.25]], dtype=dtype)
    entropy = 1.5 * math.log(2)
    joint = sum(-m * math.log(m) for m in mean.flatten().tolist())  # two samples, their mean, twice
    images = torch.zeros(2, 1, 8, 8)
    objective = problem_of(nets.cnn(), nets.batches()).objective
    apart = replace(objective, logits=lambda output: output)
    soft = validation_batches([(images, p)] * 2)
    hard = validation_batches([(images, torch.zeros(2, dtype=torch.long))] * 2)
    void = validation_batches([(images, torch.tensor([0, -100]))] * 2)
    teacher = [p.log()] * 2
    cases: list[Any] = [
        (objective, soft, None, entropy, p),
        (objective, hard, None, 0, p),
        (objective, hard, teacher, joint, mean),
        (apart, hard, teacher, entropy, p),
        (objective, void, teacher, entropy, p),
        (objective, soft, teacher, 2 * entropy, p),
    ]
    for asked, data, known, expected, answer in cases:
        least = least_terms(asked, data, known)
        assert least == pytest.approx([expected / 2] * 2, rel=2e-4)
        assert all(0 <= each <= expected / 2 for each in least)
        for number, batch in enumerate(data):
            terms = asked.terms(answer.log(), batch.target, None if known is None else known[number])
            assert least[number] <= float(terms[1]) / 2
