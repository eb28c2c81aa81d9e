"""A repair never makes things worse: whatever the images are like, and it says so where it gained nothing."""

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx import data
from ekgfx.data.batches import Inputs
from ekgfx.errors import DataError, PruneError
from ekgfx.models import digits_cnn
from ekgfx.repair.batch_norm import Estimate, settle
from ekgfx.repair.images import gather
from ekgfx.repair.judge import Judge, Judgement
from ekgfx.repair.moments import Moments
from ekgfx.repair.solve import _solve, refit

PLAIN = nn.Identity()
"""A model that lies on the CPU and takes anything."""


def test_two_by_two_by_hand() -> None:
    """Inputs (1, 0), (−1, 0), (0, 2), (0, −2) have the Gram matrix diag(2, 8), d = 5. The output lacks 3·x₁ − x₂: its
    cross moments are (6, −8), so that λ = 0.2 (λ·d = 1) gives Δ = (6/3, −8/9)."""
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 2], [0, -2]], dtype=torch.float64)[:, None]
    r = 3 * x[:, :, :1] - x[:, :, 1:]
    moments = Moments.empty(torch.zeros(1, 2, dtype=torch.float64), 1)
    moments.add(x, r, r)
    assert moments.gram.tolist() == [[[2, 0], [0, 8]]] and moments.cross.tolist() == [[[6, -8]]]
    change = _solve(moments.gram, moments.cross, torch.tensor([[0.2 * 5]], dtype=torch.float64))
    torch.testing.assert_close(change, torch.tensor([[[2.0, -8 / 9]]], dtype=torch.float64))
    found = refit(moments, moments, offset=True)
    torch.testing.assert_close(found.change, torch.tensor([[[3.0, -1.0]]], dtype=torch.float64))


def test_moments_after_a_change_are_those_of_what_is_lacking_then() -> None:
    torch.manual_seed(0)
    x, r = torch.randn(50, 2, 3, dtype=torch.float64) + 1, torch.randn(50, 2, 4, dtype=torch.float64)
    change, offset = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    moved, expected = (Moments.empty(x.mean(0), 4) for _ in range(2))
    moved.add(x, r, r)
    moved.shift_rest(change, offset)
    expected.add(x, r - torch.einsum("god,sgd->sgo", change, x) - offset, r)
    for name in ("cross", "rest", "squares"):
        torch.testing.assert_close(getattr(moved, name), getattr(expected, name))


