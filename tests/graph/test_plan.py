"""Plans as people write them, and plans of several rounds as one."""

import copy
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import ekgfx
from ekgfx.errors import PlanError, RecipeError, TraceError
from ekgfx.graph.plan import Plan, rounds_of
from ekgfx.runs.directory import read_manifest
from ekgfx.surgery.check import perturb


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(12 * 16, 10), nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip
    perturb(model)
    return model.eval().double()


IMAGES = torch.randn(3, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
ROUNDS = ({"0": (0, 2, 3, 7, 9, 11), "3": (1, 4, 5, 6, 10)}, {"0": (1, 2, 5), "6": (0, 2, 4, 6, 9)}, {"3": (0, 3, 4)})


def rounds(model: nn.Module, plans: Any = ROUNDS) -> nn.Module:
    for kept in plans:
        model = ekgfx.prune(model, Plan(kept), example_inputs=IMAGES)
    return model


@pytest.mark.parametrize(
    "indices",
    [[0, 1, 5], torch.tensor([0, 1, 5]), np.array([0, 1, 5]), tuple(np.array([0, 1, 5])), list(torch.tensor([0, 1, 5])),
     np.array([1, 1, 0, 0, 0, 1], bool), [True, True, False, False, False, True]],
)  # fmt: skip
def test_indices_of_any_kind_are_whole_numbers(indices: Any) -> None:
    for plan in (Plan({"0": indices}), Plan().with_kept("0", indices)):
        assert plan == Plan({"0": (0, 1, 5)}) and set(map(type, plan.kept["0"])) == {int}
        assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("indices", [[1.0], torch.tensor([0.5]), "01", 3, [None]])
def test_other_indices_are_refused(indices: Any) -> None:
    with pytest.raises(PlanError, match="whole numbers|give its kept channels"):
        Plan({"0": indices})


def test_wrong_arguments_are_a_line() -> None:
    model = net()
    traced = ekgfx.trace(model, IMAGES)
    mask = torch.arange(8) < 3
    for plan in (Plan({"0": mask}), Plan().with_kept("0", mask), pickle.loads(pickle.dumps(Plan({"0": mask})))):
        with pytest.raises(PlanError, match="the plan's mask of '0' has 8 entries, the group 16"):
            ekgfx.prune(model, plan, traced)
    by_numpy = ekgfx.search(traced, strategy="uniform", importance="magnitude", flops=np.float32(0.5))
    assert by_numpy.plan == ekgfx.search(traced, strategy="uniform", importance="magnitude", flops=0.5).plan
    with pytest.raises(RecipeError, match=r"flops: '1/2' is no fraction and no amount"):
        ekgfx.search(traced, strategy="uniform", importance="magnitude", flops=Fraction(1, 2), params=0.5)
    assert ekgfx.prune(model, {"0": [0, 1]}, traced)[0].out_channels == 2
    found = ekgfx.search(traced, strategy="uniform", importance="magnitude", flops="50%")
    assert Plan.of(ekgfx.prune(model, found, traced)) == found.plan
    for plan in (None, "plan.json", 3):
        with pytest.raises(PlanError, match="is no plan; give an ekgfx.Plan"):
            ekgfx.prune(model, plan, traced)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="prune takes a traced model, not a Tensor"):
        ekgfx.prune(model, Plan(), IMAGES)  # type: ignore[arg-type]
    with pytest.raises(TraceError, match="search takes a traced model, not a Sequential: traced = ekgfx.trace"):
        ekgfx.search(model, [IMAGES], flops=0.5)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=r"has no '0.weight' \(traced: \(16, 3, 3, 3\)\); trace the model"):
        ekgfx.prune(nn.Linear(2, 2), Plan(), traced)
    with pytest.raises(PlanError, match=r"has \(2, 3, 3, 3\) as '0.weight'"):
        ekgfx.prune(ekgfx.prune(model, {"0": [0, 1]}, traced), Plan(), traced)


@pytest.mark.parametrize("rescale", [False, True])
def test_rounds_are_one_plan_in_the_originals_indices(rescale: bool) -> None:
    """By hand: of 0 2 3 7 9 11 the second round keeps 1, 2 and 5, which are 2, 3 and 11; and so on."""
    first, second, third = (Plan(kept, rescale=rescale) for kept in ROUNDS)
    whole = first.then(second).then(third)
    assert whole.kept == {"0": (2, 3, 11), "3": (1, 6, 10), "6": (0, 2, 4, 6, 9)}
    assert first.then(second.then(third)).kept == whole.kept
    model = net()
    step_by_step = model
    for plan in (first, second, third):
        step_by_step = ekgfx.prune(step_by_step, plan, example_inputs=IMAGES)
    at_once = ekgfx.prune(model, whole, example_inputs=IMAGES)
    assert torch.allclose(at_once(IMAGES), step_by_step(IMAGES), rtol=1e-12, atol=1e-12)
    assert Plan.of(step_by_step).alike(whole) and Plan.of(at_once).alike(whole)
    assert not rounds_of(model)


