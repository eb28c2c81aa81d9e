"""BatchNorm's running statistics for a cut network: which, whose, on what batches; what is said and put back."""

import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0
from torch import Tensor, nn

import ekgfx
from ekgfx.bank.norms import noted, statistics
from ekgfx.data.batches import Inputs
from ekgfx.errors import DataError, PlanError
from ekgfx.execution.averages import Statistics, corrected
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
    by_hand = ekgfx.calibrate(ekgfx.prune(model, plan, traced), images(), traced=traced)
    at_once = ekgfx.prune(model, plan, traced, calibrate=images())
    for name, value in by_hand.state_dict().items():
        assert torch.equal(at_once.state_dict()[name], value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    plain = ekgfx.prune(model, plan, traced).state_dict()
    assert any(not torch.equal(plain[name], value) for name, value in by_hand.state_dict().items())


def test_a_cut_model_in_place_is_estimated_anew() -> None:
    model = digits_cnn().eval()
    traced = ekgfx.trace(model, torch.zeros(2, 1, 8, 8))
    plan = ekgfx.Plan(dict.fromkeys(traced.groups, (0, 1)))
    expected = ekgfx.calibrate(ekgfx.prune(model, plan, traced), images())
    found = ekgfx.prune(model, plan, traced, inplace=True, calibrate=images())
    torch.testing.assert_close(found.state_dict(), expected.state_dict())


def sequential(*modules: nn.Module) -> nn.Module:
    """In float64, with running averages of other images than `images`."""
    torch.manual_seed(1)
    model = nn.Sequential(*modules).double().train()
    for x in images(4):
        model(0.5 * x.double() - 1)
    return model.eval()


def cut_in_half(model: nn.Module, **options: Any) -> tuple[ekgfx.TracedModel, nn.Module]:
    traced = ekgfx.trace(model, images(1)[0].to(next(model.parameters()).dtype))
    plan = ekgfx.Plan({name: tuple(range(0, group.size, 2)) for name, group in traced.groups.items()}, **options)
    return traced, ekgfx.prune(model, plan, traced)


def test_one_channel_by_hand() -> None:
    """y = x + 2x becomes y = x: a third. What the norm says of it stays the same, whatever images show it."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False), nn.BatchNorm2d(1, eps=1e-12))
    model = model.double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
        model[1].weight.fill_(1.0)
        model[2].running_mean.fill_(6.0)
        model[2].running_var.fill_(18.0)
    traced, pruned = cut_in_half(model)
    shown = [torch.tensor([0.0, 2.0]).double().view(2, 1, 1, 1)]  # y: 0 and 6, then 0 and 2
    ekgfx.calibrate(pruned, shown, traced=traced)
    torch.testing.assert_close(pruned[2].running_mean, torch.tensor([2.0]).double(), rtol=1e-10, atol=0)
    torch.testing.assert_close(pruned[2].running_var, torch.tensor([2.0]).double(), rtol=1e-10, atol=0)
    torch.testing.assert_close(pruned(shown[0]), model(shown[0]), rtol=1e-10, atol=1e-10)
    plain = ekgfx.calibrate(pruned, shown)
    assert plain[2].running_mean.item() == 1 and plain[2].running_var.item() == 2


def test_the_correction() -> None:
    def one(mean: float, var: float) -> Statistics:
        return Statistics(torch.tensor([mean]).double(), torch.tensor([var]).double())

    assert corrected(one(1, 4), one(0, 1), one(2, 9), 0.0) == one(5, 36)  # one deviation off, which is three now
    assert corrected(one(1, 3), one(0, 0), one(2, 15), 1.0) == one(6, 63)  # 1 + 15 where there was 1
    assert corrected(one(0.1, 0.3), one(0.7, 0.9), one(0.7, 0.9), 1e-5) == one(0.1, 0.3)  # nothing was cut
    assert corrected(one(0.5, 2), one(0.5, 2), one(3, 8), 0.0) == one(3, 8)  # averages of these images
    assert corrected(one(1, 4), one(2, 0), one(3, 5), 0.0) == one(2, 4)  # nothing varied, and nothing can be said
    assert corrected(one(0, math.inf), one(0, 1), one(3, 5), 0.0) == one(3, 5)  # they say nothing
    assert corrected(one(0, 0.1), one(0, 9), one(0, 0), 1.0).var == 0  # (0.1 + 1) / 10 - 1 is no variance


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(6),
        BatchNormAct2d(6),
        EvoNorm2dB0(6),
        nn.InstanceNorm2d(6, track_running_stats=True),
        nn.BatchNorm2d(6, affine=False, momentum=None),
    ],
    ids=lambda norm: type(norm).__name__ if isinstance(norm, nn.Module) else str(norm)[6:],
)
def test_where_nothing_is_cut_nothing_changes(norm: nn.Module, dtype: torch.dtype) -> None:
    import copy

    model = sequential(nn.Conv2d(1, 6, 3), copy.deepcopy(norm), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)).to(dtype)
    traced = ekgfx.trace(model, images()[0].to(dtype))
    pruned = ekgfx.prune(model, ekgfx.Plan(), traced, calibrate=[x.to(dtype) for x in images()])
    for name, value in model.state_dict().items():
        assert torch.equal(pruned.state_dict()[name], value), name


@pytest.mark.parametrize("split", [[8], [3, 5]])
def test_the_norms_behind_a_norm_get_what_they_will_get(split: list[int]) -> None:
    """The bank computes the same on the traced graph; it takes variances of all samples, and biased ones."""
    model = sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    traced, pruned = cut_in_half(model)
    parts = images()[0].double().split(split)
    ekgfx.calibrate(pruned, parts, traced=traced)
    shown = [Inputs.of(part) for part in parts]
    kept = traced.groups.kept(ekgfx.Plan.of(pruned))
    known = list(statistics(traced, kept, shown, noted(traced, shown)).values())
    close = {"rtol": 1e-4, "atol": 1e-6} if len(split) == 1 else {"rtol": 0.1, "atol": 0.05}
    for norm, (mean, var) in zip((pruned[1], pruned[4]), known, strict=True):
        torch.testing.assert_close(norm.running_mean, mean, **close)
        torch.testing.assert_close(norm.running_var, var, **close)


def test_a_short_batch_counts_by_its_samples_in_the_correction() -> None:
    """y = relu(x) + relu(-2x) becomes relu(x), whose share of y is another one in each of the batches."""
    layers = nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 1, 1, bias=False), nn.BatchNorm2d(1, eps=1e-12)
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
        model[2].weight.fill_(1.0)
        model[3].running_mean.fill_(1.0)
        model[3].running_var.fill_(2.0)
    draw = torch.Generator().manual_seed(0)
    shown = [torch.randn(6, 1, 3, 3, generator=draw).double(), torch.randn(2, 1, 3, 3, generator=draw).double() + 2]
    traced, pruned = cut_in_half(model)
    ekgfx.calibrate(pruned, shown, traced=traced)

    def whole(parts: list[torch.Tensor]) -> Statistics:
        return Statistics(*((6 * a + 2 * b) / 8 for a, b in zip(*([x.mean(), x.var()] for x in parts), strict=True)))

    old = Statistics(torch.tensor(1.0).double(), torch.tensor(2.0).double())
    full, cut = whole([x.relu() + (-2 * x).relu() for x in shown]), whole([x.relu() for x in shown])
    expected = corrected(old, full, cut, 1e-12)
    torch.testing.assert_close(pruned[3].running_mean[0], expected.mean, rtol=1e-10, atol=0)
    torch.testing.assert_close(pruned[3].running_var[0], expected.var, rtol=1e-10, atol=0)


def test_kernels_that_keep_their_norm_change_nothing() -> None:
    """A BatchNorm takes the scale of a kernel away, also where its averages are of other images."""
    x = images()[0].double()
    said = []
    for rescale in (False, True):
        torch.manual_seed(2)
        model = sequential(
            *(nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6, eps=1e-12), nn.ReLU()),
            *(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4, eps=1e-12)),
        )
        traced, pruned = cut_in_half(model, rescale=rescale)
        said.append(ekgfx.calibrate(pruned, [part.double() for part in images()], traced=traced)(x))
    torch.testing.assert_close(said[0], said[1], rtol=1e-9, atol=1e-9)


def test_a_norm_that_is_called_twice_is_corrected_call_by_call() -> None:
    shared = Shared()
    shared.norm = nn.BatchNorm2d(4)
    model = sequential(nn.Conv2d(1, 4, 1), shared, nn.Conv2d(4, 2, 1))
    traced, pruned = cut_in_half(model)
    ekgfx.calibrate(pruned, [x.double() for x in images()], traced=traced)
    for name in ("running_mean", "running_var"):  # what is kept of its channels is as before
        found, expected = pruned[1].norm.get_buffer(name), shared.norm.get_buffer(name)[::2]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_what_cannot_be_corrected() -> None:
    model = sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4))
    traced, pruned = cut_in_half(model)
    before = {id(module): state(module) for module in (model, pruned)}
    with pytest.raises(PlanError, match=r"takes what ekgfx\.prune made"):
        ekgfx.calibrate(model, [x.double() for x in images()], traced=traced)
    with pytest.raises(DataError, match="statistics of 1 are not finite"):
        ekgfx.calibrate(pruned, [images()[0].double(), torch.full((8, 1, 8, 8), float("nan")).double()], traced=traced)
    with pytest.raises(DataError, match="no batch"):
        ekgfx.calibrate(pruned, [], traced=traced)
    for module in (model, pruned):
        assert all(torch.equal(value, before[id(module)][name]) for name, value in module.state_dict().items())
        assert not any(each._forward_pre_hooks or each.training for each in module.modules())
    within = ekgfx.prune(model, ekgfx.Plan.of(pruned), traced, inplace=True)
    with pytest.raises(PlanError, match="was cut, and tells no more"):
        ekgfx.calibrate(within, [x.double() for x in images()], traced=traced)
