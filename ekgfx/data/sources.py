"""Where image files come from: folders, and anything `timm.data.create_dataset` opens with random access.

An image that cannot be read is an error that names it. timm's own data set class would put its neighbour in its place,
and a label or a bank's row, looked up by index, would then belong to another image.
"""

import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_dataset
from timm.data.dataset import ImageDataset, IterableImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import Dataset

from ekgfx.data.decoding import decode, in_rgb
from ekgfx.data.folders import ENDINGS, find_images, is_hidden, told_order
from ekgfx.data.tables import numbers_of, read_table
from ekgfx.errors import DataError

log = logging.getLogger("ekgfx")


class ImageSource(ABC):
    """Labelled images by index, decoded when asked for."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> tuple[Image.Image, int]:
        """The image in RGB, and its label (-1 where there is none). Raises DataError, naming the image."""

    @abstractmethod
    def labels(self) -> Tensor | None:
        """int64 labels of all images; None where there are none."""

    @property
    def identity(self) -> Sequence[int | str]:
        """See `ekgfx.data.base.Split.identity`."""
        return ()


@dataclass(frozen=True)
class FileImages(ImageSource):
    """Files and their labels (None: no labels)."""

    files: Sequence[str]
    file_labels: Sequence[int] | None

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> tuple[Image.Image, int]:
        label = -1 if self.file_labels is None else self.file_labels[index]
        return decode(self.files[index], self.files[index]), label

    def labels(self) -> Tensor | None:
        return None if self.file_labels is None else torch.tensor(self.file_labels, dtype=torch.int64)

    @property
    def identity(self) -> Sequence[int | str]:
        return [*("/".join(Path(file).parts[-2:]) for file in self.files), *(self.file_labels or ())]

    def take(self, index: Tensor) -> "FileImages":
        chosen = index.tolist()
        labels = None if self.file_labels is None else [self.file_labels[i] for i in chosen]
        return FileImages([self.files[i] for i in chosen], labels)


@dataclass(frozen=True)
class ReaderImages(ImageSource):
    """A timm reader: gives open files and labels."""

    dataset: ImageDataset

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        file, label, *_ = self.dataset.reader[index]
        with file:
            return decode(file, self.dataset.filename(index)), int(label)

    def labels(self) -> Tensor:
        return torch.tensor([int(self.dataset.reader[i][1]) for i in range(len(self))], dtype=torch.int64)


@dataclass(frozen=True)
class PairImages(ImageSource):
    """A torchvision data set: gives (PIL image, label) by index."""

    dataset: Dataset
    name: str

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset does not declare it

    def read(self, index: int) -> tuple[Image.Image, int]:
        try:
            image, label = self.dataset[index]
            return in_rgb(image), int(label)
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read image {index} of {self.name}: {error}") from error

    def labels(self) -> Tensor:
        return torch.tensor([self.read(i)[1] for i in range(len(self))], dtype=torch.int64)


DEEPEST, MOST_FOLDERS = 12, 100_000
"""Levels of folders, and folders in all, beyond which it is not one data set. (ImageNet-21k has 21,841.)"""
LONG = 5.0
"""Seconds after which it is said that a folder is still looked through."""

_LABELLED_NAME = re.compile(r"(\d+)_")
_TRAIN_FOLDERS = ("train", "training", "trn")
_TEST_FOLDERS = ("val", "validation", "valid", "test", "testing", "eval", "dev")


def open_folder(folder: Path, classes: int | None) -> tuple[dict[str, FileImages], int | None]:
    """The image files of each set found in a folder ('train' and 'test', or only 'all'), and the number of classes.

    Sets: `train` (or `training`) and one of `val`, `validation`, `valid`, `test`, `testing`, `eval`, `dev`, in any
    case, where the folder has both, or its only folder has; otherwise one set (in a folder of one of those names, if
    there is no other).

    Labels in a table: `labels.csv`, or a .csv for each set, see `ekgfx.data.tables`.

    Labels, the same way in every set: from class folders, numbered by ImageNet's class index if they are all ImageNet
    ids (n01440764) and the model has 1000 outputs, in the order of `classes.txt` in the folder where it names them,
    else in natural order of their names as timm does; else from the number before the first underscore of each file's
    name (0012_anything.jpg is class 12); else there are none.
    """
    _check_extent(folder)
    if tables := _tables(folder):
        return _open_tables(tables, classes)
    inside = {
        path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir() and not is_hidden(path.name)
    }
    trains = [inside[name] for name in _TRAIN_FOLDERS if name in inside]
    tests = [inside[name] for name in _TEST_FOLDERS if name in inside]
    if len(inside) == 1 and not (trains or tests):  # as an archive is unpacked
        (within,) = inside.values()
        if {path.name.lower() for path in within.iterdir() if path.is_dir()} & {*_TRAIN_FOLDERS, *_TEST_FOLDERS}:
            return open_folder(within, classes)
    if not (trains and tests):
        only = [*trains, *tests]
        images, count, _ = _list_images(only[0] if len(only) == len(inside) == 1 else folder, folder, classes, None)
        return {"all": images}, count
    train, test = trains[0], tests[0]
    train_images, count, class_to_index = _list_images(train, folder, classes, None)
    test_images, test_count, _ = _list_images(test, folder, classes, class_to_index)
    if count is not None and test_count is not None:
        count = max(count, test_count)
    elif count != test_count:
        raise DataError(f"of {train} and {test} only one has labels")
    return {"train": train_images, "test": test_images}, count


def _check_extent(folder: Path) -> None:
    """DataError for what is no folder of images but a disk or a home, which would take minutes to list; a note where a
    folder takes long."""
    place = folder.resolve()
    if place == place.parent or place == Path.home().resolve():
        raise DataError(
            f"folder:{folder} is a whole {'disk' if place == place.parent else 'home'}; name the folder of images"
        )
    start, said = time.monotonic(), False
    for count, (inside, folders, _) in enumerate(os.walk(place, followlinks=True), 1):
        if len(Path(inside).relative_to(place).parts) > DEEPEST and folders:
            raise DataError(
                f"{folder} has folders more than {DEEPEST} deep, such as {inside}; name the folder of images"
            )
        if count > MOST_FOLDERS:
            raise DataError(f"{folder} has more than {MOST_FOLDERS} folders; name the folder of images")
        if not said and time.monotonic() - start > LONG:
            log.info("%s: looking through it for images, %d folders so far", folder, count)
            said = True


def _tables(folder: Path) -> dict[str, Path]:
    """labels.csv as the table of all images, or a table for each split."""
    inside = {path.stem.lower(): path for path in sorted(folder.glob("*.csv"))}
    train = next((inside[name] for name in _TRAIN_FOLDERS if name in inside), None)
    test = next((inside[name] for name in _TEST_FOLDERS if name in inside), None)
    if train is not None and test is not None:
        return {"train": train, "test": test}
    return {"all": inside["labels"]} if "labels" in inside else {}


def _open_tables(tables: dict[str, Path], classes: int | None) -> tuple[dict[str, FileImages], int | None]:
    """The sets of a folder whose labels stand in tables; a column of splits divides one table."""
    rows = {split: read_table(table) for split, table in tables.items()}
    numbers = numbers_of([row.label for part in rows.values() for row in part])
    if "all" in rows:
        train = [row for row in rows["all"] if row.split in _TRAIN_FOLDERS]
        test = [row for name in _TEST_FOLDERS for row in rows["all"] if row.split == name]
        if train and test:
            first = test[0].split
            rows = {"train": train, "test": [row for row in test if row.split == first]}
    sets = {
        split: FileImages([row.file for row in part], [numbers[row.label] for row in part])
        for split, part in rows.items()
    }
    count = max(numbers.values()) + 1
    return sets, classes if classes and count <= classes and set(numbers) == set(map(str, numbers.values())) else count


def _list_images(
    folder: Path, root: Path, classes: int | None, class_to_index: dict[str, int] | None
) -> tuple[FileImages, int | None, dict[str, int] | None]:
    """Images of one set below `root`, number of classes, and its class folders' numbers (None where it has none)."""
    samples, found = find_images(folder)
    if not samples:
        raise DataError(f"no images in {folder} or its folders; use {', '.join(sorted(ENDINGS))} files")
    files = [file for file, _ in samples]
    if set(found) == {""}:
        labels = _labels_of_names(files)
        count = None if labels is None else max(labels) + 1
        return FileImages(files, labels), classes if count and classes and count <= classes else count, None
    if "" in found:
        loose = next(file for file, label in samples if label == found[""])
        raise DataError(
            f"{folder} has images of its own beside class folders, such as {loose}: move them or the folders"
        )
    if class_to_index is None and classes == ImageNetInfo().num_classes():
        class_to_index = _imagenet_index(found)
    if class_to_index is None:
        class_to_index = told_order(root, found)
    if class_to_index is None and classes is not None and len(found) < classes:
        class_to_index = _with_empty(folder, found, classes)
    class_to_index = class_to_index or found
    unknown = sorted(set(found) - set(class_to_index))
    if unknown:
        raise DataError(f"class folder '{unknown[0]}' of {folder} is none of the training set's")
    names = {number: name for name, number in found.items()}
    labels = [class_to_index[names[number]] for _, number in samples]
    return FileImages(files, labels), len(class_to_index), class_to_index


