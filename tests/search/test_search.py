"""The search as a whole, on small networks."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.errors import BudgetError, DataError, PlanError, RecipeError, TrainingError
from ekgfx.graph.plan import Plan
from ekgfx.search import IMPORTANCE, STRATEGIES, SearchResult, Step, search
from ekgfx.search.effort import quick_accept, search_macs
from ekgfx.search.problem import channels_per_position
from ekgfx.tracing.traced import TracedModel
from tests.search import nets
from tests.search.test_importance import problem_of
from tests.support import models


def untimed(result: SearchResult) -> list[Step]:
    """The steps without what differs from run to run."""
    return [replace(step, seconds=0.0, eta=0.0) for step in result.steps]


@pytest.mark.parametrize("make", [nets.cnn, nets.vit])
@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_reaches_the_budget_in_steps_of_one_group(make: Callable[[], TracedModel], keep: float) -> None:
    traced = make()
    before = {name: value.clone() for name, value in traced.model.state_dict().items()}
    seen: list[Step] = []
    result = search(traced, nets.batches(), flops=keep, on_step=seen.append)
    full = traced.cost().macs
    assert tuple(seen) == result.steps
    assert traced.cost(result.plan).macs <= keep * full
    for number, (step, plan, smaller) in enumerate(zip(result.steps, result.plans, result.plans[1:], strict=False), 1):
        (group,) = step.removed
        assert step.number == number
        assert set(plan.kept.get(group, range(traced.groups[group].size))) - set(smaller.kept[group]) == set(
            step.removed[group]
        )
        assert step.measure.macs == traced.cost(smaller).macs
        assert step.kept_fraction == step.measure.macs / full
        chosen = max(step.candidates, key=lambda candidate: candidate.measure.reward or -math.inf)
        assert chosen.group == group
        assert chosen.measure.reward == pytest.approx(step.measure.reward, rel=1e-5)
        if number < len(result.steps):
            assert step.kept_fraction > keep
            assert step.eta > 0
    assert result.steps[-1].eta == 0
    assert all(torch.equal(before[name], value) for name, value in traced.model.state_dict().items())


def test_the_pruned_model_computes_what_the_search_evaluated() -> None:
    """Also with rescaled kernels: the logits of Θ* are those of the module that `prune` makes."""
    traced, batches = nets.cnn(), nets.batches()
    result = search(traced, batches, flops=0.8)
    assert result.plan.rescale
    pruned = ekgfx.prune(traced.model, result.plan, traced=traced).train()
    with torch.no_grad():
        losses = [float(F.cross_entropy(pruned(images), labels)) * len(labels) for images, labels in batches]
    assert sum(losses) / 24 == pytest.approx(result.final.loss, rel=1e-4)


def test_rewards_follow_the_ensemble() -> None:
    """Every accepted step's reward, from the plans alone: T is the mean of the logits of all sub-networks before.

    With random weights all sub-networks would answer nearly alike; a classifier of large weights tells them apart.
    """
    traced, batches = nets.cnn(), nets.batches()
    *_, (_, classifier) = (pair for pair in traced.model.named_modules() if isinstance(pair[1], torch.nn.Linear))
    classifier.weight.data *= 30
    for knowledge in ("ensemble", "single", "none"):
        result = search(traced, batches, flops=0.6, knowledge=knowledge)
        answers: list[list[Tensor]] = []
        with torch.no_grad():
            for plan in result.plans:
                network = traced.subnetwork(plan, batch_stats=True, rescale=plan.rescale)
                answers.append([network(images) for images, _ in batches])
        for i, step in enumerate(result.steps):
            expected = {"ensemble": 0.0, "single": 0.0, "none": 0.0}
            teachers = {"ensemble": answers[: i + 1], "single": answers[:1], "none": []}
            for b, (_, labels) in enumerate(batches):
                output, share = answers[i + 1][b], len(labels) / 24
                for mode, taught_by in teachers.items():
                    expected[mode] += share * float(F.cross_entropy(output, labels))
                    if taught_by:
                        target = torch.stack([answer[b] for answer in taught_by]).mean(0).softmax(1)
                        expected[mode] += share * float(F.cross_entropy(output, target))
            assert step.measure.reward == pytest.approx(-expected[knowledge], rel=1e-4), (knowledge, i)
        assert abs(expected["ensemble"] / expected["single"] - 1) > 1e-3


@pytest.mark.parametrize("make", [nets.cnn, nets.vit])
def test_resuming_after_any_step_ends_with_the_same_plan(make: Callable[[], TracedModel]) -> None:
    traced = make()
    whole = search(traced, nets.batches(), flops=0.8)
    assert len(whole.steps) > 3
    assert untimed(search(traced, nets.batches(), flops=0.8)) == untimed(whole)
    for cut in range(len(whole.steps) + 1):
        history = json.loads(json.dumps([step.to_json() for step in whole.steps[:cut]]))
        again = search(traced, nets.batches(), flops=0.8, resume_from=history)
        assert untimed(again) == untimed(whole)
        assert again.plan == whole.plan


def test_a_history_of_something_else_is_refused() -> None:
    traced = nets.cnn()
    steps = [step.to_json() for step in search(traced, nets.batches(), flops=0.7).steps]

    def resume(history: list[Any], batches: list[Any] | None = None) -> None:
        search(traced, batches or nets.batches(), flops=0.7, resume_from=history)

    with pytest.raises(PlanError, match="numbered"):
        resume(steps[1:])
    with pytest.raises(PlanError, match="other weights or other data"):
        resume(steps, nets.batches(seed=9))
    with pytest.raises(PlanError, match="does not have"):
        resume([{**steps[0], "removed": {"elsewhere": [1]}, "widths": {"elsewhere": 0.5}}])
    with pytest.raises(PlanError, match="a step of the history has no"):
        resume([{"number": 1}])


def test_results_survive_json() -> None:
    result = search(nets.cnn(), nets.batches(), flops=0.7)
    again = SearchResult.from_json(json.loads(json.dumps(result.to_json())))
    assert again == result
    assert again.plans == result.plans


def test_without_labels_the_unpruned_networks_predictions_are_the_labels() -> None:
    traced, batches = nets.cnn(), nets.batches()
    with torch.no_grad():
        soft = [(x, traced.subnetwork(batch_stats=True)(x).softmax(1)) for x, _ in batches]
    expected = search(traced, soft, flops=0.8, channels_last=False)
    for unlabelled in ([(x, None) for x, _ in batches], [x for x, _ in batches]):
        found = search(traced, unlabelled, flops=0.8, channels_last=False)
        assert untimed(found) == untimed(expected)
        assert found.final.accuracy is None


def test_dense_tasks_bring_their_own_loss_and_logits() -> None:
    torch.manual_seed(0)
    traced = nets.traced(nets.TinySegmenter())
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 1, 8, 8, generator=generator)
    target = torch.randint(0, 4, (6, 8, 8), generator=generator)

    def dice_like(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return F.cross_entropy(output["out"], target) + (1 - output["out"].softmax(1).amax(1)).mean()

    result = search(traced, [(images, target)], flops=0.6, loss=dice_like, logits=lambda output: output["out"])
    assert traced.cost(result.plan).macs <= 0.6 * traced.cost().macs
    assert result.final.accuracy is not None
    assert (
        search(traced, [(images, target)], flops=0.6, logits="out").plan
        == search(traced, [(images, target)], flops=0.6).plan
    )


def test_several_inputs() -> None:
    torch.manual_seed(0)
    model, inputs = models.TwoInputs().double(), models.example(models.TwoInputs, 6)
    traced = ekgfx.trace(model, inputs)
    result = search(
        traced,
        [(inputs, torch.arange(6) % 3)],
        params=0.7,
        loss=lambda output, target: F.cross_entropy(output["logits"], target),
        logits=lambda output: output["logits"],
    )
    assert traced.cost(result.plan).params <= 0.7 * traced.cost().params


def test_aligned_widths() -> None:
    traced = nets.cnn()
    result = search(traced, nets.batches(), flops=0.5, align=4)
    for name, kept in result.plan.kept.items():
        size = traced.groups[name].size
        assert len(kept) == size or len(kept) % 4 == 0 or size < 4


def test_heads_are_aligned_by_their_channels() -> None:
    """Three heads of four channels are aligned to 4 as they are; the MLP and the stream in channels."""
    traced = nets.vit()
    assert channels_per_position(traced, traced.groups["blocks.0.qkv"]) == 4
    assert channels_per_position(traced, traced.groups["blocks.0.fc1"]) == 1
    result = search(traced, nets.batches(), flops=0.3, align=4)
    widths = traced.groups.widths(result.plan)
    assert {name: width for name, width in widths.items() if width % 4} == {
        name: width for name, width in widths.items() if "qkv" in name
    }


def test_least_widths_and_ignored_groups_are_kept() -> None:
    traced = nets.cnn()
    result = search(traced, nets.batches(), flops=0.7, min_width=0.5, ignore=["stem*", "fuse.0"])
    widths = traced.groups.widths(result.plan)
    assert widths["stem.0"] == 8
    assert widths["fuse.0"] == 32
    assert all(width >= traced.groups[name].size / 2 for name, width in widths.items())


def test_any_cost_of_a_plan_can_be_the_budget() -> None:
    traced = nets.cnn()

    def widest(plan: Plan) -> float:
        return max(traced.groups.widths(plan).values())

    result = search(traced, nets.batches(), cost=widest, budget=0.9)
    assert widest(result.plan) <= 0.9 * 32
    assert result.kept_fraction == widest(result.plan) / 32


@pytest.mark.parametrize("strategy", ["uniform", "global"])
def test_one_step_strategies(strategy: str) -> None:
    traced = nets.cnn()
    with_data = search(traced, nets.batches(), flops=0.5, strategy=strategy)
    without = search(traced, flops=0.5, strategy=strategy, importance="magnitude")
    for result in (with_data, without):
        assert len(result.steps) == 1
        assert 0.35 < result.kept_fraction <= 0.5
    assert with_data.final.loss is not None
    assert without.final.loss is None
    again = search(traced, flops=0.5, strategy=strategy, importance="magnitude", resume_from=without.steps)
    assert again.plan == without.plan


def test_uniform_is_one_ratio_and_global_one_threshold() -> None:
    traced = nets.cnn()
    uniform = traced.groups.widths(search(traced, flops=0.5, strategy="uniform", importance="magnitude").plan)
    ratios = [width / traced.groups[name].size for name, width in uniform.items()]
    assert max(ratios) - min(ratios) < 1 / 2  # the squeezed group has 2 channels only
    one = search(traced, nets.batches(), flops=0.5, strategy="global", importance="taylor")
    scores = IMPORTANCE["taylor"](problem_of(traced, nets.batches()), Plan(rescale=True), None)
    kept = [float(scores[name][list(one.plan.kept[name])].min()) for name in scores if len(one.plan.kept[name]) > 1]
    gone = [
        float(scores[name][list(one.steps[0].removed[name])].max()) for name in scores if one.steps[0].removed[name]
    ]
    assert min(kept) >= max(gone) * 0.999


@pytest.mark.parametrize("importance", ["taylor", "magnitude", "fpgm", "bn-scale", "hessian", "lamp", "random"])
def test_every_importance_drives_every_strategy(importance: str) -> None:
    traced = nets.cnn()
    for strategy in STRATEGIES:
        result = search(traced, nets.batches(12, 12), flops=0.85, strategy=strategy, importance=importance)
        assert result.kept_fraction <= 0.85


def test_random_channels_are_drawn_once_by_the_seed() -> None:
    """The baseline: the same whatever the strategy, the widths or the global generator; other channels for other seeds,
    and at a smaller width some of those at a larger one."""
    traced = nets.cnn()

    def kept(**options: Any) -> dict[str, set[int]]:
        torch.rand(int(torch.randint(9, ())))
        plan = search(traced, strategy="uniform", importance="random", **options).plan
        return {name: set(indices) for name, indices in plan.kept.items()}

    half, more = kept(flops=0.4), kept(flops=0.7)
    assert kept(flops=0.4) == half != kept(flops=0.4, seed=1)
    assert all(half[name] <= more[name] for name in half)
    assert any(half[name] != set(range(len(half[name]))) for name in half)  # they are no first channels
    last = search(traced, nets.batches(), flops=0.5, importance="random")
    alone = search(traced, nets.batches(), flops=0.5, importance="random", resume_from=last.steps[:2])
    assert alone.plan == last.plan
    order = kept(flops=0.4, ignore=next(iter(half)))
    assert all(order[name] <= half[name] or half[name] <= order[name] for name in order if name in half)


@pytest.mark.parametrize("keep", ["55%", " 55 %", "0.55", ".55", 0.55])
def test_a_budget_as_people_write_it(keep: float | str) -> None:
    traced = nets.cnn()
    asked = search(traced, flops=keep, strategy="uniform", importance="magnitude")
    assert asked.settings["budget"]["keep"] == 0.55
    for wrong, says in (
        ("half", "'half' is no fraction and no amount; write what is kept as 0.55 or 55%"),
        (55, "did you mean 55%?"),
    ):
        with pytest.raises((RecipeError, BudgetError), match=re.escape(says)):
            search(traced, flops=wrong, strategy="uniform", importance="magnitude")


def test_modules_and_classes_are_ignored_as_their_names_are() -> None:
    model = models.Residual().double()
    traced = ekgfx.trace(model, models.example(models.Residual))

    def cut(ignore: Any) -> set[str]:
        found = search(traced, params=0.95, strategy="uniform", importance="magnitude", ignore=ignore)
        assert all(isinstance(name, str) for name in found.settings["ignore"])
        return {name for name, kept in found.plan.kept.items() if len(kept) < traced.groups[name].size}

    assert cut(model.head) == cut([model.head]) == cut("head") == cut([nn.Linear]) == {"a"}  # the head is in the stem's
    with pytest.raises(BudgetError, match="ignore leaves nothing to prune of the 2 groups"):
        cut([nn.Conv2d, nn.Linear])
    for wrong, says in (
        (nn.GRU, "this GRU is no module of the traced Residual"),
        (nn.Linear(1, 1), "this Linear is no module"),
        ([3], "not a int"),
    ):
        with pytest.raises(PlanError, match=says):
            cut(wrong)


def test_accepting_several_candidates_shortens_the_search() -> None:
    """A step takes the best few on top of each other, never further than the budget asks; it can be resumed."""
    traced = nets.cnn()
    one, three = (search(traced, nets.batches(), flops=0.5, accept=accept) for accept in (1, 3))
    assert len(three.steps) < len(one.steps) / 2
    assert all(len(step.removed) == 3 for step in three.steps[:-1])
    for step, plan in zip(three.steps, three.plans, strict=False):
        ranked = sorted(step.candidates, key=lambda candidate: -(candidate.measure.reward or 0))
        assert list(step.removed) == [candidate.group for candidate in ranked[: len(step.removed)]]
        *before, _ = step.removed
        partial = plan
        for group in before:
            kept = partial.kept.get(group, range(traced.groups[group].size))
            partial = partial.with_kept(group, set(kept) - set(step.removed[group]))
        assert traced.cost(partial).macs > 0.5 * traced.cost().macs
    again = search(traced, nets.batches(), flops=0.5, accept=3, resume_from=three.steps[:2])
    assert untimed(again) == untimed(three)


def test_large_networks_accept_more() -> None:
    traced = nets.cnn()
    alone = search_macs(traced, 8, 0.5)
    assert quick_accept(traced, 8, 0.5) == 1
    assert quick_accept(traced, 8, 0.5, macs=alone / 3) == 3
    assert search_macs(traced, 8, 0.5, accept=3) < 0.4 * alone


class Bad(nn.Module):
    """Its output is not a number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).mean((2, 3))) * float("nan")


