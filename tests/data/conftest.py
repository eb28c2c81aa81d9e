"""The data that several tests look at."""

import shutil
from pathlib import Path

import pytest

from ekgfx import data


@pytest.fixture(scope="module")
def cifar(data_dir: Path) -> data.Data:
    return data.load(f"cifar10:{data_dir / 'cifar10'}", classes=10)


@pytest.fixture
def photos_of(data_dir: Path, tmp_path: Path):
    """Copies some of the real ImageNet images to the given places below the test's folder."""
    images = sorted((data_dir / "imagenet-sample").glob("*.jpg"))

    def copy(*places: str) -> Path:
        for image, place in zip(images, places, strict=False):
            (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, tmp_path / place)
        return tmp_path

    return copy