def _with_empty(folder: Path, found: dict[str, int], classes: int) -> dict[str, int] | None:
    """The numbers of all class folders, where those without images are just what the model's outputs have more."""
    inside = {path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)}
    empty = inside - set(found)
    if not set(found) <= inside or len(inside) != classes:
        return None
    log.warning("%s: no images of class %s", folder, ", ".join(sorted(empty)[:5]))
    return {name: number for number, name in enumerate(sorted({*found, *empty}, key=natural_key))}


def _labels_of_names(files: Sequence[str]) -> list[int] | None:
    """The number before the first underscore of each name; None if no name has one."""
    found = [_LABELLED_NAME.match(Path(file).name) for file in files]
    if not any(found):
        return None
    for file, match in zip(files, found, strict=True):
        if match is None:
            raise DataError(f"{file} has no label: other names here begin with a class number (0012_name.jpg)")
    return [int(match[1]) for match in found if match]


def _imagenet_index(names: dict[str, int]) -> dict[str, int] | None:
    """ImageNet-1k's class index of all its ids, if all names are such ids."""
    index = {label: number for number, label in enumerate(ImageNetInfo().label_names())}
    return index if set(names) <= set(index) else None


def open_timm(name: str, root: str | None, split: str) -> ImageSource:
    """A data set by timm's name, such as `torch/imagenet`, `hfds/org/name`, or a folder if the name has no prefix."""
    try:
        dataset = create_dataset(name, root, split=split)
    # timm asserts, and passes on what torchvision and datasets raise about names, roots and missing files
    except (AssertionError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        install = "; pip install datasets" if name.startswith("hfds") and isinstance(error, ImportError) else ""
        raise DataError(f"timm cannot open '{name}' ({split}) in {root or 'no folder'}: {error}{install}") from error
    if isinstance(dataset, IterableImageDataset):
        raise DataError(f"timm:{name} is read as a stream, but samples are needed by index: use hfds/… or folder:DIR")
    if not isinstance(dataset, ImageDataset):
        return PairImages(dataset, f"timm:{name}")
    if isinstance(dataset.reader, ReaderImageFolder):
        files, targets = zip(*dataset.reader.samples, strict=True)
        return FileImages(files, targets)
    if isinstance(dataset.reader, ReaderImageInTar):
        # An archive that stays open has one place to read at, which forked processes share, and cannot be pickled
        dataset.reader.cache_tarfiles = False
    return ReaderImages(dataset)


def open_timm_test(name: str, root: str | None) -> ImageSource:
    """The validation split of such a data set, or its test split where it has no other."""
    try:
        return open_timm(name, root, "validation")
    except DataError as error:
        try:
            return open_timm(name, root, "test")
        except DataError:
            raise error from None