def test_errors_say_what_to_do() -> None:
    traced, batches = nets.cnn(), nets.batches()
    with pytest.raises(RecipeError, match="did you mean 55%"):
        search(traced, batches, flops=55)
    with pytest.raises(BudgetError, match="give one budget"):
        search(traced, batches)
    with pytest.raises(BudgetError, match="a budget of 1G asks for nothing: the model has .* of MACs; give less"):
        search(traced, batches, flops="1G")
    with pytest.raises(BudgetError, match=r"cannot keep only 0.1% of the parameters: with every group"):
        search(traced, batches, flops=0.9, params=0.001)
    with pytest.raises(BudgetError, match=r"cannot keep only 0.1% of the MACs: .* width \d+\.\d% are left"):
        search(traced, batches, flops=0.001)
    with pytest.raises(BudgetError, match="ignore leaves nothing to prune"):
        search(traced, batches, flops=0.5, ignore=["*"])
    with pytest.raises(DataError, match="needs validation batches"):
        search(traced, flops=0.5)
    with pytest.raises(DataError, match="needs validation batches"):
        search(traced, flops=0.5, strategy="uniform")
    with pytest.raises(DataError, match="for all or for none"):
        search(traced, [batches[0], (batches[1][0], None)], flops=0.5)
    with pytest.raises(DataError, match="a label 12, but the model has 10 outputs"):
        search(traced, [(batches[0][0], torch.full((16,), 12))], flops=0.5)
    with pytest.raises(DataError, match="needs targets"):
        search(traced, [batches[0][0]], flops=0.5, loss=lambda output, target: output.mean())
    with pytest.raises(RecipeError, match="unknown importance 'tailor'; did you mean 'taylor'"):
        search(traced, batches, flops=0.5, importance="tailor")
    with pytest.raises(RecipeError, match="step"):
        search(traced, batches, flops=0.5, step=0)
    with pytest.raises(TrainingError, match="loss is nan"):
        search(nets.traced(Bad()), batches, flops=0.5)


