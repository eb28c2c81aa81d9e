"""Fine-tuning: what one step computes, schedules, views, interruptions, errors; evaluation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx import data as datasets
from ekgfx.bank import build_bank
from ekgfx.errors import DataError, RecipeError, RunError, TrainingError
from ekgfx.models import digits_cnn
from ekgfx.training.evaluation import evaluate
from ekgfx.training.finetune import Epoch, finetune
from ekgfx.training.loss import EKGLoss
from ekgfx.training.step_zero import prepare


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(216, 4)
    )


def batches(views: int = 1, count: int = 3, labelled: bool = True) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shape = (8, 1, 8, 8) if views == 1 else (views, 8, 1, 8, 8)
    return [
        (
            torch.randn(shape, generator=generator),
            torch.randint(0, 4, (8,), generator=generator) if labelled else None,
            torch.arange(8 * b, 8 * b + 8),
        )
        for b in range(count)
    ]


class Fixed:
    """A bank of given logits."""

    def __init__(self) -> None:
        self.values = torch.randn(24, 2, 4, generator=torch.Generator().manual_seed(4))

    def logits(self, index: Tensor) -> Tensor:
        return self.values[index]


def test_one_update_is_sgd_with_nesterov_on_the_guided_loss_of_both_views() -> None:
    """Views share one batch in BatchNorm; weight decay is on every parameter."""
    model, by_hand = (nn.Sequential(*list(small())[:3], *list(small())[4:]) for _ in range(2))
    batch = batches(views=2, count=1)
    history = finetune(model, batch, bank=Fixed(), epochs=1, lr=0.1, schedule="constant", weight_decay=0.01)
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    images, labels, index = batch[0]
    by_hand.train()
    loss = EKGLoss(Fixed())(by_hand(images.flatten(0, 1)).chunk(2), labels, index)
    loss.backward()
    optimizer.step()
    assert history[0].loss == pytest.approx(loss.item(), rel=1e-6)
    for ours, expected in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)
    assert not model.training


def test_views_may_come_as_a_tuple_and_labels_not_at_all() -> None:
    stacked, tupled = small(), small()
    plain = batches(views=2, labelled=False)
    first = finetune(stacked, plain, bank=Fixed(), epochs=2)
    second = finetune(tupled, [(tuple(b[0]), None, b[2]) for b in plain], bank=Fixed(), epochs=2)
    assert [e.loss for e in first] == [e.loss for e in second]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0] * 10),
        ("multistep", [1, 1, 1, 0.2, 0.2, 0.2, 0.04, 0.04, 0.008, 0.008]),
        ("cosine", [1, 0.9755, 0.9045, 0.7939, 0.6545, 0.5, 0.3455, 0.2061, 0.0955, 0.0245]),
    ],
)
def test_schedules(schedule: str, expected: list[float]) -> None:
    history = finetune(small(), batches(count=1), epochs=10, lr=1e-3, schedule=schedule)
    assert [epoch.lr * 1e3 for epoch in history] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("epochs", "expected"), [(1, [1.0]), (2, [1, 0.04]), (3, [1, 0.2, 0.008])])
def test_the_first_epoch_has_the_rate_that_was_asked_for(epochs: int, expected: list[float]) -> None:
    history = finetune(small(), batches(count=1), epochs=epochs, lr=1e-3, schedule="multistep")
    assert [epoch.lr * 1e3 for epoch in history] == pytest.approx(expected)


def test_warm_up_rises_to_the_learning_rate() -> None:
    history = finetune(small(), batches(count=1), epochs=5, lr=1e-3, warmup=2, schedule="multistep")
    assert [epoch.lr * 1e3 for epoch in history] == pytest.approx([1 / 3, 2 / 3, 0.2, 0.04, 0.008], abs=1e-4)


class Interrupted(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("after", [1, 3])
def test_interrupted_training_ends_as_if_it_had_not_been(tmp_path: Path, optimizer: str, after: int) -> None:
    settings: dict[str, Any] = {"epochs": 5, "lr": 0.01, "optimizer": optimizer, "seed": 7}
    whole = small()
    expected = finetune(whole, batches(), **settings)

    def stop(epoch: Epoch) -> None:
        if epoch.number == after:
            raise Interrupted

    with pytest.raises(Interrupted):
        finetune(small(), batches(), checkpoint=tmp_path / "state", on_epoch=stop, **settings)
    resumed, seen = small(seed=99), []
    found = finetune(
        resumed, batches(), checkpoint=tmp_path / "state", on_epoch=lambda e: seen.append(e.number), **settings
    )
    assert seen == list(range(after + 1, 6))
    assert [(e.number, e.loss, e.lr) for e in found] == [(e.number, e.loss, e.lr) for e in expected]
    for ours, theirs in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert finetune(small(), batches(), checkpoint=tmp_path / "state", **settings) == found
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_checkpoints_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state"
    finetune(small(), batches(), checkpoint=path, epochs=1)
    with pytest.raises(RunError, match="another lr"):
        finetune(small(), batches(), checkpoint=path, epochs=1, lr=0.5)
    with pytest.raises(RunError, match="another model"):
        finetune(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), batches(), checkpoint=path, epochs=1)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RunError, match="damaged"):
        finetune(small(), batches(), checkpoint=path, epochs=1)


def test_other_precision_and_memory_format_train_alike() -> None:
    plain = finetune(small(), batches(), epochs=3)
    for settings in ({"channels_last": True}, {"amp": "bf16"}):
        model = small()
        history = finetune(model, batches(), epochs=3, **settings)
        assert history[-1].loss == pytest.approx(plain[-1].loss, rel=0.05)
        assert next(model.parameters()).dtype == torch.float32


class Viewing(nn.Module):
    """A classifier as many write it: in channels last its view fails. formats: whether each output was so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.2)
        self.fc = nn.Linear(216, 4)
        self.formats: list[bool] = []

    def flat(self, y: Tensor) -> Tensor:
        return y.view(len(y), -1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.formats.append(not y.is_contiguous())
        return self.fc(self.flat(self.drop(self.norm(y))))


class Flat(Viewing):
    """The same with what copies where it must."""

    def flat(self, y: Tensor) -> Tensor:
        return y.flatten(1)


def test_a_step_on_the_cpu_is_in_channels_last_and_nothing_else_meets_it() -> None:
    """What judges the network, and a user after an epoch, see the weights as they came; an average of them, too."""
    model = Flat()
    seen: list[bool] = []

    def look(epoch: Epoch) -> None:
        with torch.no_grad():
            seen.append(not model.conv(torch.zeros(2, 1, 8, 8)).is_contiguous())

    finetune(model, batches(), val=batches(count=1), epochs=2, ema=0.9, on_epoch=look)
    assert model.formats == [True] * 6 and seen == [False, False]  # what judges is the average
    assert model.conv.weight.is_contiguous()
    asked = Flat()
    finetune(asked, batches(), val=batches(count=1), epochs=1, channels_last=False)
    assert asked.formats == [False] * 5


def test_a_model_that_cannot_be_trained_in_channels_last_trains_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """The trial leaves nothing behind: statistics, random numbers, what the model notes."""
    tried, plain = Viewing(), Viewing()
    with caplog.at_level("INFO", "ekgfx"):
        finetune(tried, batches(), epochs=2)
    finetune(plain, batches(), epochs=2, channels_last=False)
    (said,) = [record.getMessage() for record in caplog.records if "channels last" in record.getMessage()]
    assert "view size is not compatible" in said
    assert tried.formats == plain.formats == [False] * 6
    for a, b in zip(tried.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous()


def test_weights_of_five_dimensions_stay_as_they_are() -> None:
    """PyTorch's own `.to(memory_format=torch.channels_last)` refuses such a model."""

    class Mixed(Flat):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(1, 1, 1, 1, 216))

        def flat(self, y: Tensor) -> Tensor:
            return y.flatten(1) + self.shift.flatten()

    model = Mixed()
    model.conv.weight.data = model.conv.weight.data.repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)
    finetune(model, [(x.repeat(1, 3, 1, 1), y) for x, y, _ in batches()], epochs=1)
    assert all(model.formats) and not model.conv.weight.is_contiguous(), "a user's own format stays as well"


