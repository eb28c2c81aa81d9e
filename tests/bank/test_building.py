"""Which teachers a bank has, what they say, of which samples; damaged files."""

import json
import mmap
from pathlib import Path

import pytest
import torch

import ekgfx
from ekgfx.bank import Bank, Progress, build_bank, pick_teachers
from ekgfx.bank.rows import RowFormat
from ekgfx.data.base import Loader, Views
from ekgfx.errors import DataError, PlanError, RunError, TrainingError
from ekgfx.search import SearchResult, search
from ekgfx.tracing.traced import TracedModel
from tests.bank.asked import Known, answers, training_batches
from tests.search import nets


def test_teachers_are_spread_over_the_losses() -> None:
    # Targets 0, 2, 4, 6, 8: nearest losses, without repetition, the best first.
    losses = [0.0, 10.0, 1.9, 2.1, 4.4, 5.9, 7.9, 3.0]
    assert pick_teachers(losses) == [0, 2, 4, 5, 6]
    assert pick_teachers([5.0, 1.0, 1.0], teachers=2) == [1, 2]  # targets 1 and 3: the lower loss where equally near
    assert pick_teachers([3.0, 1.0]) == [1, 0]
    assert pick_teachers([2.0]) == [0]
    assert pick_teachers([1.0] * 7) == [0, 1, 2, 3, 4]


def test_holds_what_the_teachers_say(searched: tuple[TracedModel, SearchResult]) -> None:
    traced, result = searched
    batches = training_batches()
    bank = build_bank(traced, result, batches, teachers=3)
    steps = [teacher["step"] for teacher in bank.teachers]
    assert steps == pick_teachers(result.losses[:-1], 3)
    assert len(result.steps) not in steps  # the final sub-network does not teach
    index = torch.tensor([49, 0, 17, 17])
    found = bank.logits(index)
    assert found.shape == (4, 3, 10)
    for k, step in enumerate(steps):
        torch.testing.assert_close(found[:, k], answers(traced, result, step, batches)[index], rtol=1e-3, atol=1e-4)
        assert bank.teachers[k]["infidelity"] < 1e-6
    resident = bank.resident("cpu")
    torch.testing.assert_close(resident.logits(index), found)


def test_single_knowledge_is_the_unpruned_network(searched: tuple[TracedModel, SearchResult]) -> None:
    traced, result = searched
    bank = build_bank(traced, result, training_batches(), knowledge="single")
    assert [teacher["step"] for teacher in bank.teachers] == [0]


def test_samples_are_numbered_where_batches_do_not_say(searched: tuple[TracedModel, SearchResult]) -> None:
    traced, result = searched
    whole = build_bank(traced, result, training_batches(), teachers=1).logits(torch.arange(50))
    for batches in ([b[:2] for b in training_batches()], [b[0] for b in training_batches()]):
        assert torch.equal(build_bank(traced, result, batches, teachers=1).logits(torch.arange(50)), whole)


def test_a_bank_on_a_part_of_the_data_knows_its_samples(searched: tuple[TracedModel, SearchResult]) -> None:
    traced, result = searched
    batches = [(images, labels, 3 * index + 1) for images, labels, index in training_batches()]
    bank = build_bank(traced, result, batches, teachers=2)
    plain = build_bank(traced, result, training_batches(), teachers=2)
    index = torch.tensor([12, 0, 49])
    assert torch.equal(bank.logits(3 * index + 1), plain.logits(index))
    assert torch.equal(bank.resident("cpu").logits(3 * index + 1), plain.logits(index))
    for unknown in (0, 2, 149, 1000):
        with pytest.raises(DataError, match=f"sample {unknown} is not among the 50"):
            bank.logits(torch.tensor([1, unknown]))
    for outside in (50, -1):
        with pytest.raises(DataError, match=f"sample {outside} "):
            plain.logits(torch.tensor([outside]))


def test_files_are_memory_mapped_and_checked(searched: tuple[TracedModel, SearchResult], tmp_path: Path) -> None:
    traced, result = searched
    seen: list[Progress] = []
    bank = build_bank(traced, result, training_batches(), tmp_path / "bank", teachers=2, on_progress=seen.append)
    assert [(p.teacher, p.teachers, p.samples) for p in seen] == [(t, 2, n) for t in (1, 2) for n in (16, 32, 48, 50)]
    assert all(isinstance(rows.base.obj, mmap.mmap) for rows in bank._rows)
    again = Bank.open(tmp_path / "bank")
    assert torch.equal(again.logits(torch.arange(50)), bank.logits(torch.arange(50)))
    file = tmp_path / "bank" / "teacher-1.rows"
    assert sorted(path.name for path in file.parent.iterdir()) == ["bank.json", "teacher-0.rows", "teacher-1.rows"]
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(RunError, match=r"teacher-1.rows was changed"):
        Bank.open(tmp_path / "bank")
    file.write_bytes(content[:-1])
    with pytest.raises(RunError, match=r"cut short"):
        Bank.open(tmp_path / "bank", verify=False)


def test_a_bank_is_aligned_with_any_augmentation(searched: tuple[TracedModel, SearchResult]) -> None:
    """Shuffled, flipped, cropped views carry their sample's index, and so find the row of the un-augmented image."""
    from ekgfx import data

    traced, result = searched
    digits = data.load("digits")
    bank = build_bank(traced, result, digits.loader("train", 128, subset=range(400)), teachers=1)
    in_order = digits.loader("train", 128, subset=range(400))
    plain = torch.cat([batch.images for batch in in_order])
    shown = digits.loader("train", 100, subset=range(400))  # as many batches, all of one size
    said = answers(traced, result, bank.teachers[0]["step"], list(in_order), list(shown.mixed()))
    loader = digits.loader("train", 50, shuffle=True, augment=True, views=2, subset=range(400))
    loader.set_epoch(3)
    moved = 0
    for batch in loader:
        moved += int((batch.images[0] != plain[batch.index]).any())
        torch.testing.assert_close(bank.logits(batch.index)[:, 0], said[batch.index], rtol=1e-3, atol=1e-3)
    assert moved == 8


