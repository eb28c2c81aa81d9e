"""BatchNorm's running statistics for a cut network: which, whose, on what batches; what is said and put back."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import DataError
from ekgfx.models import digits_cnn


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 4)
    )


def images(count: int = 3, size: int = 8) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randn(size, 1, 8, 8, generator=draw) * 2 + 1 for _ in range(count)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def check_statistics(norm: nn.Module, seen: list[Tensor]) -> None:
    """The mean, over everything that the norm saw at once, of mean and unbiased variance."""
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-5, atol=1e-6)


def test_they_are_the_mean_over_the_batches() -> None:
    model = small().train()
    before = state(model)
    assert ekgfx.calibrate(model, images(), limit=2) is model
    check_statistics(model[1], [model[0](x) for x in images()[:2]])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert model[1].momentum == 0.1 and model[1].num_batches_tracked == 2
    assert all(module.training for module in model.modules())
    assert not model[1]._forward_pre_hooks


def test_a_short_batch_counts_by_its_samples() -> None:
    model, (first, second) = (
        ekgfx.calibrate(small(), [images()[0], images()[1][:2]])[:2],
        (images()[0], images()[1][:2]),
    )
    found = [model[0](x) for x in (first, second)]
    mean = (8 * found[0].mean((0, 2, 3)) + 2 * found[1].mean((0, 2, 3))) / 10
    variance = (8 * found[0].var((0, 2, 3)) + 2 * found[1].var((0, 2, 3))) / 10
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var, variance, rtol=1e-5, atol=1e-6)


def test_as_pytorch_does_it_itself() -> None:
    """Norms one after the other: momentum None is PyTorch's own plain mean."""
    torch.manual_seed(0)
    ours, theirs = digits_cnn().eval(), digits_cnn()
    theirs.load_state_dict(ours.state_dict())
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    theirs.train()
    with torch.no_grad():
        for x in images():
            theirs(x)
    ekgfx.calibrate(ours, images())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    assert not any(module.training for module in ours.modules())


class Shared(nn.Module):
    """A norm that is called twice with different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(3 * x + 1) + self.norm(x)


def test_a_norm_that_is_called_twice_averages_over_its_calls() -> None:
    model = ekgfx.calibrate(Shared(), images())
    check_statistics(model.norm, [y for x in images() for y in (3 * x + 1, x)])
    assert model.norm.momentum is None and model.norm.num_batches_tracked == 6


@pytest.mark.parametrize(
    "norm",
    [
        BatchNormAct2d(6),
        EvoNorm2dB0(6),
        nn.InstanceNorm2d(6, track_running_stats=True),
        nn.BatchNorm2d(6, affine=False),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_every_norm_with_running_averages(norm: nn.Module) -> None:
    """Whatever its statistics are, of one batch they are what training on that batch alone with momentum 1 leaves."""
    import copy

    model = nn.Sequential(nn.Conv2d(1, 6, 3), copy.deepcopy(norm))
    expected = copy.deepcopy(model).train()
    expected[1].momentum = 1.0
    with torch.no_grad():
        expected(images()[0])
    for buffer in model[1].buffers():
        if buffer.is_floating_point():
            buffer.fill_(float("nan"))  # nothing is left of the old
    ekgfx.calibrate(model, images(1))
    for name, value in expected.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(model.state_dict()[name], value)


class Branches(nn.Module):
    """An auxiliary head that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.auxiliary, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.stem(x))
        out = self.head(x.mean((2, 3)))
        return (out, self.auxiliary(x)) if self.training else out


def test_what_is_not_run_keeps_its_own_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model = Branches()
    model.auxiliary.running_mean.fill_(7.0)
    model.auxiliary.running_var.fill_(5.0)
    ekgfx.calibrate(model, images())
    assert (model.auxiliary.running_mean == 7).all() and (model.auxiliary.running_var == 5).all()
    (record,) = caplog.records
    assert record.getMessage() == (
        "1 norms keep their old running statistics, since they are not run in evaluation: auxiliary"
    )


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d: buffers that nothing changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()