def test_the_ridge_holds_back_where_held_out_positions_say_so() -> None:
    """What is lacking has nothing to do with the inputs: no change is better than the one that fits the noise."""
    generator = torch.Generator().manual_seed(0)
    fit, held = (Moments.empty(torch.zeros(1, 20, dtype=torch.float64), 1) for _ in range(2))
    for moments, count in ((fit, 25), (held, 1000)):
        x = torch.randn(count, 1, 20, dtype=torch.float64, generator=generator)
        moments.add(x, torch.randn(count, 1, 1, dtype=torch.float64, generator=generator), x[:, :, :1])
    found = refit(fit, held, offset=False)
    assert found is None or (found.ridge > 1 and found.held_after < found.held_before)


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A network that has learned the digits, and images: to repair on, and to judge by."""
    torch.manual_seed(0)
    model, loaded = digits_cnn(), data.load("digits")
    ekgfx.finetune(model, loaded, epochs=4, lr=0.05, augment=False)
    images = torch.cat([batch.images for batch in loaded.loader("train", 256)])
    return model.eval(), images, torch.cat([batch.images for batch in loaded.loader("test", 256)])


def cut(model: nn.Module, images: Tensor) -> tuple[ekgfx.TracedModel, ekgfx.Plan, nn.Module]:
    traced = ekgfx.trace(model, images[:2])
    plan = ekgfx.search(traced, flops=0.5, strategy="uniform", importance="magnitude").plan
    return traced, plan, ekgfx.prune(model, plan, traced).eval()


def test_a_trained_network_gets_much_of_its_answers_back(digits) -> None:
    model, images, unseen = digits
    traced, plan, pruned = cut(model, images)
    judge = Judge(model, [Inputs.of(unseen)])
    before = judge(pruned)
    found = ekgfx.repair(pruned, traced, plan, images)
    after = judge(pruned)
    assert after.error < 0.5 * before.error and after.agreement > before.agreement
    assert found.kept and found.after.error < found.before.error
    assert all(layer.after <= layer.before for layer in found.layers)
    assert found.images == 256 and found.held_out == 51 and not found.skipped
    assert "KL divergence" in str(found) and "equal answers" in str(found)


def test_it_is_deterministic_and_labels_are_not_looked_at(digits) -> None:
    model, images, _ = digits
    traced, plan, pruned = cut(model, images)
    twin = copy.deepcopy(pruned)
    ekgfx.repair(pruned, traced, plan, images[:100])
    ekgfx.repair(twin, traced, plan, [(part, None) for part in images[:100].split(30)])
    assert all(torch.equal(a, b) for a, b in zip(pruned.state_dict().values(), twin.state_dict().values(), strict=True))


def with_nan(images: Tensor) -> Tensor:
    spoiled = images[:40].clone()
    spoiled[3, 0, 2, 2] = float("nan")
    return spoiled


CASES = {
    "one": lambda images: images[:1],
    "two": lambda images: images[:2],
    "less than a batch": lambda images: images[:7],
    "constant": lambda images: torch.arange(40.0).view(40, 1, 1, 1).expand(40, *images.shape[1:]),
    "all the same": lambda images: images[:1].expand(40, -1, -1, -1),
    "not a number": with_nan,
    "noise": lambda images: torch.randn(40, *images.shape[1:], generator=torch.Generator().manual_seed(0)),
    "upside down": lambda images: images[:200].flip(2),
    "huge": lambda images: images[:40] * 1e6,
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_never_worse_on_held_out_images(digits, case: str) -> None:
    model, images, _ = digits
    traced, plan, pruned = cut(model, images)
    given = CASES[case](images)
    before = {name: tensor.clone() for name, tensor in pruned.state_dict().items()}
    found = ekgfx.repair(pruned, traced, plan, given)
    held = gather(given, 32, 256, PLAIN).held
    if held:
        after = Judge(model, held)(pruned)
        assert not found.before.better(after)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in pruned.state_dict().values())
    if not found.kept:
        assert "the network is as it was" in str(found)
        assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.state_dict().items())


def test_what_is_wrong_with_images_is_said(digits) -> None:
    model, images, _ = digits
    traced, plan, pruned = cut(model, images)
    assert "1 image left out: not finite" in str(ekgfx.repair(pruned, traced, plan, with_nan(images)))
    flat = str(ekgfx.repair(pruned, traced, plan, CASES["constant"](images)))
    assert "40 images left out: of one value throughout" in flat and "no usable images" in flat
    assert "1 usable image: a repair needs one to fit on" in str(ekgfx.repair(pruned, traced, plan, images[:1]))


class Named(nn.Module):
    """Two inputs, of which one comes by name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 12), nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor, *, beside: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.first(x) + self.second(beside)))


@pytest.mark.parametrize("labelled", [False, True])
def test_inputs_by_name_are_fitted_as_those_in_order_are(labelled: bool) -> None:
    """A removed channel that is twice a kept one is given back exactly."""
    torch.manual_seed(0)
    model = Named().double().eval()
    with torch.no_grad():
        for layer in (model.first, model.second):
            layer.weight[6:], layer.bias[6:] = 2 * layer.weight[:6], 2 * layer.bias[:6]
    inputs = {"x": torch.randn(40, 6).double(), "beside": torch.randn(40, 6).double()}
    traced = ekgfx.trace(model, {name: tensor[:2] for name, tensor in inputs.items()})
    (group,) = traced.groups
    plan = ekgfx.Plan({group: tuple(range(6))})
    pruned = ekgfx.prune(model, plan, traced)
    found = ekgfx.repair(pruned, traced, plan, [(inputs, torch.zeros(40))] if labelled else [inputs])
    assert found.kept and found.images == 40
    torch.testing.assert_close(pruned(**inputs), model(**inputs), atol=1e-8, rtol=0)


def test_an_input_that_is_no_row_for_every_sample_is_refused_in_a_line() -> None:
    with pytest.raises(DataError, match=r"an input of shape \(1, 6\) beside 4 samples: .* sample by sample"):
        gather([{"x": torch.zeros(4, 6), "beside": torch.zeros(1, 6)}], 2, 4, PLAIN)


