"""Residual blocks as candidates of the search: judged by the same reward, dropped where that is worth it."""

import json

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.errors import RecipeError
from ekgfx.graph.plan import Plan
from ekgfx.surgery.check import relative_error
from tests.search.nets import batches, traced


class Branch(nn.Module):
    """relu(x + branch(x)) of what comes out of a ReLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.b, self.last = nn.Conv2d(inner, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.b(F.relu(self.norm(self.a(x))))) + x)


class Deep(nn.Module):
    """A stem, three blocks, of which the second does next to nothing, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.idle, self.third = nn.Conv2d(1, 6, 3), Branch(6, 8), Branch(6, 8), Branch(6, 8)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.idle(self.first(F.relu(self.stem(x))))).mean((2, 3)))


@pytest.fixture(scope="module")
def deep() -> ekgfx.TracedModel:
    torch.manual_seed(0)
    found = traced(Deep())
    with torch.no_grad():
        found.model.idle.last.weight.mul_(1e-4)
        found.model.idle.last.bias.zero_()
    return found


IMAGES = [images for images, _ in batches()]
"""Without labels: what the network said before is what it should say."""
ASKED = {"flops": 0.4, "step": 0.3, "depth": True, "early_stop": False}


@pytest.fixture(scope="module")
def result(deep):
    return ekgfx.search(deep, IMAGES, **ASKED)


def loss_of(deep: ekgfx.TracedModel, plan: Plan) -> float:
    network, whole = (deep.subnetwork(p, batch_stats=True, rescale=True) for p in (plan, Plan()))
    with torch.no_grad():
        return sum(len(x) * float(F.cross_entropy(network(x), whole(x).softmax(1))) for x in IMAGES) / 24


def test_a_block_that_does_nothing_goes_first(result, deep):
    assert result.steps[0].dropped == ("idle",)
    assert result.steps[0].removed == {}
    assert "idle" in result.plan.dropped
    assert deep.cost(result.plan).macs <= 0.4 * deep.cost().macs
    assert any(step.removed for step in result.steps)


def test_candidates_are_worth_what_the_networks_without_the_block_are(result, deep):
    """Of a step after the first block is gone, too, where the graph is another one."""
    seen = 0
    for before, step in zip(result.plans, result.steps, strict=False):
        for candidate in step.candidates:
            if candidate.group.startswith("drop ") and candidate.measure.loss is not None:
                plan = Plan(before.kept, dropped=(*before.dropped, candidate.group.removeprefix("drop ")))
                assert candidate.measure.loss == pytest.approx(loss_of(deep, plan), abs=1e-5)
                assert candidate.measure.macs == deep.cost(plan).macs
                seen += 1
    assert seen >= 3


def test_steps_are_what_their_plans_are(result, deep):
    for plan, step in zip(result.plans[1:], result.steps, strict=True):
        assert step.measure.macs == deep.cost(plan).macs
        assert step.measure.loss == pytest.approx(loss_of(deep, plan), abs=1e-5)


def test_it_goes_on_where_it_was_interrupted(result, deep):
    history = json.loads(json.dumps([step.to_json() for step in result.steps[:2]]))
    again = ekgfx.search(deep, IMAGES, **ASKED, resume_from=history)
    assert again.plan == result.plan
    assert type(result).from_json(json.loads(json.dumps(result.to_json()))).plan == result.plan


def test_the_network_that_was_found_can_be_made_and_repaired(result, deep):
    images = torch.cat(IMAGES)
    pruned = ekgfx.prune(deep.model, result.plan, deep)
    wanted = deep.subnetwork(result.plan, rescale=True)
    with torch.no_grad():
        assert relative_error(pruned(images), wanted(images)) < 1e-5
    assert ekgfx.repair(pruned, deep, result.plan, images).layers
    bank = ekgfx.build_bank(deep, result, batches(), teachers=2)
    assert bank is not None


def test_what_is_ignored_stays(deep):
    found = ekgfx.search(deep, IMAGES, flops=0.7, step=0.5, depth=True, ignore=["idle"])
    assert "idle" not in found.plan.dropped


@pytest.mark.parametrize("options", [{"strategy": "uniform"}, {"uniform_layers": True}])
def test_what_does_not_go_together_is_refused(deep, options):
    with pytest.raises(RecipeError, match="depth goes with the strategy 'ekg' and without uniform_layers"):
        ekgfx.search(deep, batches(), flops=0.6, depth=True, **options)
