"""Which epoch a training keeps: the best on images that it did not train on, also after a kill, and in parallel."""

import csv
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ekgfx import data as datasets
from ekgfx.errors import RecipeError
from ekgfx.models import digits_cnn
from ekgfx.training.evaluation import Metrics, evaluate
from ekgfx.training.finetune import finetune
from ekgfx.training.keeping import Best, Epoch, History, rank
from ekgfx.training.mixup import Mixing, mixed_loss
from ekgfx.training.trainer import Progress
from tests.support.processes import together
from tests.training.test_finetune import Fixed, Interrupted, batches, small

Weights = dict[str, Tensor]


def same(one: nn.Module | Weights, other: nn.Module | Weights) -> bool:
    a, b = (dict(value.state_dict() if isinstance(value, nn.Module) else value) for value in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def recorded(**options: Any) -> tuple[nn.Module, History, list[Weights]]:
    """A training whose weights are noted before it and after every epoch."""
    model = small()
    seen = [{name: value.clone() for name, value in model.state_dict().items()}]

    def note(epoch: Epoch) -> None:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})

    return model, finetune(model, batches(), on_epoch=note, **options), seen


HELD = [batch[:2] for batch in batches(count=5)[3:]]


@pytest.mark.parametrize("lr", [0.002, 0.05])
def test_the_epoch_with_the_best_validation_accuracy_is_kept(lr: float) -> None:
    """Accuracy first, the loss where it is equal, the network before training among them; judged here by evaluating the
    weights after every epoch."""
    model, history, seen = recorded(epochs=6, lr=lr, val=HELD, schedule="constant")
    judged = []
    for weights in seen:
        twin = small()
        twin.load_state_dict(weights)
        found = evaluate(twin, HELD)
        judged.append((found.accuracy, -found.loss))
    best = max(range(len(judged)), key=judged.__getitem__)
    assert history.kept == best
    assert same(model, seen[best])
    assert [epoch.val_accuracy for epoch in history] == [accuracy for accuracy, _ in judged[1:]]
    assert [epoch.number for epoch in history if epoch.kept] == ([best] if best else [])


def test_training_that_harms_delivers_the_network_from_before_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    with torch.no_grad():
        answers = [(images, model.eval()(images).argmax(1)) for images, _ in HELD]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO, "ekgfx"):
        history = finetune(model, batches(), val=answers, epochs=3, lr=0.5)
    assert history.kept == 0 and same(model, before)
    assert not any(epoch.kept for epoch in history)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("kept the network as it was before training: 100.00% on the validation part")
    assert "the best of 3 epochs has" in line


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (Epoch(1, 1.0, 0.1, 2.0, val_loss=0.25, val_accuracy=1.0), "kept epoch 1 of 1 epoch: 100.00% with loss 0.2500"),
        (Epoch(1, 1.0, 0.1, 2.0, val_loss=0.75, val_accuracy=1.0), "before training: 100.00% with loss 0.5000"),
        (Epoch(1, 1.0, 0.1, 2.0, val_loss=0.25, val_accuracy=0.5), "before training: 100.00% on the validation part"),
    ],
)
def test_what_was_kept_is_said_with_what_decided(after: Epoch, said: str) -> None:
    """The losses where the accuracies are equal."""
    before, model = Metrics(0.5, 1.0, 4), small()
    best = Best(before, model)
    best.offer(1, Metrics(after.val_loss or 0.0, after.val_accuracy, 4), model)
    assert said in str(History.of([after], best.number, before, stopped=False))


def test_the_last_epoch_is_kept_where_nothing_judges() -> None:
    model, history, seen = recorded(epochs=3, lr=0.05)
    assert history.kept == 3 and same(model, seen[-1]) and history.before is None
    assert str(history) == "kept the last of 3 epochs"