@pytest.mark.parametrize("labelled", [True, False])
def test_sorted_validation_batches_are_told_of(labelled: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Each candidate's BatchNorms take the statistics of each batch; one of a single class has others."""
    images, labels = nets.class_images()
    traced = ekgfx.trace(nets.Classes(), torch.randn(2, 1, 4, 4))
    traced.model.norm.running_mean.fill_(1.5)
    traced.model.norm.running_var.fill_(1.25)
    mixed = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    for order, said in ((torch.arange(48), 1), (mixed, 0)):
        parts = zip(images[order].split(12), labels[order].split(12), strict=True)
        batches = [(x, y if labelled else None) for x, y in parts]
        caplog.clear()
        ekgfx.search(traced, batches, flops=0.7)
        assert len(caplog.records) == said, caplog.text
        assert all("the validation batches of the search: they come sorted" in text for text in caplog.messages)


@pytest.mark.parametrize("strategy", ["ekg", "uniform", "global"])
def test_of_several_budgets_all_hold(strategy: str) -> None:
    """Whichever is the tighter one; amounts and fractions mean the same."""
    traced, batches = nets.cnn(), nets.batches()
    full = traced.cost()
    for flops, params in ((0.5, 0.8), (0.8, 0.5)):
        result = search(traced, batches, flops=flops, params=params, strategy=strategy)
        cost = traced.cost(result.plan)
        assert cost.macs <= flops * full.macs and cost.params <= params * full.params
        assert result.kept_fraction <= min(flops, params) == result.settings["budget"]["keep"]
        assert result.settings["budget"]["unit"] == "MACs and parameters"
        amounts = {"flops": f"{flops * full.macs / 1e3:.6f}k", "params": f"{params * full.params / 1e3:.6f}k"}
        assert search(traced, batches, **amounts, strategy=strategy).plan.kept == result.plan.kept
