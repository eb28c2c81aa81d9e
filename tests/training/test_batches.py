"""Batches as data sets of every kind give them are one to the search, the bank, training and evaluation."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import ekgfx
from ekgfx.data.batches import Inputs, unpacked, views_in
from ekgfx.data.numbered import numbered
from ekgfx.errors import DataError, RecipeError
from ekgfx.training.evaluation import evaluate

IMAGES = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.body, self.head = (
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3), nn.Linear(12, 5),
        )  # fmt: skip

    def forward(self, pixel_values: Tensor, gain: Tensor | None = None) -> dict[str, Tensor]:
        x = self.body(self.norm(self.stem(pixel_values)).relu()).relu().mean((2, 3))
        return {"logits": self.head(x if gain is None else x * gain)}


class Rows(Dataset):
    def __init__(self, names: tuple[str, str, str]) -> None:
        self.names = names

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return dict(zip(self.names, (IMAGES[i], int(LABELS[i]), i), strict=True))


INDEX = torch.arange(12)
FORMS: dict[str, Any] = {
    "triple": [(IMAGES, LABELS, INDEX)],
    "int32": [(IMAGES, LABELS.int(), INDEX.int())],
    "lists": [(IMAGES, LABELS.tolist(), INDEX.tolist())],
    "scalars": [[IMAGES, list(LABELS), INDEX]],
    "numpy": [(IMAGES.numpy(), LABELS.numpy().astype(np.uint8), INDEX.numpy())],
    "positional": [((IMAGES,), LABELS, INDEX)],
    "named inputs": [({"pixel_values": IMAGES}, LABELS, INDEX)],
    "transformers": [{"pixel_values": IMAGES, "labels": LABELS, "index": INDEX}],
    "loader of mappings": DataLoader(Rows(("pixel_values", "label", "idx")), 12),
    "one input of another name": DataLoader(Rows(("image", "target", "index")), 12),
    "tensor data set": DataLoader(TensorDataset(IMAGES, LABELS, INDEX), 12),
}


def everything(batches: Any) -> tuple[Any, ...]:
    model = Net().eval()
    traced = ekgfx.trace(model, {"pixel_values": IMAGES})
    result = ekgfx.search(traced, batches, flops=0.6, step=0.6)
    pruned = ekgfx.prune(model, result, traced)
    bank = ekgfx.build_bank(traced, result, batches, teachers=1)
    ekgfx.calibrate(pruned, batches)
    (epoch,) = ekgfx.finetune(pruned, batches, bank=bank, views=1, epochs=1, lr=1e-3)
    return result.plan.kept, bank.logits(INDEX).sum().item(), epoch.loss, evaluate(pruned, batches).loss


@pytest.fixture(scope="module")
def expected() -> tuple[Any, ...]:
    return everything(FORMS["triple"])


@pytest.mark.parametrize("form", [form for form in FORMS if form != "triple"])
def test_every_form_is_the_same_batch(form: str, expected: tuple[Any, ...]) -> None:
    kept, *numbers = everything(FORMS[form])
    assert kept == expected[0] and numbers == pytest.approx(expected[1:], rel=1e-6)


def test_views_of_named_inputs() -> None:
    """Two views in one mapping, or in two, are trained on as two views in a tensor."""
    two = torch.stack([IMAGES, IMAGES.flip(3)])
    found = []
    for images in (two, {"pixel_values": two}, tuple({"pixel_values": view} for view in two)):
        found.append(ekgfx.finetune(Net(), [(images, LABELS)], views=2, epochs=1, lr=1e-3)[0].loss)
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        (IMAGES, r"one Tensor is no series of batches; give a list of batches, such as \[\(images, labels\)\]"),
        ({"pixel_values": IMAGES}, "one dict is no series of batches"),
        (None, "a NoneType is no series of batches; give a DataLoader"),
        ([3], r"a int is no batch; use \(images, labels, index\)"),
        ([()], "a batch has no inputs"),
        ([{"labels": LABELS}], "a batch has no inputs"),
        (
            (IMAGES, LABELS),
            r"a batch has a tensor of shape \(12,\) \(torch.int64\), the model was traced with a tensor",
        ),
        ([(IMAGES.double(), LABELS)], r"\(torch.float64\), the model was traced with a tensor of .* \(torch.float32\)"),
        (
            [{"image": IMAGES, "mask": IMAGES}],
            r"'image', 'mask', which Net.forward does not take \(it takes pixel_values, gain\)",
        ),
        ([(IMAGES, LABELS), IMAGES], "some validation batches have labels and some have none"),
    ],
)
def test_what_is_no_batch_is_said_in_a_line(batches: Any, says: str) -> None:
    traced = ekgfx.trace(Net().eval(), IMAGES)
    with pytest.raises(DataError, match=says):
        ekgfx.search(traced, batches, flops=0.6)


def test_batches_of_another_precision_are_said_in_a_line() -> None:
    """NumPy's numbers are of double precision unless one says otherwise."""
    model, batches = Net().eval(), [(IMAGES.double(), LABELS)]
    traced = ekgfx.trace(model, IMAGES)
    plan = ekgfx.search(traced, flops=0.6, strategy="uniform", importance="magnitude").plan
    said = (
        r"torch.float64, the weights of Net are of torch.float32; convert the batch, such as images.to\(torch.float32"
    )
    for use in (
        lambda: ekgfx.finetune(ekgfx.prune(model, plan, traced), batches, epochs=1),
        lambda: ekgfx.calibrate(ekgfx.prune(model, plan, traced), batches),
    ):
        with pytest.raises(DataError, match=said):
            use()
    with pytest.raises(DataError, match=r"\(torch.float64\), the model was traced with .* \(torch.float32\)"):
        ekgfx.repair(ekgfx.prune(model, plan, traced), traced, plan, batches)