def test_a_part_of_each_class_is_held_out_of_the_training_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of each class, never a test image, the same every time; trained on is exactly the rest."""
    data, asked = datasets.load("digits"), []
    loader = datasets.Data.loader

    def noted(self: datasets.Data, split: str, size: int, **options: Any) -> Any:
        asked.append((split, options.get("subset")))
        return loader(self, split, size, **options)

    monkeypatch.setattr(datasets.Data, "loader", noted)
    finetune(digits_cnn(), data, epochs=0)
    finetune(digits_cnn(), data, epochs=0, seed=5)
    (one, held), (two, rest), (_, again), _ = asked
    assert one == two == "train" and torch.equal(held, again)
    assert sorted([*held.tolist(), *rest.tolist()]) == list(range(data.size("train")))
    labels = data.labels("train")
    assert labels is not None
    assert (labels[held].bincount() - labels.bincount() * 0.1).abs().max() <= 1
    asked.clear()
    finetune(digits_cnn(), data, epochs=0, val_fraction=0)
    assert asked == [("train", None)]


def test_too_few_images_to_hold_any_out_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    history = finetune(digits_cnn(), datasets.load("digits"), subset=[3], epochs=1, batch_size=1, augment=False)
    assert history.kept == 1
    assert "1 training images are too few to hold 10% of them out: the last epoch is kept" in caplog.text


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize("options", [{}, {"ema": 0.9}, {"mixup": 0.4, "cutmix": 1.0}])
def test_a_killed_training_keeps_the_best_so_far(tmp_path: Path, options: dict[str, Any], after: int) -> None:
    settings = {"epochs": 5, "lr": 0.05, "val": HELD, **options}
    whole, resumed = small(), small(seed=9)
    expected = finetune(whole, batches(), csv=tmp_path / "whole.csv", **settings)

    def stop(epoch: Epoch) -> None:
        if epoch.number == after:
            raise Interrupted

    state = {"checkpoint": tmp_path / "state", "csv": tmp_path / "log.csv"}
    with pytest.raises(Interrupted):
        finetune(small(), batches(), on_epoch=stop, **state, **settings)
    assert len(list(csv.DictReader((tmp_path / "log.csv").open()))) == after + 1
    found = finetune(resumed, batches(), **state, **settings)
    assert same(resumed, whole)
    assert found.kept == expected.kept and found.before == expected.before
    ours, theirs = (
        [{**row, "seconds": ""} for row in csv.DictReader((tmp_path / name).open())]
        for name in ("log.csv", "whole.csv")
    )
    assert ours == theirs and [row["number"] for row in ours] == list("012345")


def test_patience_ends_a_training_that_does_not_get_better(tmp_path: Path) -> None:
    flat = [(images, torch.zeros(8, dtype=torch.long)) for images, _ in HELD]

    def constant(output: Tensor, target: Tensor) -> Tensor:
        return output.sum() * 0

    settings = {"loss": constant, "val": flat, "epochs": 9, "patience": 3, "checkpoint": tmp_path / "state"}
    for _ in range(2):  # the second finds it done
        history = finetune(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), batches(), **settings)
        assert len(history) == 3 and history.stopped and history.kept == 0
    with pytest.raises(RecipeError, match="patience needs images"):
        finetune(small(), batches(), epochs=1, patience=1)


def test_without_labels_epochs_are_judged_by_the_best_teacher() -> None:
    bank, model = Fixed(), small()
    held = [(images, None, index) for images, _, index in batches(count=1, labelled=False)]
    history = finetune(
        model, batches(labelled=False), bank=bank, views=1, epochs=2, lr=1e-3, val=held, schedule="constant"
    )
    with torch.no_grad():
        wanted = bank.values[:8, 0].softmax(1)
        expected = nn.functional.cross_entropy(model(held[0][0]), wanted).item()
    assert history.before is not None
    losses = [history.before.loss, *(epoch.val_loss for epoch in history)]
    assert losses[history.kept] == min(loss for loss in losses if loss is not None) == pytest.approx(expected, rel=1e-5)
    assert history[0].val_accuracy is None


def test_the_moving_average_is_what_is_judged_and_kept() -> None:
    """timm's warm-up: after n updates the decay is 1 − n^(−2/3), where that is less than the asked one."""
    model, average, seen = small(), {}, []
    number = 0

    def follow(progress: Progress) -> None:
        nonlocal number
        number += 1
        decay = 0.0 if number == 1 else min(0.9, 1 - number ** (-2 / 3))
        for name, value in model.state_dict().items():
            if name not in average or not value.is_floating_point():
                average[name] = value.clone()
            else:
                average[name] = average[name] * decay + value * (1 - decay)
        seen.append(progress)

    finetune(model, batches(), epochs=2, lr=0.05, ema=0.9, on_batch=follow)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-4, atol=1e-6)
    assert [(p.epoch, p.batch, p.batches) for p in seen[2:4]] == [(1, 3, 3), (2, 1, 3)]


def test_what_is_left_of_a_training() -> None:
    assert Progress(2, 5, 10, 40, 20.0).eta == 2.0 * (30 + 3 * 40)
    assert Progress(2, 5, 10, None, 20.0).eta is None


def test_mixing_is_a_convex_sum_of_partners_and_so_is_the_loss() -> None:
    torch.manual_seed(0)
    from ekgfx.data.batches import Inputs

    images = torch.rand(6, 1, 4, 4)
    mixed, part = Mixing(1.0, 0.0)(Inputs.of(images))
    torch.testing.assert_close(mixed.args[0], part * images + (1 - part) * images.flip(0))
    pasted, area = Mixing(0.0, 1.0)(Inputs.of(images))
    own = (pasted.args[0] == images).flatten(1).float().mean(1)
    assert ((pasted.args[0] == images) | (pasted.args[0] == images.flip(0))).all()
    assert own.tolist() == pytest.approx([area] * 6)
    odd, whole = Mixing(1.0, 0.0)(Inputs.of(images[:5]))
    assert whole == 1.0 and torch.equal(odd.args[0], images[:5])

    output, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])

    def objective(outputs: list[Tensor], target: Tensor, index: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs[0], target)

    soft = part * nn.functional.one_hot(labels, 4) + (1 - part) * nn.functional.one_hot(labels.flip(0), 4)
    expected = nn.functional.cross_entropy(output, soft.float())
    torch.testing.assert_close(mixed_loss(objective, [output], labels, torch.arange(6), part), expected)
    with pytest.raises(RecipeError, match="one tensor of images"):
        finetune(small(), [((images, images), labels)], epochs=1, mixup=0.2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_fraction": 0.7}, "val_fraction 0.7: use between 0"),
        ({"patience": 0}, "patience 0: use at least 1"),
        ({"ema": 1.0}, "ema 1.0: use a decay between 0 and 1"),
        ({"mixup": -1.0}, "mixup -1.0: use at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        finetune(small(), batches(), epochs=1, **settings)


def test_a_loss_that_is_not_finite_is_never_the_best() -> None:
    assert rank(Metrics(float("nan"), 0.99, 8)) < rank(Metrics(9.0, 0.1, 8)) < rank(Metrics(8.0, 0.1, 8))


def kept_together() -> Any:
    """One of several processes of a training whose best epoch is not its last."""
    model = small()
    history = finetune(model, batches(), val=HELD, epochs=5, lr=0.05, parallel=True, patience=4)
    return model.state_dict(), history.kept, len(history)


def test_all_processes_end_with_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    (first, kept, count), (second, also, length) = together(2, tmp_path, kept_together)
    assert same(first, second) and (kept, count) == (also, length)