def test_frozen_norms_are_named(caplog: pytest.LogCaptureFixture) -> None:
    ekgfx.calibrate(nn.Sequential(Frozen(), nn.BatchNorm2d(1)), images())
    (record,) = caplog.records
    assert record.getMessage().endswith("since they have no momentum to estimate them by: 0")


def test_without_norms_batches_are_not_read(caplog: pytest.LogCaptureFixture) -> None:
    class Unread:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("a model without BatchNorm needs no data")

    with caplog.at_level(logging.INFO, "ekgfx"):
        ekgfx.calibrate(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), Unread())
    assert [record.levelno for record in caplog.records] == [logging.INFO]


class Named(nn.Module):
    """Two inputs by name, as Hugging Face's models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, pixel_values: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = pixel_values if scale is None else pixel_values * scale
        return {"logits": self.norm(x).flatten(1)}


class Whole(nn.Module):
    """A dictionary as its one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.norm(batch["x"] * 2)


def test_batches_of_every_form() -> None:
    x, two = images(), torch.tensor(2.0)
    labels = torch.arange(8) % 4
    forms: list[list[Any]] = [
        [batch * 2 for batch in x],
        [(batch * 2,) for batch in x],
        [[batch * 2, labels, torch.arange(8)] for batch in x],
        [((batch, two), labels) for batch in x],
        [((batch, two), None) for batch in x],
        [{"pixel_values": batch, "scale": two, "labels": labels} for batch in x],
        [({"pixel_values": batch, "scale": two}, labels) for batch in x],
    ]
    for batches in forms:
        check_statistics(ekgfx.calibrate(Named(), batches).norm, [batch * 2 for batch in x])
    check_statistics(ekgfx.calibrate(Whole(), [{"x": batch} for batch in x]).norm, [batch * 2 for batch in x])
    check_statistics(ekgfx.calibrate(Named(), iter(forms[0])).norm, [batch * 2 for batch in x])


def test_errors_leave_the_model_as_it_was() -> None:
    def broken() -> Iterator[Tensor]:
        yield images()[0]
        raise OSError("no such file")

    model = nn.Sequential(small(), nn.BatchNorm1d(4))
    before = state(model)
    for batches, error, said in (
        ([], DataError, "no batch to calibrate on"),
        (broken(), OSError, "no such file"),
        ([torch.full((8, 1, 8, 8), float("nan"))], DataError, r"statistics of 0\.1 are not finite"),
        ([images()[0], images()[1][:1]], DataError, "batch 2 is too small to have statistics"),
    ):
        with pytest.raises(error, match=said):
            ekgfx.calibrate(model, batches)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model[1].momentum == 0.1 and all(module.training for module in model.modules())
        assert not model[1]._forward_pre_hooks


def test_sorted_batches_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    def said(labels: Tensor, limit: int | None = None) -> list[str]:
        caplog.clear()
        ekgfx.calibrate(small(), list(zip(images(6), labels.split(8), strict=True)), limit=limit)
        return [record.getMessage() for record in caplog.records]

    in_order = torch.arange(48) // 12
    assert len(said(in_order)) == 1 and "sorted by class" in said(in_order)[0]
    (first,) = said(torch.arange(48) // 24, limit=2)
    assert first.startswith("the batches to calibrate on: all 16 samples are of class 0, of 4. BatchNorm takes")
    assert not said(torch.arange(48) % 4)


def test_prune_calibrates() -> None:
    torch.manual_seed(0)
    model = digits_cnn().eval()
    traced = ekgfx.trace(model, torch.zeros(2, 1, 8, 8))
    group = next(iter(traced.groups.values()))
    plan = ekgfx.Plan({group.name: tuple(range(group.size // 2))})
    before = state(model)
    by_hand = ekgfx.calibrate(ekgfx.prune(model, plan, traced), images())
    at_once = ekgfx.prune(model, plan, traced, calibrate=images())
    for name, value in by_hand.state_dict().items():
        assert torch.equal(at_once.state_dict()[name], value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = ekgfx.prune(model, plan, traced).state_dict()
    assert any(not torch.equal(plain[name], value) for name, value in by_hand.state_dict().items())
