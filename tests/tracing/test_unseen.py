"""What no traced call of a model reads: what it holds back, what releases it, and what a saved model knows of it."""

import copy
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import EkgfxWarning, PlanError, TraceError
from tests.support.trunks import Optional, Trunk, cut, images, ready, same
from tests.support.zeroed import distance, zeroed

pytestmark = pytest.mark.filterwarnings("ignore::ekgfx.errors.EkgfxWarning")


def test_what_no_call_shows_keeps_what_may_meet_it() -> None:
    model = ready(Optional())
    with pytest.warns(EkgfxWarning, match=r"nothing that was traced uses extra, depth, project: .*also=.*unused="):
        traced = ekgfx.trace(model, images())
    assert list(traced.groups) == []
    reasons = {f.reason for f in traced.groups.frozen if (f.parameter, f.dim) == ("a.0.weight", 0)}
    assert reasons == {"may meet extra.weight, which is not used by what was traced"}


def test_what_is_unused_holds_nothing_back() -> None:
    pruned, twin, traced = cut(ready(Optional()), unused=["extra", "dep*", "project.*"])
    assert list(traced.groups) == ["a.0", "b.0"]
    assert traced.notes == ()
    assert pruned.extra.out_features == 6
    same(pruned, twin, images(3))


class Elsewhere(Trunk):
    """A method that only others call."""

    def apart(self, x: Tensor) -> Any:
        return self.other(x), self.project(x)


def test_what_no_code_names_holds_nothing_back_and_is_told() -> None:
    model = Trunk()
    model.other = nn.Linear(10, 3)
    with pytest.warns(EkgfxWarning, match="nothing uses other, as far as the code of the model says"):
        traced = ekgfx.trace(ready(model), images())
    assert list(traced.groups) == ["a.0", "b.0"]


class Tasks(Trunk):
    """A head for each task, chosen by an attribute that the user sets: by key, by a name put together, or kept."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.task, self.choice = how, "one", {"one": "first", "two": "second"}
        heads = {"one": nn.Linear(10, 4), "two": nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 2))}
        if how == "key":
            self.heads = nn.ModuleDict(heads)
        else:
            for name, head in heads.items():
                setattr(self, f"task_{name}" if how == "piece" else self.choice[name], head)

    def forward(self, x: Tensor) -> Any:
        x = self.features(x).mean((2, 3))
        if self.how == "key":
            return self.heads[self.task](x)
        return getattr(self, f"task_{self.task}" if self.how == "piece" else self.choice[self.task])(x)


@pytest.mark.parametrize("how", ["key", "piece", "kept"])
def test_a_head_that_code_looks_up_keeps_what_may_meet_it(how: str) -> None:
    pruned, twin, traced = cut(ready(Tasks(how)))
    assert list(traced.groups) == ["a.0"]
    assert "may meet" in traced.notes[0] and traced.dead == []
    for model in (pruned, twin):
        model.task = "two"
    same(pruned, twin, images(3))


def test_the_inside_of_an_unseen_head_does_not_count() -> None:
    model = Elsewhere()
    model.other = nn.Sequential(nn.Linear(20, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 9))
    traced = ekgfx.trace(ready(model), images())
    assert list(traced.groups) == ["a.0"], "20 may be b twice, 6 is handed on inside"


def test_a_flattened_input_of_an_unseen_head_counts() -> None:
    model = Elsewhere()
    model.other = nn.Linear(6 * 64, 9)
    assert list(ekgfx.trace(ready(model), images()).groups) == ["b.0"]


def test_widths_that_become_equal_by_the_cut_stay_apart() -> None:
    model = Elsewhere()
    model.project = nn.Linear(10, 3)
    pruned, _, traced = cut(ready(model))
    assert list(traced.groups) == ["a.0"]
    assert pruned.a[0].out_channels == pruned.project.out_features == 3
    assert list(ekgfx.trace(copy.deepcopy(pruned), images()).groups) == ["a.0"]


def test_saved_models_know_what_was_unused_and_ask_for_the_calls(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, calls = ready(Optional()), [{"task": "depth"}, ("loss", images(), torch.zeros(2, 4, dtype=torch.float64))]
    traced = ekgfx.trace(model, images(), also=calls, unused=["extra"])
    plan = replace(ekgfx.Plan({"a.0": (0, 2)}, traced.groups.digest), **traced.options)
    assert plan == ekgfx.Plan.from_json(plan.to_json())
    assert (plan.unused, plan.also) == (("extra.weight", "extra.bias"), 2)
    pruned = ekgfx.prune(model, plan, traced)
    ekgfx.save(pruned, tmp_path / "run", plan=plan)
    build = lambda: Optional().double()  # noqa: E731
    with pytest.raises(PlanError, match=r"traced with 2 further calls, not 0: .*also="):
        ekgfx.load(tmp_path / "run", build, (images(),))
    with warnings.catch_warnings():
        warnings.simplefilter("error", EkgfxWarning)
        loaded = ekgfx.load(tmp_path / "run", build, (images(),), also=calls)
    same(loaded, pruned, images(3), task="depth")


@pytest.mark.parametrize("wrong", [{"unused": "extra"}, {"also": -1}, {"also": [2]}])
def test_a_malformed_plan_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match=f"malformed plan: {next(iter(wrong))}="):
        ekgfx.Plan.from_json(json.dumps({"version": 1, "kept": {}, **wrong}))


def test_mistakes_are_told() -> None:
    model = ready(Optional())
    with pytest.raises(TraceError, match=r"unused 'projct' names no parameter.*did you mean 'project'"):
        ekgfx.trace(model, images(), unused=["projct"])
    with pytest.raises(TraceError, match=r"unused 'head' names head.weight, which Optional does use"):
        ekgfx.trace(model, images(), unused=["head"])
    with pytest.raises(TraceError, match="'losses', which is no method of Optional"):
        ekgfx.trace(model, images(), also=["losses"])
    with pytest.raises(TraceError, match="also takes tensors"):
        ekgfx.trace(model, images(), also=[3])


class Touching(nn.Module):
    """Without labels it touches what it would have looked up, as code does for training on several devices."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.table, self.head = nn.Linear(5, 6), nn.Embedding(3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        x = self.body(x).relu()
        x = x + 0 * self.table.weight.sum() if labels is None else x + self.table(labels)
        return self.head(x)


def test_what_is_multiplied_by_zero_is_not_seen() -> None:
    """It would keep its width, and what it is added to with labels would not."""
    model, x = Touching().double(), torch.randn(2, 5, dtype=torch.float64)
    with pytest.warns(EkgfxWarning, match="nothing that was traced uses table"):
        assert not ekgfx.trace(model, x).groups
    traced = ekgfx.trace(model, x, also=[(x, torch.tensor([0, 2]))])
    plan = ekgfx.Plan(dict.fromkeys(traced.groups, (1, 2, 5)))
    pruned = ekgfx.prune(model, plan, traced)
    assert pruned.table.weight.shape == (3, 3)
    inputs = (torch.randn(3, 5, dtype=torch.float64), torch.tensor([1, 1, 0]))
    assert distance(pruned, zeroed(traced, plan), inputs) < 1e-12
    assert distance(pruned, zeroed(traced, plan), inputs, training=True) < 1e-12
