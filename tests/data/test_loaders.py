"""Batches: right images, labels and indices, randomness by seed and epoch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ekgfx import data
from ekgfx.errors import DataError
from tests.data.reading import unaugmented


def test_cifar_is_the_published_one(cifar: data.Data, data_dir: Path) -> None:
    assert (cifar.size("train"), cifar.size("test"), cifar.classes, cifar.input_shape) == (
        50000,
        10000,
        10,
        (3, 32, 32),
    )
    assert cifar.labels("train").bincount().tolist() == [5000] * 10
    assert cifar.labels("test")[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]  # cat, ship, ship, airplane, frog …
    raw = np.load(data_dir / "cifar10" / "train-1.npz")["images"][7]  # image 12,507 of the training set
    shown = unaugmented(cifar, "train", [12507])[0]
    mean, std = torch.tensor(cifar.mean)[:, None, None], torch.tensor(cifar.std)[:, None, None]
    torch.testing.assert_close((shown * std + mean) * 255, torch.from_numpy(raw).movedim(2, 0).float())


def test_the_same_seed_and_epoch_give_the_same_batches(cifar: data.Data) -> None:
    def batches(seed: int, epoch: int) -> list[data.Batch]:
        loader = cifar.loader("test", 32, shuffle=True, augment=True, views=2, seed=seed, subset=range(100))
        loader.set_epoch(epoch)
        first, again = list(loader), list(loader)
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.images, other.images) and torch.equal(one.index, other.index)
        return first

    base = batches(3, 1)
    assert [tuple(batch.images.shape) for batch in base] == [(2, 32, 3, 32, 32)] * 3 + [(2, 4, 3, 32, 32)]
    assert all(torch.equal(one.images, other.images) for one, other in zip(base, batches(3, 1), strict=True))
    for other in (batches(3, 2), batches(4, 1)):
        assert not torch.equal(base[0].index, other[0].index)
    assert not torch.equal(base[0].images[0], base[0].images[1])  # two views, not one twice


def test_a_batch_knows_its_labels_and_indices(cifar: data.Data) -> None:
    subset = [17, 3, 9999, 17, 42]
    loader = cifar.loader("test", 2, shuffle=True, subset=subset)
    batches = list(loader)
    index = torch.cat([batch.index for batch in batches])
    assert sorted(index.tolist()) == sorted(subset)
    assert torch.equal(torch.cat([batch.labels for batch in batches]), cifar.labels("test")[index])
    assert torch.equal(torch.cat([batch.images for batch in batches]), unaugmented(cifar, "test", index.tolist()))


def test_a_short_last_batch_can_be_left_out(cifar: data.Data) -> None:
    def sizes(loader: data.Loader) -> list[int]:
        found = [len(batch.index) for batch in loader]
        assert len(loader) == len(found) and loader.samples == sum(found)
        return found

    assert sizes(cifar.loader("test", 4, subset=range(10))) == [4, 4, 2]
    assert sizes(cifar.loader("test", 4, subset=range(10), drop_last=True)) == [4, 4]
    assert sizes(cifar.loader("test", 4, subset=[])) == []


def test_images_are_resized_to_the_model(cifar: data.Data, data_dir: Path) -> None:
    large = data.load(f"cifar10:{data_dir / 'cifar10'}", image_size=64)
    assert large.input_shape == (3, 64, 64)
    images = unaugmented(large, "test", [0, 1])
    back = torch.nn.functional.avg_pool2d(images, 2)
    assert images.shape == (2, 3, 64, 64)
    assert (back - unaugmented(cifar, "test", [0, 1])).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "no split 'val': use train or test"),
        ({"batch_size": 0}, "batch size 0 and 1 views"),
        ({"subset": [0, 10000]}, "subset index 10000 is out of range: cifar10 has 10000 samples in 'test'"),
        ({"subset": [-1, 3]}, "subset index -1 is out of range"),
    ],
)
def test_a_loader_refuses_what_cannot_be(cifar: data.Data, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        cifar.loader(**{"split": "test", "batch_size": 4} | options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_sees_the_same_batches(cifar: data.Data) -> None:
    options = {"shuffle": True, "augment": True, "views": 2, "subset": range(64)}
    (here,), (there,) = cifar.loader("test", 64, **options), cifar.to("cuda").loader("test", 64, **options)
    assert there.images.device.type == there.labels.device.type == "cuda" and there.index.device.type == "cpu"
    torch.testing.assert_close(there.images.cpu(), here.images, atol=1e-5, rtol=1e-5)


def test_training_batches_mix_the_classes_of_sorted_files(tmp_path: Path) -> None:
    """The order of files is that of their classes; whoever takes the statistics of a batch wants others."""
    images = np.random.default_rng(0).integers(0, 255, (400, 4, 4, 1), dtype=np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=np.repeat(np.arange(4), 100))
    loaded = data.load(f"npz:{tmp_path}")
    loader = loaded.loader("train", 50)
    first, again = list(loader), list(loaded.loader("train", 50))
    index = torch.cat([batch.index for batch in first])
    assert sorted(index.tolist()) == list(range(400))
    assert torch.equal(index, torch.cat([batch.index for batch in again]))
    assert torch.equal(torch.cat([batch.labels for batch in first]), loaded.labels("train")[index])
    for batch in first:
        assert len(batch.labels.unique()) == 4 and batch.labels.bincount().max() < 30  # of 50; 12.5 are expected
    for ordered in (loader.in_order(), loaded.loader("train", 50, subset=range(400)), loaded.loader("test", 50)):
        assert torch.cat([batch.index for batch in ordered]).tolist() == list(range(400))
    few = torch.cat([batch.index for batch in loaded.loader("test", 50).mixed(120)])
    assert len(set(few.tolist())) == 120 and len(loaded.labels("test")[few].unique()) == 4
    parts = [loader.dealt(rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([batch.index for part in parts for batch in part]).sort().values, torch.arange(400))
    assert torch.equal(torch.cat([batch.index for batch in loader.after(150)]), index[150:])