def test_a_loss_may_view_the_output() -> None:
    def loss(output: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(output.view(len(output), -1), labels)

    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    assert len(finetune(model, batches(), loss=loss, logits=lambda y: y.flatten(1), epochs=1)) == 1


class Remembering:
    """A loss with a state, such as a moving average of the outputs, a queue or a counter."""

    def __init__(self) -> None:
        self.mean, self.seen, self.calls = torch.zeros(4), list[float](), 0

    def __call__(self, output: Tensor, labels: Tensor) -> Tensor:
        self.mean.lerp_(output.detach().mean(0), 0.5)
        self.calls += 1
        loss = F.cross_entropy(output - self.mean, labels)
        self.seen.append(loss.item())
        return loss


class RememberingModule(Remembering, nn.Module):
    """The same as a module with a buffer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("mean", torch.zeros(4))
        self.seen, self.calls = [], 0


@pytest.mark.parametrize("kind", [Remembering, RememberingModule])
@pytest.mark.parametrize("taught", [False, True])
def test_the_trial_leaves_nothing_in_a_loss(kind: type[Remembering], taught: bool) -> None:
    """Neither where the trial succeeds nor where it fails (Viewing)."""
    views = 2 if taught else 1
    for classifier in (Flat, Viewing):
        tried, plain = kind(), kind()
        for loss, layout in ((tried, None), (plain, False)):
            model = classifier()
            model.drop = nn.Identity()  # which draws its numbers in the order of memory
            bank = Fixed() if taught else None
            finetune(model, batches(views=views), loss=loss, bank=bank, epochs=1, channels_last=layout)
        assert tried.calls == plain.calls == views * len(batches())
        assert tried.seen == pytest.approx(plain.seen, rel=1e-5)
        torch.testing.assert_close(tried.mean, plain.mean, rtol=1e-4, atol=1e-6)


def test_what_fails_in_any_format_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "ekgfx"), pytest.raises(RuntimeError, match="mat1 and mat2"):
        finetune(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(7, 4)), batches(), epochs=1)
    assert "channels last" not in caplog.text


@pytest.mark.sweep
def test_a_compiled_network_trains_and_resumes_alike(tmp_path: Path) -> None:
    """As the benchmark on a GPU has it, with CUDA graphs there; the module that was compiled holds the weights."""
    shown, bank, options = batches(views=2), Fixed(), {"epochs": 3, "lr": 0.05, "channels_last": True}
    plain, compiled = (nn.Sequential(*list(small())[:3], *list(small())[4:]) for _ in range(2))
    finetune(plain, shown, bank=bank, **options)
    for _ in range(2):  # the second finds the checkpoint of the first, and has nothing to do
        fast = torch.compile(compiled, mode="reduce-overhead")
        history = finetune(fast, shown, bank=bank, checkpoint=tmp_path / "checkpoint", **options)
        assert len(history) == 3
    for a, b in zip(plain.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_errors() -> None:
    with pytest.raises(TrainingError, match="not finite in epoch 1, by batch 3"):
        finetune(small(), [(x * float("inf"), y, i) for x, y, i in batches()], epochs=1)
    with pytest.raises(DataError, match="label 9, but the model has 4"):
        finetune(small(), [(x, torch.full((8,), 9), i) for x, _, i in batches()], epochs=1)
    with pytest.raises(DataError, match="no batch to train on"):
        finetune(small(), [], epochs=1)
    with pytest.raises(RecipeError, match="no setting 'epoch'; it has epochs"):
        finetune(small(), batches(), epoch=1)
    with pytest.raises(RecipeError, match="unknown schedule"):
        finetune(small(), batches(), schedule="stairs")


def test_evaluation_is_the_mean_over_samples() -> None:
    model, data = small().train(), batches()
    data[-1] = tuple(part[:3] for part in data[-1])
    found = evaluate(model, data)
    assert model.training
    model.eval()
    with torch.no_grad():
        output = torch.cat([model(images) for images, _, _ in data])
    labels = torch.cat([labels for _, labels, _ in data])
    assert found.samples == 19
    assert found.loss == pytest.approx(F.cross_entropy(output, labels).item(), rel=1e-5)
    assert found.accuracy == pytest.approx((output.argmax(1) == labels).float().mean().item())
    with pytest.raises(DataError, match="without labels"):
        evaluate(model, batches(labelled=False))
    with pytest.raises(DataError, match="no batch"):
        evaluate(model, [])


@pytest.fixture(scope="module")
def digits() -> datasets.Data:
    return datasets.load("digits")


def test_step_0_draws_disjoint_sets_and_trains_an_epoch(digits: datasets.Data) -> None:
    torch.manual_seed(0)
    model = digits_cnn()
    before = [value.clone() for value in model.parameters()]
    prepared = prepare(model, digits, train_per_class=20, val_per_class=5, batch_size=32, val_batch_size=40)
    labels = digits.labels("train")
    assert labels is not None
    assert labels[prepared.val].bincount().tolist() == [5] * 10
    assert labels[prepared.train].bincount().tolist() == [20] * 10
    assert not set(prepared.val.tolist()) & set(prepared.train.tolist())
    assert [len(images) for images, _ in prepared.batches] == [40, 10]
    assert torch.equal(torch.cat([found for _, found in prepared.batches if found is not None]), labels[prepared.val])
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    before = [value.clone() for value in model.parameters()]
    prepare(model, digits, train_per_class=0, val_per_class=5)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_validation_images_come_hardest_first(digits: datasets.Data) -> None:
    """In batches of the paper's order, the losses by the batches' own statistics; then by falling loss."""
    torch.manual_seed(0)
    model = digits_cnn()
    finetune(model, digits, epochs=1, lr=0.05, batch_size=64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    asked = {"train_per_class": 0, "val_per_class": 5, "val_batch_size": 20}
    drawn = prepare(model, digits, **asked)
    assert torch.equal(drawn.val, digits.search_subset(0, 5, 0)[1])
    twin = digits_cnn().train()
    twin.load_state_dict(state)
    with torch.no_grad():
        losses = [-twin(x).log_softmax(1)[range(len(y)), y] for x, y in drawn.batches if y is not None]
    expected = drawn.val[torch.cat(losses).argsort(descending=True)]
    prepared = prepare(model, digits, **asked, hardest_first=True)
    assert torch.equal(prepared.val, expected)
    assert not torch.equal(prepared.val, drawn.val)
    labels = digits.labels("train")
    assert labels is not None
    assert torch.equal(torch.cat([found for _, found in prepared.batches if found is not None]), labels[expected])
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


def test_the_whole_method_on_real_digits(digits: datasets.Data) -> None:
    """Train, prepare, search, cut, fill the bank, fine-tune: half the MACs, hardly less accuracy than before."""
    torch.manual_seed(0)
    model, test = digits_cnn(), digits.loader("test", 256)
    finetune(model, digits, epochs=6, lr=0.05, batch_size=64, schedule="cosine")
    dense = evaluate(model, test)
    prepared = prepare(model, digits, train_per_class=64, val_per_class=16, batch_size=160)
    traced = ekgfx.trace(model, prepared.batches[0][0][:2])
    result = ekgfx.search(traced, prepared.batches, flops=0.5)
    pruned = ekgfx.prune(model, result.plan, traced=traced)
    bank = build_bank(traced, result, digits.loader("train", 256))
    history = finetune(pruned, digits, bank=bank, epochs=6, lr=0.02, batch_size=64, test=test)
    assert dense.accuracy is not None and dense.accuracy > 0.94
    assert traced.cost(result.plan).macs <= 0.5 * traced.cost().macs
    assert history[-1].test_accuracy is not None and history[-1].test_accuracy > dense.accuracy - 0.02
    assert history[-1].loss < history[0].loss


@pytest.mark.parametrize("form", ["a tensor", "a mapping"])
def test_batches_without_views_are_trained_on_as_they_come_with_a_bank(form: str) -> None:
    plain = batches()
    shown = [({"x": x}, y, i) for x, y, i in plain] if form == "a mapping" else plain
    found = finetune(small(), shown, bank=Fixed(), epochs=1, lr=0.05)
    expected = finetune(small(), plain, bank=Fixed(), epochs=1, lr=0.05, views=1)
    assert found[0].loss == expected[0].loss
    with pytest.raises(DataError, match=r"which are not 2 views of each sample: stack as many .* views=1"):
        finetune(small(), shown, bank=Fixed(), epochs=1, lr=0.05, views=2)
