"""The fine-tuning objective, against the authors' recorded numbers and by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ekgfx.errors import DataError, TrainingError
from ekgfx.training.loss import (
    EKGLoss,
    LabelLoss,
    check_classes,
    default_temperature,
    guided_loss,
    softened_kl,
    teacher_knowledge,
    useful_teachers,
)
from ekgfx.training.outputs import logits_of
from tests.support.reference import Reference


class Fixed:
    """A bank of given logits, N × K × C."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def logits(self, index: Tensor) -> Tensor:
        return self.values[index]


def test_recorded_batch(reference: Reference) -> None:
    """Teacher mask, target, loss and gradient of one batch of the authors' fine-tuning."""
    golden = reference.npz("finetune_objective_golden.npz")
    predictions = torch.tensor(golden["preds_2B_interleaved"], dtype=torch.float64, requires_grad=True)
    bank = torch.tensor(golden["K"], dtype=torch.float64).transpose(1, 2)
    labels = torch.tensor(golden["labels"][:, 0].astype(int))
    views = [predictions[0::2], predictions[1::2]]
    student = torch.stack(views).mean(0).detach()
    useful = useful_teachers(bank, student, 4.0)
    assert useful.tolist() == golden["teacher_mask"].tolist()
    distances = softened_kl(bank[:, :1], bank, 4.0).sum(0)
    torch.testing.assert_close(distances, torch.tensor(golden["teacher_kl"]), rtol=1e-6, atol=1e-6)
    target = teacher_knowledge(bank, useful)
    torch.testing.assert_close(target, torch.tensor(golden["target_logits"]), rtol=1e-6, atol=1e-6)
    loss = EKGLoss(Fixed(bank))(views, labels, torch.arange(16))
    # The program reports the sum over the two views, and halves the gradient.
    assert 2 * loss.item() == pytest.approx(float(golden["loss"]), rel=1e-6)
    loss.backward()
    torch.testing.assert_close(
        predictions.grad,
        torch.tensor(golden["grad_wrt_preds_after_halving"], dtype=torch.float64),
        rtol=1e-4,
        atol=5e-7,
    )


def test_softened_kl_by_hand() -> None:
    """KL of (¾, ¼) from (½, ½) at T = 2, times T once."""
    x, z = 2 * torch.tensor([math.log(3.0), 0.0]), torch.zeros(2)
    expected = 2 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert softened_kl(x, z, 2.0).item() == pytest.approx(expected, rel=1e-6)
    assert softened_kl(x, x, 2.0).item() == 0


def test_teachers_drop_out_as_the_student_improves() -> None:
    torch.manual_seed(0)
    best = torch.randn(8, 10)
    noise = torch.randn(8, 10)
    bank = torch.stack([best, best + noise, best + 3 * noise], 1)
    masks = [useful_teachers(bank, best + scale * noise, 4.0).tolist() for scale in (9, 2, 0.5)]
    assert masks == [[True, True, True], [True, True, False], [True, False, False]]
    assert not useful_teachers(bank, best, 4.0).any()  # a student as good as the best teacher
    assert torch.equal(teacher_knowledge(bank, torch.tensor([False] * 3)), torch.zeros(8, 10))
    torch.testing.assert_close(teacher_knowledge(bank, torch.tensor([True, False, True])), best + 1.5 * noise)


def test_views_are_averaged_and_labels_are_optional() -> None:
    torch.manual_seed(0)
    bank, views, labels = torch.randn(6, 1, 4), [torch.randn(6, 4) for _ in range(3)], torch.arange(6) % 4
    loss = EKGLoss(Fixed(bank), temperature=3.0)
    guided = torch.stack([softened_kl(bank[:, 0], view, 3.0).mean() for view in views]).mean()
    labelled = torch.stack([F.cross_entropy(view, labels) for view in views]).mean()
    assert loss(views, None, torch.arange(6)).item() == pytest.approx(guided.item(), rel=1e-6)
    assert loss(torch.stack(views), labels, torch.arange(6)).item() == pytest.approx(
        (guided + labelled).item(), rel=1e-6
    )
    assert guided_loss(views, None, bank, 3.0).item() == pytest.approx(guided.item(), rel=1e-6)
    assert LabelLoss()(views, labels, torch.arange(6)).item() == pytest.approx(labelled.item(), rel=1e-6)


def test_half_precision_outputs_are_compared_in_single() -> None:
    torch.manual_seed(0)
    bank, view, labels = torch.randn(6, 2, 4), torch.randn(6, 4), torch.arange(6) % 4
    loss = EKGLoss(Fixed(bank))
    assert loss([view.bfloat16()], labels, torch.arange(6)).dtype == torch.float32


def test_dense_outputs_have_their_classes_in_dimension_1() -> None:
    """A map of 2 × 3 positions counts as six samples."""
    torch.manual_seed(0)
    bank, view, labels = torch.randn(5, 2, 4, 2, 3), torch.randn(5, 4, 2, 3), torch.randint(0, 4, (5, 2, 3))
    dense = EKGLoss(Fixed(bank))([view], labels, torch.arange(5))
    flat_bank = bank.permute(0, 3, 4, 1, 2).reshape(30, 2, 4)
    flat = EKGLoss(Fixed(flat_bank))([view.permute(0, 2, 3, 1).reshape(30, 4)], labels.flatten(), torch.arange(30))
    assert dense.item() == pytest.approx(flat.item(), rel=1e-5)


def test_temperature_follows_the_number_of_classes() -> None:
    assert [default_temperature(classes) for classes in (10, 999, 1000, 21843)] == [4, 4, 10, 10]


def test_errors() -> None:
    bank = Fixed(torch.randn(6, 2, 4))
    with pytest.raises(TrainingError, match="belongs to another model"):
        EKGLoss(bank)([torch.randn(6, 5)], None, torch.arange(6))
    with pytest.raises(TrainingError, match="memory bank"):
        LabelLoss()([torch.randn(6, 4)], None, torch.arange(6))
    with pytest.raises(DataError, match="label 7, but the model has 4"):
        check_classes(torch.randn(2, 4), torch.tensor([0, 7]))
    with pytest.raises(DataError, match="label -1"):
        check_classes(torch.randn(2, 4), torch.tensor([0, -1]))
    with pytest.raises(DataError, match="not clear in what the model returns, a dict of boxes 2×4, scores 2×4"):
        logits_of({"boxes": torch.randn(2, 4), "scores": torch.randn(2, 4)})
