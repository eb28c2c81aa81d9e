"""What candidates share with the current network: bit for bit what evaluating each of them alone gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.plan import Plan
from ekgfx.graph.propagation import Operation
from ekgfx.search.forks import Forks, Keeper, Walk, storages_of
from ekgfx.search.importance import taylor
from ekgfx.search.problem import Problem
from ekgfx.search.race import evaluate_candidates
from ekgfx.search.ranking import Ranking, by_reward
from ekgfx.search.reward import assess
from ekgfx.tracing.traced import TracedModel
from tests.search import nets
from tests.search.test_importance import problem_of

BY_REWARD = Ranking(by_reward, lambda _: 0.0)
NETS = [nets.cnn, nets.vit, nets.downsampling]


def some_state(traced: TracedModel) -> tuple[Plan, list[tuple[str, Plan]]]:
    """A plan that cuts every other group, and a candidate of every group."""
    current = Plan({name: tuple(range(1, group.size)) for name, group in list(traced.groups.items())[::2]})
    candidates = []
    for name, group in traced.groups.items():
        kept = current.kept.get(name, tuple(range(group.size)))
        candidates.append((name, current.with_kept(name, kept[: max(1, len(kept) // 2)])))
    return current, candidates


def keeper_for(problem: Problem, forks: Forks, plan: Plan, budget: int) -> Keeper:
    """A keeper that has seen the current network."""
    groups = problem.traced.groups
    counts = {axis: len(kept) for axis, kept in groups.kept(plan).items()}
    samples = [batch.samples for batch in problem.batches]
    shares = [count / sum(samples) for count in samples]
    keeper = Keeper(forks, [frozenset({group.axis}) for group in groups.values()], counts, shares, budget)
    taylor(problem, plan, None, keeper)
    return keeper


def held(keeper: Keeper) -> int:
    """Bytes that it keeps."""
    storages = {at: size for kept in keeper.kept.values() for at, size in storages_of(list(kept.values())).items()}
    return sum(storages.values())


@pytest.mark.parametrize("part", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("make", NETS)
def test_forks_change_nothing(make: Callable[[], TracedModel], part: float) -> None:
    """With all, some or none of the current network's values kept, which the importance's forward pass gave."""
    traced = make()
    problem, forks = problem_of(traced, nets.batches()), Forks(traced)
    current, candidates = some_state(traced)
    whole = held(keeper_for(problem, forks, current, 1 << 30))
    keeper = keeper_for(problem, forks, current, int(part * whole))
    assert 0.4 * part * whole <= held(keeper) <= part * whole
    together = evaluate_candidates(problem, forks, current, candidates, None, ranking=BY_REWARD, kept=keeper.kept)
    for (_, plan), outcome in zip(candidates, together, strict=True):
        assert outcome.evaluation == assess(problem.network(plan), problem.batches, problem.objective, None)[0]


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The operators that sub-networks compute, by name."""
    names: list[str] = []
    compute = SubNetwork.compute

    def counting(self: SubNetwork, operation: Operation, *rest: Any) -> Any:
        names.append(operation.name)
        return compute(self, operation, *rest)

    monkeypatch.setattr(SubNetwork, "compute", counting)
    return names


@pytest.mark.parametrize("make", NETS)
def test_only_what_changes_is_computed(make: Callable[[], TracedModel], computed: list[str]) -> None:
    """With all values kept every candidate computes its own operators; with none, the others once for all of them."""
    traced = make()
    problem, forks = problem_of(traced, nets.batches(16, 16)), Forks(traced)
    current, candidates = some_state(traced)
    keeper = keeper_for(problem, forks, current, 1 << 30)
    own = [
        node.name
        for name, _ in candidates
        for node in forks.of(frozenset({traced.groups[name].axis})).nodes
        if traced.operation(node) is not None
    ]
    computed.clear()
    evaluate_candidates(problem, forks, current, candidates, None, ranking=BY_REWARD, kept=keeper.kept)
    assert sorted(computed) == sorted(own)
    computed.clear()
    evaluate_candidates(problem, forks, current, candidates, None, ranking=BY_REWARD)
    shared = computed.copy()
    for name in own:
        shared.remove(name)
    assert len(shared) == len(set(shared)) < len(traced.operations)
    assert set(shared) <= {operation.name for operation in traced.operations}


