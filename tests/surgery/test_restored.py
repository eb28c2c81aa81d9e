"""Running statistics that half precision could not hold: which are estimated, from what, and what stays."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import DataError
from ekgfx.models import digits_cnn
from ekgfx.pipeline import stages
from ekgfx.pipeline.job import Job, Silent
from ekgfx.runs.directory import Run
from ekgfx.settings.recipe import Recipe
from ekgfx.training.evaluation import evaluate
from tests.surgery.test_calibrate import images, small, state


class Unread:
    def __iter__(self) -> None:
        raise AssertionError("the batches are read")


class Notes(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)


def test_only_what_is_lost_is_estimated() -> None:
    """By hand: the mean of the batches' own variance (or mean) in that channel; the rest of the norm stays."""
    model = small().train()
    norm = model[1]
    norm.running_mean[4], norm.running_var[1], norm.running_var[5] = float("nan"), float("inf"), float("nan")
    before, shown = state(model), images()
    found = ekgfx.restore_statistics(model, shown)
    assert found == ("1.running_mean (1 of 6)", "1.running_var (2 of 6)")
    seen = [model[0](x) for x in shown]
    mean, var = (torch.stack([part(x) for x in seen]).mean(0) for part in (_mean, _var))
    for name, value in model.state_dict().items():
        expected = before[name].clone()
        if name == "1.running_mean":
            expected[4] = mean[4]
        if name == "1.running_var":
            expected[1], expected[5] = var[1], var[5]
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert model.training and norm.training and norm.momentum == 0.1


def _mean(x: Tensor) -> Tensor:
    return x.mean((0, 2, 3))


def _var(x: Tensor) -> Tensor:
    return x.var((0, 2, 3))


def test_a_norm_behind_a_restored_one_keeps_its_own() -> None:
    """The second norm computes with its running statistics, and so does whoever is asked about them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)).eval()
    model[1].running_var[0] = float("inf")
    second = copy.deepcopy(model[3])
    ekgfx.restore_statistics(model, images())
    assert model[1].running_var.isfinite().all()
    assert torch.equal(model[3].running_var, second.running_var) and model[3].num_batches_tracked == 0


class Frozen(nn.Module):
    """A norm that keeps running statistics, and has no momentum to estimate them by."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_var", torch.tensor([1.0, float("inf")]))

    def forward(self, x: Tensor) -> Tensor:
        return x / self.running_var.sqrt()[:, None, None]


def test_what_cannot_be_estimated_is_not_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), Frozen()).eval()
    model[1].running_var[0] = float("inf")
    assert ekgfx.restore_statistics(model, images()) == ("1.running_var (1 of 2)",)
    assert model[2].running_var[1].isinf()
    assert "have no momentum to estimate them by: 2" in caplog.text


class TwoHeads(nn.Module):
    """The second one is for training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(x) + self.other(x) if self.training else self.norm(x)


def test_a_norm_that_evaluation_does_not_run_keeps_none_from_being_restored(caplog: pytest.LogCaptureFixture) -> None:
    model = TwoHeads().eval()
    model.norm.running_var[0] = model.other.running_var[1] = float("inf")
    assert ekgfx.restore_statistics(model, images()) == ("norm.running_var (1 of 2)",)
    assert model.norm.running_var.isfinite().all() and model.other.running_var[1].isinf()
    assert "are not run in evaluation: other" in caplog.text


def test_where_nothing_is_lost_no_image_is_read() -> None:
    assert ekgfx.restore_statistics(small(), Unread()) == ()  # type: ignore[arg-type]


def test_a_network_that_diverged_is_left_as_it_was() -> None:
    model = small()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    model[1].running_var.fill_(float("nan"))
    with pytest.raises(DataError, match="the statistics of 1 are not finite; check the images and the weights for NaN"):
        ekgfx.restore_statistics(model, images())
    assert model[1].running_var.isnan().all() and model[1].running_mean.isfinite().all()


def test_the_command_restores_them_before_it_measures_anything(tmp_path: Path) -> None:
    """A variance beyond half precision: the network comes near the one whose file could hold it."""
    torch.manual_seed(0)
    model = digits_cnn()
    ekgfx.finetune(model, ekgfx.data.load("digits"), epochs=2, batch_size=64, lr=0.05, val_fraction=0)
    norm = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():  # the same function with large numbers in one channel
        conv.weight[0] *= 1e3
        norm.running_mean[0] *= 1e3
        norm.running_var[0] *= 1e6
    scores, notes = {}, Notes()
    for name, lost in (("whole", False), ("lost", True)):
        if lost:
            norm.running_var[0] = float("inf")
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
        asked = {"model": "ekgfx.models:digits_cnn", "data": "digits", "weights": str(tmp_path / f"{name}.pth")}
        asked |= {"search": {"flops": 0.8, "strategy": "uniform", "importance": "magnitude"}}
        with Run.create(tmp_path / name, settings=Recipe.from_json(asked).to_json()) as run:
            job = Job.of(run, notes)
            stages.prepare(job)
            scores[name] = run.manifest["results"]["before"]
            again = Job.of(run, Silent())  # one that goes on has them from the run
            assert all(value.isfinite().all() for value in again.built.model.state_dict().values())
    (said,) = [line for line in notes.said if "the weights' file holds no number" in line]
    assert "running_var (1 of " in said
    model.eval()
    unrestored = evaluate(model, ekgfx.data.load("digits").loader("test", 64)).loss
    whole, lost = scores["whole"]["loss"], scores["lost"]["loss"]
    assert abs(lost - whole) < 0.2 * abs(unrestored - whole)