def test_a_network_of_another_plan_is_refused(digits) -> None:
    model, images, _ = digits
    traced, plan, _ = cut(model, images)
    with pytest.raises(PruneError, match="is not what the plan leaves: .*; pass the network that ekgfx.prune made"):
        ekgfx.repair(model, traced, plan, images)


def test_a_repair_that_was_interrupted_ends_as_if_it_had_not_been(digits, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys.modules["ekgfx.repair.progress"], "SECONDS", -1)
    model, images, _ = digits
    traced, plan, pruned = cut(model, images)
    cut_anew, seen = copy.deepcopy(pruned), []
    ekgfx.repair(pruned, traced, plan, images[:60])

    def stop(layer, number, count):
        seen.append(number)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ekgfx.repair(copy.deepcopy(cut_anew), traced, plan, images[:60], checkpoint=tmp_path / "c", on_layer=stop)
    again = []
    found = ekgfx.repair(
        cut_anew, traced, plan, images[:60], checkpoint=tmp_path / "c", on_layer=lambda *done: again.append(done[1])
    )
    assert again[0] == seen[-1] and len(found.layers) == len(again) + 1  # the first was not done again
    for a, b in zip(pruned.state_dict().values(), cut_anew.state_dict().values(), strict=True):
        assert torch.equal(a, b)


class Mixed(nn.Module):
    """What cannot be refitted: a weight that is computed, one that is read otherwise too, and a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.tied = nn.Linear(8, 8)
        self.recurrent, self.last = nn.GRU(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.normed(self.first(x).relu()).relu()
        x = self.tied(x) + self.tied.weight[0]
        return self.last(self.recurrent(x)[0]).mean(1)


def test_what_is_not_refitted_is_listed_with_the_reason() -> None:
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(40, 5, 6)
    traced = ekgfx.trace(model, x[:2])
    (name, *_) = traced.groups
    plan = ekgfx.Plan({name: tuple(range(5))})
    pruned = ekgfx.prune(model, plan, traced)
    found = ekgfx.repair(pruned, traced, plan, x)
    said = {skipped.name: skipped.reason for skipped in found.skipped}
    assert "recurrent" in said["recurrent"]
    assert any("computed from parameters" in reason for reason in said.values())
    assert "is read by" in said["tied"]


def test_a_network_in_half_precision_is_repaired_too(digits) -> None:
    model, images, _ = digits
    half, few = copy.deepcopy(model).bfloat16(), images[:100].bfloat16()
    traced, plan, pruned = cut(half, few)
    found = ekgfx.repair(pruned, traced, plan, few)
    assert found.kept and all(p.dtype == torch.bfloat16 for p in pruned.parameters())


class Again(nn.Module):
    """One weight, used twice, before an operator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.second(self.first(x).tanh()).tanh()).tanh())


def test_what_follows_a_weight_of_several_uses_is_refitted_to_what_all_of_them_compute() -> None:
    """The second use's refit changes what the first computes, too. The error that is said of the operator behind both
    is the network's only if the operator was given what the network computes."""
    torch.manual_seed(0)
    model, x = Again().double().eval(), torch.randn(200, 6, dtype=torch.float64)
    traced = ekgfx.trace(model, x[:2])
    plan = ekgfx.Plan({name: tuple(range(5)) for name, group in traced.groups.items() if group.size == 8})
    pruned = ekgfx.prune(model, plan, traced)
    found = ekgfx.repair(pruned, traced, plan, x)
    *shared, head = found.layers
    assert [layer.done for layer in shared[-2:]] == ["refit", "refit"] and head.name == "head"
    expected = model(x[4::5])
    lacking = (pruned(x[4::5]) - expected).square().sum() / (expected - expected.mean(0)).square().sum()
    assert head.after == pytest.approx(lacking.item(), rel=1e-9)


def distance(network: nn.Module, mean: Tensor) -> Judgement:
    return Judgement(float((network[1].running_mean - mean).abs().sum()), None)


def anew(network: nn.Module) -> dict[str, Estimate]:
    return {"re-estimated": lambda batches: ekgfx.calibrate(network, batches)}