def test_plans_that_do_not_follow_each_other_are_refused() -> None:
    with pytest.raises(PlanError, match="keeps channel 3 of '0'; 2 are left"):
        Plan({"0": (0, 5)}).then(Plan({"0": (1, 3)}))
    with pytest.raises(PlanError, match="one of the plans rescales"):
        Plan(rescale=True).then(Plan())
    with pytest.raises(PlanError, match="groups of 'qkv' are numbered anew"):
        Plan({"qkv#0": (3,)}).then(Plan({"qkv": (1,)}))
    with pytest.raises(PlanError, match="numbered anew"):
        Plan({"a#0": (3,), "a#2": (1, 2)}).then(Plan({"a#0": (1,)}))
    with pytest.raises(PlanError, match="Sequential does not say what it was pruned by"):
        Plan.of(net())


def test_a_module_of_several_rounds_is_saved_and_loaded_from_the_original(tmp_path: Path) -> None:
    pruned = rounds(net())
    said = {"none": None, "all": [Plan(kept) for kept in ROUNDS], "joined": Plan.of(pruned)}
    for name, plan in said.items():
        ekgfx.save(pruned, tmp_path / name, plan=plan)
        assert len(read_manifest(tmp_path / name)["ancestors"]) == (0 if name == "joined" else 2)
    ekgfx.save(pruned, tmp_path / "last", plan=Plan(ROUNDS[-1]))
    assert read_manifest(tmp_path / "last")["ancestors"] == read_manifest(tmp_path / "none")["ancestors"]
    for name, original in (("none", net), ("joined", net()), ("none", lambda: rounds(net(), ROUNDS[:2]))):
        again = ekgfx.load(tmp_path / name, original, IMAGES)
        assert torch.equal(again(IMAGES), pruned(IMAGES))
        assert Plan.of(again).kept == Plan.of(pruned).kept
    with pytest.raises(PlanError, match="was pruned by another plan than the one given; leave plan= out"):
        ekgfx.save(pruned, tmp_path / "other", plan=Plan(ROUNDS[0]))
    with pytest.raises(PlanError, match="does not say what it was pruned by: pass plan="):
        ekgfx.save(net(), tmp_path / "other")
    model = net()
    ekgfx.load(tmp_path / "joined", model, IMAGES)
    assert model[0].out_channels == 16  # the user's own is left alone


def test_copies_know_what_they_were_pruned_by() -> None:
    pruned = rounds(net())
    for again in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert Plan.of(again) == Plan.of(pruned)
    assert b"ekgfx" not in pickle.dumps(pruned).replace(b"_ekgfx_plans", b"")  # to be read where there is none


class Named(nn.Module):
    """As the models of transformers: called by names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, pixels: torch.Tensor, mask: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return self.b(self.a(pixels).relu() * mask * scale)


def test_inputs_by_name_are_recorded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"mask": torch.rand(4, 1), "pixels": torch.randn(4, 6)}
    model = Named().eval()
    pruned = ekgfx.prune(model, {"a": (0, 3)}, example_inputs=inputs)
    ekgfx.save(pruned, tmp_path / "run", example_inputs=inputs)
    assert torch.equal(ekgfx.load(tmp_path / "run", Named)(**inputs), pruned(**inputs))
    assert torch.equal(ekgfx.load(tmp_path / "run", Named, inputs)(**inputs), pruned(**inputs))


def test_arguments_by_position_by_name_and_in_any_order_are_one() -> None:
    torch.manual_seed(0)
    pixels, mask = torch.randn(4, 6), torch.rand(4, 6)[:, :1]
    model = Named().eval()
    for args, kwargs in (((pixels, mask), {}), ((), {"mask": mask, "pixels": pixels}), ((pixels,), {"mask": mask})):
        network = ekgfx.trace(model, args, kwargs).subnetwork()
        for found in (network(pixels, mask), network(mask=mask, pixels=pixels), network(pixels, mask, scale=2.0)):
            assert torch.allclose(found, model(pixels, mask))
        with pytest.raises(PlanError, match="was traced without scale"):
            network(pixels, mask, scale=3.0)
        with pytest.raises(PlanError, match="cannot be called so: missing a required argument: 'mask'"):
            network(pixels)
    with pytest.raises(PlanError, match=r"traced with 2.0, it was called with 3.0"):
        ekgfx.trace(model, (pixels, mask, 2.0)).subnetwork()(pixels, mask, 3.0)