@pytest.mark.parametrize("size", [12, 8, 47, 1])
def test_teachers_know_sorted_samples_and_single_ones(size: int) -> None:
    """What a teacher says of an image depends on no other one of its batch: not on their class, not on their number."""
    images, labels = nets.class_images()
    traced = ekgfx.trace(ekgfx.calibrate(nets.Classes(), [images]).eval(), torch.randn(2, 1, 4, 4))
    result = search(traced, [(images, labels)], flops=0.7)
    sorted_batches = list(zip(images.split(size), labels.split(size), strict=True))
    with torch.no_grad():
        alone = torch.cat([traced.subnetwork(batch_stats=True)(batch).argmax(1) for batch, _ in sorted_batches])
    assert (alone != labels).any()
    order = torch.arange(48)
    for batches in (sorted_batches, Loader(Known(images, labels), order.flip(0), size, Views())):
        bank = build_bank(traced, result, batches, teachers=2)
        said = bank.logits(order)
        assert (said.argmax(2) == labels[:, None]).all()
        torch.testing.assert_close(said[:, 0], traced.model(images).detach(), rtol=2e-3, atol=2e-3)


def test_the_unpruned_teacher_is_the_network_as_it_is() -> None:
    """Also where its running averages are those of other images, as augmentation makes them."""
    images, labels = nets.class_images()
    model = ekgfx.calibrate(nets.Classes(), [1.5 * images + 0.2]).eval()
    traced = ekgfx.trace(model, torch.randn(2, 1, 4, 4))
    result = search(traced, [(images, labels)], flops=0.7)
    bank = build_bank(traced, result, list(zip(images.split(9), labels.split(9), strict=True)), knowledge="single")
    with torch.no_grad():
        expected, other = model(images).half().float(), traced.subnetwork(batch_stats=True)(images)
    assert torch.equal(bank.logits(torch.arange(48))[:, 0], expected)
    assert not torch.equal(other.argmax(1), expected.argmax(1))


def test_the_order_of_the_files_does_not_matter() -> None:
    """A folder's images class after class, or shuffled: teachers say the same of each, and the unpruned one is right as
    often as in evaluation, whose running averages are those of the same images."""
    images, labels = nets.class_images()
    model = nets.Classes()
    ekgfx.calibrate(model, [images])
    with torch.no_grad():
        right = (model.eval()(images).argmax(1) == labels).float().mean()
    traced = ekgfx.trace(model, torch.randn(2, 1, 4, 4))
    result = search(traced, [(images, labels)], flops=0.7)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    in_files, shuffled = (
        build_bank(traced, result, list(zip(x.split(12), y.split(12), strict=True)), teachers=2).logits(
            torch.arange(48)
        )
        for x, y in ((images, labels), (images[order], labels[order]))
    )
    torch.testing.assert_close(shuffled, in_files[order], rtol=2e-3, atol=2e-3)
    assert abs((in_files[:, 0].argmax(1) == labels).float().mean() - right) <= 0.01


def test_a_plan_is_no_result(searched: tuple[TracedModel, SearchResult]) -> None:
    traced, result = searched
    with pytest.raises(PlanError, match="the bank is built of a search's result, .* not of a Plan"):
        build_bank(traced, result.plan, [])


def test_errors(searched: tuple[TracedModel, SearchResult], tmp_path: Path) -> None:
    traced, result = searched
    batches = training_batches()
    with pytest.raises(DataError, match="not an iterator"):
        build_bank(traced, result, iter(batches))
    with pytest.raises(DataError, match="no batches"):
        build_bank(traced, result, [])
    with pytest.raises(DataError, match="turn shuffling off"):
        build_bank(traced, result, [batches[1], batches[0]])
    images, labels, index = batches[0]
    with pytest.raises(DataError, match="turn shuffling off"):
        build_bank(traced, result, [(images, labels, torch.cat([index[:1], index[1:].flip(0)]))])
    with pytest.raises(DataError, match="top 10 "):
        build_bank(traced, result, batches, top_k=10)
    build_bank(traced, result, batches, tmp_path, teachers=2)
    with pytest.raises(RunError, match="another model, search or top_k"):
        build_bank(traced, result, batches, tmp_path, teachers=3)
    with pytest.raises(RunError, match="another model, search or top_k"):
        build_bank(traced, result, batches, tmp_path, teachers=2, top_k=3)
    weight = traced.model.get_parameter(next(name for name, _ in traced.model.named_parameters()))
    before = weight.detach().clone()
    weight.data += 1
    with pytest.raises(RunError, match="another model, search or top_k"):
        build_bank(traced, result, batches, tmp_path, teachers=2)
    weight.data = before
    with pytest.raises(RunError, match="cannot make the folder"):
        build_bank(traced, result, batches, tmp_path / "bank.json" / "inside")
    with pytest.raises(TrainingError, match="half precision"):
        RowFormat((2,)).encode(torch.arange(1), torch.tensor([[1e6, 0.0]]))
    manifest = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(RunError, match="upgrade"):
        Bank.open(tmp_path)
