"""What `--data` may say, and the advice where it cannot be."""

import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from ekgfx import data
from ekgfx.data.sources import open_timm
from ekgfx.errors import DataError


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cifar:x", "did you mean 'cifar10:x'?"),
        ("digit", "did you mean 'digits'?"),
        ("imagenet", "unknown data 'imagenet': use folder:DIR"),
        ("folder:/nowhere", "no such folder: '/nowhere'"),
        ("folder:", "no such folder: ''"),
        ("timm:", "names no data set"),
        ("timm:torch/nothing", "timm cannot open 'torch/nothing'"),
    ],
)
def test_unknown_data_is_explained(spec: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        data.load(spec)
    assert message in str(caught.value)


def test_a_folder_without_its_kind_is_recognized(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'folder:"):
        data.load(str(tmp_path))


def test_a_folder_without_cifar_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no cifar10 in .*test\*\.npz .*or the binary version's test_batch\.bin"):
        data.load(f"cifar10:{tmp_path}")


def test_data_for_another_model_is_refused(data_dir: Path) -> None:
    with pytest.raises(DataError, match="cifar10 has 10 classes, but the model has 1,000 outputs"):
        data.load(f"cifar10:{data_dir / 'cifar10'}", classes=1000)
    with pytest.raises(DataError, match="digits have 1 channel, but the model is fed 3"):
        data.load("digits", mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.fixture
def archived(photos_of) -> Path:
    """Four images in each of the folders a and b, which are also in all.tar."""
    root = photos_of(*(f"{name}/{i}.jpg" for name in "ab" for i in range(4)))
    with tarfile.open(root / "all.tar", "w") as archive:
        for name in "ab":
            archive.add(root / name, name)
    return root


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves the archive open
def test_timm_opens_folders_torchvision_and_archives_alike(archived) -> None:
    root = archived
    opened = {
        "files": open_timm("folder", str(root), "train"),
        "pairs": open_timm("torch/folder", str(root), "train"),
        "reader": open_timm("tar", str(root / "all.tar"), "train"),
    }
    assert {type(source).__name__ for source in opened.values()} == {"FileImages", "PairImages", "ReaderImages"}
    for source in opened.values():
        assert len(source) == 8 and source.labels().tolist() == [0] * 4 + [1] * 4
        image, label = source.read(5)
        assert label == 1 and np.array_equal(image, opened["files"].read(5)[0])
    whole = data.load(f"timm:torch/folder@{root}", image_size=32)
    (batch,) = whole.loader("train", 8)
    assert whole.classes == 2 and batch.labels.tolist() == [0 if i < 4 else 1 for i in batch.index]
    with pytest.raises(DataError, match="label 1 of image [4-7] is out of range 0…0 .4 such labels of 8"):
        next(iter(data.load(f"timm:torch/folder@{root}", image_size=32, classes=1).loader("train", 8)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # timm leaves the archive open
@pytest.mark.parametrize("method", sorted({"fork", "spawn"}.intersection(multiprocessing.get_all_start_methods())))
def test_worker_processes_read_what_this_one_reads(archived, method: str) -> None:
    """Spawned ones (macOS, Windows) get the data set pickled; forked ones must not share this one's archive."""
    opened = data.load(f"timm:tar@{archived / 'all.tar'}", image_size=32)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    try:
        workers = (0, 1 if method == "spawn" else 2)
        here, there = (list(opened.loader("train", 2, subset=[*range(8)] * 4, workers=n)) for n in workers)
    finally:
        multiprocessing.set_start_method(before, force=True)
    for own, other in zip(here, there, strict=True):
        assert torch.equal(own.images, other.images) and torch.equal(own.labels, other.labels)