def test_a_fork_is_what_its_cut_changes() -> None:
    """By hand: the block's own width leaves stem and shortcut alone, though the shortcut comes after the block."""
    traced = nets.downsampling()
    forks = Forks(traced)
    convolutions = [operation.name for operation in traced.operations if "conv" in str(operation.target)]
    stem, first, second, shortcut = convolutions
    assert [traced.root_weight(traced.operation(forks.operators[name]).args["weight"]) for name in convolutions] == [
        "stem.weight",
        "a.weight",
        "b.weight",
        "short.weight",
    ]
    inner, stream = forks.of(frozenset({traced.groups["a"].axis})), forks.of(frozenset({traced.groups["b"].axis}))
    assert {first, second} <= {node.name for node in inner.nodes}
    assert not {stem, shortcut} & {node.name for node in inner.nodes}
    assert shortcut in inner.reads
    assert inner.weights == {"a.weight", "a.bias", "b.weight"}
    assert stream.weights == {"b.weight", "b.bias", "short.weight", "short.bias", "head.weight"}
    assert {second, shortcut} <= {node.name for node in stream.nodes}
    assert first not in {node.name for node in stream.nodes}
    everything = forks.of(frozenset({traced.groups["stem"].axis}))
    assert (everything.reads, everything.at) == (frozenset(), 0)


@pytest.mark.parametrize("make", NETS)
def test_a_walk_forgets_what_nobody_reads_any_more(make: Callable[[], TracedModel]) -> None:
    traced = make()
    problem, forks = problem_of(traced, nets.batches(16, 16)), Forks(traced)
    ahead = sorted((forks.of(frozenset({group.axis})) for group in traced.groups.values()), key=lambda fork: fork.at)
    walk = Walk(forks, problem.network(Plan()), problem.batches[0].inputs, ahead, {})
    for number, fork in enumerate(ahead):
        read = walk.to(fork)
        assert read.keys() == fork.reads
        later = set().union(*(other.reads for other in ahead[number:]))
        sources = {source.name for node in walk.left for source in node.all_input_nodes}
        assert walk.values.keys() <= later | sources
    assert not walk.left


def test_the_costliest_values_per_byte_are_kept_first() -> None:
    """Between two forks lie operators whose cost is known by hand; the dearer gap is bridged first."""
    traced = nets.downsampling()
    problem, forks = problem_of(traced, nets.batches(16, 16)), Forks(traced)
    inner, stream = forks.of(frozenset({traced.groups["a"].axis})), forks.of(frozenset({traced.groups["b"].axis}))
    # read by b: a's 12 channels on 2 × 2 and the stem's 8 on 6 × 6; by a: the latter and the shortcut's 16 on 2 × 2
    sizes = {name: 16 * 4 * n for name, n in (("a", 12 * 4), ("stem", 8 * 36), ("short", 16 * 4))}
    found = [keeper_for(problem, forks, Plan(), budget).wanted for budget in (sizes["stem"], sum(sizes.values()))]
    assert found[1] == inner.reads | stream.reads
    assert not found[0]
    only = keeper_for(problem, forks, Plan(), sizes["stem"] + sizes["a"]).wanted
    assert only == stream.reads
    # By hand, in MACs: stem 2592 and a 3456 lie before b's fork, b 6912 and the shortcut 4608 between it and a's.
    assert keeper_for(problem, forks, Plan(), sizes["stem"] + sizes["short"]).wanted == inner.reads
    assert torch.is_tensor(keeper_for(problem, forks, Plan(), 1 << 20).kept[0][next(iter(stream.reads))])
