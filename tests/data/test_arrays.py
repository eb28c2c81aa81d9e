"""Data in arrays: CIFAR in both its forms, npz files, digits and photographs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ekgfx import data
from ekgfx.errors import DataError
from tests.data.reading import unaugmented


def test_cifar_binary_files_are_the_same_data(cifar: data.Data, data_dir: Path, tmp_path: Path) -> None:
    source = np.load(data_dir / "cifar10" / "test.npz")
    pixels = source["images"][:100].transpose(0, 3, 1, 2).reshape(100, -1)
    records = np.concatenate([source["labels"][:100, None], pixels], axis=1)
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    records[:50].tofile(inner / "test_batch.bin")
    for number in (1, 2):
        records[25 * number : 25 * number + 25].tofile(inner / f"data_batch_{number}.bin")
    binary = data.load(f"cifar10:{tmp_path}")
    assert (binary.size("train"), binary.size("test")) == (50, 50)
    assert torch.equal(unaugmented(binary, "train", [0, 49]), unaugmented(cifar, "test", [25, 74]))
    assert torch.equal(binary.labels("test"), cifar.labels("test")[:50])
    (inner / "test_batch.bin").write_bytes(records[:50].tobytes()[:-7])
    with pytest.raises(DataError, match=r"test_batch\.bin has 153643 bytes.*cut short"):
        data.load(f"cifar10:{tmp_path}")


def test_cifar100_binary_takes_the_fine_label(tmp_path: Path) -> None:
    records = np.zeros((4, 3074), dtype=np.uint8)
    records[:, 0], records[:, 1] = 9, [0, 99, 5, 7]
    for name in ("train.bin", "test.bin"):
        records.tofile(tmp_path / name)
    assert data.load(f"cifar100:{tmp_path}", classes=100).labels("train").tolist() == [0, 99, 5, 7]


def test_one_npz_set_is_divided_and_floats_are_kept(tmp_path: Path) -> None:
    images = np.random.default_rng(0).random((50, 6, 6))
    np.savez(tmp_path / "all.npz", images=images, labels=np.arange(50) % 5)
    loaded = data.load(f"npz:{tmp_path}", classes=5)
    assert (loaded.size("train"), loaded.size("test"), loaded.input_shape) == (40, 10, (1, 6, 6))
    assert loaded.labels("test").bincount().tolist() == [2] * 5
    shown = torch.cat([unaugmented(loaded, "train", list(range(40))), unaugmented(loaded, "test", list(range(10)))])
    pixels = (shown * 0.5 + 0.5).flatten().sort().values
    torch.testing.assert_close(pixels, torch.from_numpy(images).float().flatten().sort().values)


def test_digits_have_a_fixed_split_and_no_mirror_images() -> None:
    digits = data.load("digits", seed=9)
    assert (digits.size("train"), digits.size("test"), digits.classes, digits.input_shape) == (1438, 359, 10, (1, 8, 8))
    assert torch.equal(digits.labels("test"), data.load("digits", seed=1).labels("test"))
    assert digits.labels("test").bincount().min() >= 34
    (train,) = digits.loader("train", 2000)
    assert abs(float(train.images.mean())) < 0.01 and abs(float(train.images.std()) - 1) < 0.01
    assert not digits.split("train").augmentation.flip


def test_photos_are_label_free_crops_of_two_photographs() -> None:
    photos = data.load("photos", image_size=48)
    (batch,) = photos.loader("test", 64)
    assert photos.classes is None and batch.labels is None and batch.images.shape == (64, 3, 48, 48)
    assert torch.equal(batch.images, next(iter(data.load("photos", image_size=48).loader("test", 64))).images)
    assert len({tuple(image.flatten()[:50].tolist()) for image in batch.images}) == 64  # no crop twice
    assert batch.images.flatten(1).std(1).min() > 0.05  # and none empty
    train, val = photos.search_subset()
    assert len(train) == 256 and len(val) == 32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(4, int)}, "has no array 'images'"),
        ({"images": np.zeros((4, 8, 8, 3), np.int32)}, "images are int32"),
        ({"images": np.zeros((4, 8, 8, 3), np.uint8), "labels": np.zeros(3, int)}, "labels are int64 .3,.; use one"),
        ({"images": np.array([{}], dtype=object)}, "cannot read .*allow_pickle=False"),
    ],
)
def test_unusable_arrays_are_explained(tmp_path: Path, arrays: dict, message: str) -> None:
    for name in ("train.npz", "test.npz"):
        np.savez(tmp_path / name, **arrays)
    with pytest.raises(DataError, match=message):
        data.load(f"npz:{tmp_path}")


def test_damaged_arrays_are_explained(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "test.npz").write_bytes((data_dir / "cifar10" / "test.npz").read_bytes()[:100_000])
    with pytest.raises(DataError, match=r"cannot read .*test\.npz"):
        data.load(f"cifar10:{tmp_path}")
    np.savez(tmp_path / "test.npz", images=np.zeros((4, 32, 32, 3), np.uint8), labels=np.array([0, 1, 10, 11]))
    np.savez(tmp_path / "train.npz", images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.array([0, 1]))
    with pytest.raises(DataError, match="label 10 of image 2 is out of range 0…9 .2 such"):
        data.load(f"cifar10:{tmp_path}").size("test")