def test_a_model_that_converts_its_batch_is_left_alone() -> None:
    class Converting(Net):
        def forward(self, pixel_values: Tensor, gain: Tensor | None = None) -> Any:
            return super().forward(pixel_values.float(), gain)

    assert ekgfx.finetune(Converting(), [(IMAGES.double(), LABELS)], epochs=1, lr=1e-3)


def test_a_data_set_is_no_loader() -> None:
    with pytest.raises(DataError, match=r"a Data gives its batches with .loader\('train', batch_size\)"):
        ekgfx.search(ekgfx.trace(Net().eval(), IMAGES), ekgfx.data.load("digits"), flops=0.6)


def test_the_bank_is_asked_by_sample() -> None:
    traced = ekgfx.trace(Net().eval(), IMAGES)
    result = ekgfx.search(traced, [(IMAGES, LABELS)], flops=0.6, step=0.6)
    bank = ekgfx.build_bank(traced, result, [(IMAGES, LABELS)], teachers=1)
    with pytest.raises(DataError, match="a batch says of none which it is; give .images, labels, index."):
        ekgfx.finetune(Net(), [(IMAGES, LABELS)], bank=bank, views=1, epochs=1)


def test_labels_that_are_no_numbers_are_left_to_the_loss() -> None:
    boxes = [{"boxes": torch.zeros(2, 4)}, {"boxes": torch.zeros(1, 4)}]
    _, labels, index = unpacked((IMAGES, boxes, ["a.png", "b.png"]))
    assert labels is boxes and not len(index)
    assert unpacked((IMAGES, LABELS > 1))[1].dtype == torch.bool
    assert unpacked((IMAGES, [0.5, 1.0]))[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype: torch.dtype) -> None:
    """Images in float32 are fed as it takes them; it stays in its precision, and says what it cannot do."""
    model = Net().to(dtype).eval()
    traced = ekgfx.trace(model, IMAGES)
    batches = [(IMAGES, LABELS, INDEX)]
    result = ekgfx.search(traced, batches, flops=0.6, step=0.6)
    pruned = ekgfx.prune(model, result, traced)
    bank = ekgfx.build_bank(traced, result, batches, teachers=1)
    ekgfx.finetune(pruned, batches, bank=bank, views=1, epochs=1, lr=1e-3)
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert abs(evaluate(pruned, batches).loss - evaluate(pruned.float(), batches).loss) < 0.02
    with pytest.raises(RecipeError, match=r"amp='bf16' computes in half precision .* train model.float\(\) with amp"):
        ekgfx.finetune(Net().to(dtype), batches, epochs=1, amp="bf16")


def test_inputs_are_moved_and_named_as_the_model_takes_them() -> None:
    model = Net()
    assert Inputs.of({"gain": LABELS, "pixel_values": IMAGES}).onto(model).kwargs.keys() == {"gain", "pixel_values"}
    assert Inputs.of({"image": IMAGES}).onto(model).args[0] is IMAGES


