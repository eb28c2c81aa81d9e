"""Data sets that are held in memory as one tensor: CIFAR, .npz files, scikit-learn's digits and photographs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ekgfx.data.augment import Augmentation
from ekgfx.data.base import Batch, Split, Views, generator
from ekgfx.errors import DataError


@dataclass(frozen=True)
class ArraySplit(Split):
    """Images in memory: uint8 N×C×H×W, or float on [0, 1]; resized, augmented and normalized batch by batch."""

    images: Tensor
    labels: Tensor | None
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation

    def __len__(self) -> int:
        return len(self.images)

    def all_labels(self) -> Tensor | None:
        return self.labels

    @property
    def identity(self) -> Sequence[int | str]:
        return [] if self.labels is None else self.labels.tolist()

    def to(self, device: torch.device) -> "ArraySplit":
        return replace(self, images=self.images.to(device))

    def batches(self, chunks: Sequence[Tensor], views: Views) -> Iterator[Batch]:
        device = self.images.device
        draw = generator(views.seed)
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (self.mean, self.std))
        for index in chunks:
            images = self.images[index.to(device)]
            images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
            shown = [self._view(images, views, draw) for _ in range(views.count)]
            own = views.own(len(index))
            shown, index = [(view[own] - mean) / std for view in shown], index[own]
            labels = None if self.labels is None else self.labels[index].to(device)
            yield Batch(shown[0] if views.count == 1 else torch.stack(shown), labels, index)

    def _view(self, images: Tensor, views: Views, draw: torch.Generator) -> Tensor:
        if views.augment:
            images = self.augmentation(images, draw, colours=views.count > 1)
        if images.shape[2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)


@dataclass(frozen=True)
class Arrays:
    """The samples of one split as read: images uint8 N×C×H×W (or float on [0, 1]), labels int64 N or None."""

    images: Tensor
    labels: Tensor | None

    def take(self, index: Tensor) -> "Arrays":
        return Arrays(self.images[index], None if self.labels is None else self.labels[index])


LUMA = 299, 587, 114
"""Parts of red, green and blue in grey, per mille (ITU-R 601-2, as Pillow's mode L)."""


def in_grey(arrays: Arrays) -> Arrays:
    """The same samples with images of one channel, where they have three."""
    images = arrays.images
    if images.shape[1] != len(LUMA):
        return arrays
    total = sum(part * images[:, c : c + 1].to(torch.float32) for c, part in enumerate(LUMA)) / sum(LUMA)
    assert isinstance(total, Tensor)
    return Arrays(
        total.round().to(images.dtype) if images.dtype == torch.uint8 else total.to(images.dtype), arrays.labels
    )


def read_npz(files: Sequence[Path]) -> Arrays:
    """Files with `images` (N×H×W×C: uint8, or float on [0, 1]; N×H×W for one channel) and, optionally, `labels` (N)."""
    parts = [_read_one_npz(file) for file in files]
    first = parts[0]
    for file, part in zip(files, parts, strict=True):
        if part.images.shape[1:] != first.images.shape[1:] or part.images.dtype != first.images.dtype:
            raise DataError(f"the images of {file} have another shape or type than those of {files[0]}")
        if (part.labels is None) != (first.labels is None):
            raise DataError(f"of {files[0]} and {file} only one has labels")
    labels = None if first.labels is None else torch.cat([part.labels for part in parts if part.labels is not None])
    return Arrays(torch.cat([part.images for part in parts]), labels)


def _read_one_npz(file: Path) -> Arrays:
    try:
        with (
            file.open("rb") as content,
            np.load(content) as arrays,
        ):  # allow_pickle is off by default: an array of objects is a ValueError
            images = arrays["images"]
            labels = arrays["labels"] if "labels" in arrays.files else None
    except KeyError:
        raise DataError(f"{file} has no array 'images' (N×H×W×C; 'labels' beside it, N)") from None
    except Exception as error:  # what zip and NumPy make of damaged bytes may be anything
        raise DataError(f"cannot read {file}: {' '.join(str(error).split())[:300]}") from error
    if images.ndim == 3:
        images = images[..., None]
    floating = np.issubdtype(images.dtype, np.floating)
    if images.ndim != 4 or not (floating or images.dtype == np.uint8):
        raise DataError(f"{file}: images are {images.dtype} {images.shape}; use N×H×W×C, uint8 or float on [0, 1]")
    tensor = torch.from_numpy(images.astype(np.float32) if floating else images).movedim(3, 1).contiguous()
    if labels is None:
        return Arrays(tensor, None)
    if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{file}: labels are {labels.dtype} {labels.shape}; use one integer for each image")
    return Arrays(tensor, torch.from_numpy(labels.astype(np.int64)))


def read_cifar_binary(files: Sequence[Path], label_bytes: int) -> Arrays:
    """CIFAR's binary version: records of the labels (the last one is the fine one) and 3×32×32 bytes."""
    record = label_bytes + 3072
    parts = []
    for file in files:
        try:
            content = np.fromfile(file, dtype=np.uint8)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error}") from error
        if len(content) == 0 or len(content) % record:
            raise DataError(f"{file} has {len(content)} bytes, which is no multiple of CIFAR's {record}: cut short?")
        parts.append(content.reshape(-1, record))
    records = torch.from_numpy(np.concatenate(parts))
    return Arrays(records[:, label_bytes:].reshape(-1, 3, 32, 32).contiguous(), records[:, label_bytes - 1].long())


def read_digits() -> Arrays:
    """scikit-learn's 1,797 handwritten digits, 8×8, as float on [0, 1]."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    digits = load_digits()
    return Arrays(torch.from_numpy(digits.images).float()[:, None] / 16, torch.from_numpy(digits.target).long())


PHOTO_CROPS = {"train": 320, "test": 64}


def read_photos(split: str, size: tuple[int, int], seed: int) -> Arrays:
    """Random crops of scikit-learn's two sample photographs (427×640), without labels.

    The test's crops come from the right-hand quarter, the others from the rest, so that they share no pixel. A crop has
    30% to 100% of the height, the aspect of `size`, and is mirrored half the time.
    """
    from sklearn.datasets import load_sample_images

    photos = [torch.tensor(photo).movedim(2, 0).float() / 255 for photo in load_sample_images().images]
    border = photos[0].shape[2] * 3 // 4
    photos = [photo[:, :, :border] if split == "train" else photo[:, :, border:] for photo in photos]
    draw = generator(seed, 4, list(PHOTO_CROPS).index(split))
    crops = []
    for number in range(PHOTO_CROPS[split]):
        photo = photos[number % len(photos)]
        scale, top, left, mirror = torch.rand(4, generator=draw).tolist()
        limit = min(photo.shape[1] / size[0], photo.shape[2] / size[1])
        height, width = (max(1, int(limit * (0.3 + 0.7 * scale) * side)) for side in size)
        top, left = int(top * (photo.shape[1] - height + 1)), int(left * (photo.shape[2] - width + 1))
        crop = photo[None, :, top : top + height, left : left + width]
        crop = F.interpolate(crop, size, mode="bilinear", antialias=True, align_corners=False)[0]
        crops.append((crop.flip(2) if mirror < 0.5 else crop).mul(255).round().clamp(0, 255).byte())
    return Arrays(torch.stack(crops), None)