@pytest.mark.parametrize(
    ("wanted", "way", "share"), [(2.0, "corrected", 1.0), (2.5, "re-estimated", 0.5), (-1, None, 0)]
)
def test_the_way_and_the_share_of_statistics_are_chosen_together(wanted: float, way: str | None, share: float) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()

    def impossible(batches: list[Any]) -> None:
        raise DataError("no statistics")

    ways: dict[str, Estimate] = {
        "impossible": impossible,
        "corrected": lambda batches: network[1].running_mean.fill_(2.0),
        "re-estimated": lambda batches: network[1].running_mean.fill_(5.0),
    }
    images = gather(torch.randn(26, 3, 6, 6), 8, 256, PLAIN)
    with torch.no_grad():
        settled = settle(network, lambda module: distance(module, torch.full((8,), wanted)), images, ways)
    assert (settled.way, settled.share, settled.note) == (way, share, None)
    assert (network[1].running_mean == max(wanted, 0)).all()


def test_smaller_shares_are_not_judged_where_more_was_better() -> None:
    """Of either way 100% are nearer than 75%, so that 50 and 25% are left out; the second is the nearer of no two."""
    network, judged = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), []
    ways: dict[str, Estimate] = {
        "corrected": lambda batches: network[1].running_mean.fill_(4.0),
        "re-estimated": lambda batches: network[1].running_mean.fill_(4.25),
    }

    def judge(module: nn.Module) -> Judgement:
        judged.append(float(network[1].running_mean[0]))
        return distance(module, torch.full((8,), 4.0))

    with torch.no_grad():
        settled = settle(network, judge, gather(torch.randn(26, 3, 6, 6), 8, 256, PLAIN), ways)
    assert (settled.way, settled.share) == ("corrected", 1.0)
    assert judged == [0.0, 4.0, 3.0, 4.25, 0.75 * 4.25, 4.0]


@pytest.mark.parametrize("wanted", ["fit", "all"])
def test_statistics_are_chosen_without_the_images_that_judge_and_taken_of_all(wanted: str) -> None:
    """The judge wants one of two means: that of the fitted images, or that of all. What it says of the share is of the
    fitted images' in both cases; the network gets that of all, unless the judge says it is worse."""
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).double().eval(), torch.randn(26, 3, 6, 6).double()
    images = gather(x, 8, 256, PLAIN)
    means = {"fit": torch.cat([batch.args[0] for batch in images.fit]), "all": x}
    with torch.no_grad():
        means = {name: network[0](part).mean((0, 2, 3)) for name, part in means.items()}
        settled = settle(network, lambda module: distance(module, means[wanted]), images, anew(network))
    assert settled.share == 1.0
    torch.testing.assert_close(network[1].running_mean, means[wanted])
    assert settled.judgement.error == pytest.approx(float((means["fit"] - means[wanted]).abs().sum()), abs=1e-12)


def test_statistics_that_are_not_finite_are_replaced() -> None:
    """A variance of 65520 or more is infinite in half precision: the channel says nothing until it is re-estimated."""
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval(), torch.randn(26, 3, 6, 6)
    network[1].running_var[2] = torch.inf
    with torch.no_grad():
        mean = network[0](x).mean((0, 2, 3))

        def judge(module: nn.Module) -> Judgement:
            return distance(module, mean) if bool(module(x).isfinite().all()) else Judgement(None, None)

        settled = settle(network, judge, gather(x, 8, 256, PLAIN), anew(network))
    assert settled.share == 1.0 and bool(network[1].running_var.isfinite().all())


def test_batches_are_as_equal_as_can_be() -> None:
    images = gather(torch.randn(26, 3, 6, 6), 8, 256, PLAIN)
    assert [batch.samples for batch in images.fit] == [7, 7, 7] and [batch.samples for batch in images.held] == [5]


def test_statistics_that_cannot_be_estimated_are_kept_and_it_is_said() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval(), torch.randn(2, 6)
    traced = ekgfx.trace(model, torch.randn(2, 6))
    (name,) = traced.groups
    plan = ekgfx.Plan({name: tuple(range(5))})
    pruned = ekgfx.prune(model, plan, traced)
    assert "BatchNorm keeps its statistics: batch 1 is too small" in str(ekgfx.repair(pruned, traced, plan, x))