@pytest.mark.parametrize("workers", [0, 2])
def test_plain_shuffled_loaders_find_their_rows_in_a_bank(workers: int) -> None:
    """Batches of `(images, labels)`: image i holds i, and each row of the numbered batches says i."""
    samples = torch.arange(20.0)[:, None, None, None].expand(20, 1, 8, 8)
    dataset = torch.utils.data.TensorDataset(samples, torch.arange(20) % 4)
    options = {"batch_size": 6, "shuffle": True, "num_workers": workers}
    found = list(numbered(torch.utils.data.DataLoader(dataset, **options)))
    order = torch.cat([torch.as_tensor(index) for _, _, index in found])
    assert order.tolist() == torch.cat([images[:, 0, 0, 0] for images, _, _ in found]).long().tolist()
    assert order.tolist() != sorted(order.tolist()) == list(range(20))
    mappings = [{"x": image, "labels": label} for image, label in dataset]
    (batch,) = numbered(torch.utils.data.DataLoader(mappings, batch_size=20))
    assert batch["index"] == list(range(20)) and "index" not in mappings[0]
    assert numbered(found) is found
    ordered = numbered(torch.utils.data.DataLoader(dataset, drop_last=True, **options), in_order=True)
    assert [index for *_, index in ordered] == [list(range(start, min(start + 6, 20))) for start in range(0, 20, 6)]


def test_fine_tuning_with_a_bank_takes_a_plain_loader() -> None:
    """The same as batches that say which samples they hold, in the order that the loader draws."""
    from tests.training.test_finetune import Fixed, small

    draw = torch.Generator().manual_seed(3)
    dataset = torch.utils.data.TensorDataset(torch.randn(24, 1, 8, 8, generator=draw), torch.arange(24) % 4)
    loader = torch.utils.data.DataLoader(dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(1))
    plain, told = small(), small()
    found = ekgfx.finetune(plain, loader, bank=Fixed(), views=1, epochs=1, lr=0.01)
    order = torch.utils.data.DataLoader(range(24), 8, shuffle=True, generator=torch.Generator().manual_seed(1))
    batches = [(dataset.tensors[0][index], dataset.tensors[1][index], index) for index in order]
    expected = ekgfx.finetune(told, batches, bank=Fixed(), views=1, epochs=1, lr=0.01)
    assert found[0].loss == expected[0].loss
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), told.parameters(), strict=True))


@pytest.mark.parametrize("as_mappings", [False, True])
def test_batches_of_one_view_need_no_word_of_views(as_mappings: bool) -> None:
    """A bank asks for two views of an image; plain loaders have one, and their batch is no number of views."""
    from tests.training.test_finetune import Fixed, small

    draw = torch.Generator().manual_seed(3)
    images, labels = torch.randn(24, 1, 8, 8, generator=draw), torch.arange(24) % 4
    batches = [(images[part], labels[part], part) for part in torch.arange(24).split(8)]
    told: Any = [{"x": x, "labels": y, "index": i} for x, y, i in batches] if as_mappings else batches
    networks = small(), small()
    for network, views in zip(networks, (None, 1), strict=True):
        ekgfx.finetune(network, told, bank=Fixed(), views=views, epochs=1, lr=0.01)
    assert all(torch.equal(a, b) for a, b in zip(*(network.parameters() for network in networks), strict=True))
    with pytest.raises(DataError, match="which are not 2 views of each sample"):
        ekgfx.finetune(small(), told, bank=Fixed(), views=2, epochs=1)


@pytest.mark.parametrize(
    ("shape", "samples", "views"),
    [((8, 1, 5, 5), 8, 1), ((2, 8, 1, 5, 5), 8, 2), ((2, 2, 1, 5, 5), 2, 2), ((8, 8, 5, 5), 8, 1), ((2, 3), 0, 2)],
)
def test_a_first_dimension_of_the_samples_is_no_number_of_views(shape, samples: int, views: int) -> None:
    labels = torch.zeros(samples) if samples else None
    assert views_in((torch.zeros(shape), labels), 2, asked=False) == views
    assert views_in(({"x": torch.zeros(shape)}, labels), 2, asked=False) == views
