"""Image files as batches: timm's transforms in torch's DataLoader, with randomness that belongs to the sample."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from ekgfx.data.base import CPU, Batch, Split, Views, check_labels, generator, mixed_seed
from ekgfx.data.sources import ImageSource
from ekgfx.errors import DataError

JITTER = 0.2  # of brightness, contrast and saturation, where several views are taken
SMALL = 64  # pixels a side up to which training shows whole images: of CIFAR, of small ImageNets


@dataclass(frozen=True)
class Geometry:
    """What timm's transforms need to know: output size (H, W), normalization, crop and interpolation."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str

    @property
    def channels(self) -> int:
        """3, or 1 for images in grey."""
        return len(self.mean)

    def transform(self, views: Views) -> Any:
        """timm's evaluation transform, or its training transform: random resized crop and flip, and in several views a
        jitter of brightness, contrast and saturation. Small images are shifted instead (a crop of a tenth of 32 × 32
        pixels shows nothing), and grey ones are not mirrored (letters and digits are no others then)."""
        if views.augment and self.small:
            return self._shifted(views)
        return create_transform(
            input_size=(len(self.mean), *self.size),
            is_training=views.augment,
            color_jitter=JITTER if views.count > 1 else 0.0,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            hflip=0.5 if self.channels == 3 else 0.0,
        )

    @property
    def small(self) -> bool:
        """Whether training shows whole images, shifted a little, rather than crops of any size."""
        return max(self.size) <= SMALL

    @property
    def augmented(self) -> str:
        """What training does to images, in words."""
        crops = f"shifts by up to {self.shift} pixels" if self.small else "crops of 8% to 100%"
        return f"{crops}, mirrored half the time" if self.channels == 3 else crops

    @property
    def shift(self) -> int:
        """Most pixels that a small image is shifted by."""
        return max(1, min(self.size) // 8)

    def _shifted(self, views: Views) -> Any:
        colour = self.channels == 3
        square = self.size[0] == self.size[1]
        steps = [
            transforms.Resize(self.size[0] if square else self.size, str_to_interp_mode(self.interpolation)),
            transforms.RandomCrop(self.size, padding=self.shift, padding_mode="reflect"),
            *([transforms.RandomHorizontalFlip()] if colour else ()),
            *([transforms.ColorJitter(JITTER, JITTER, JITTER)] if views.count > 1 else ()),
            transforms.ToTensor(),
            transforms.Normalize(self.mean, self.std),
        ]
        return transforms.Compose(steps)


class _Decoder(Dataset):
    """Views of one image as V×C×H×W with its label and index; a DataError is returned, not raised, because a worker
    process would wrap it in its traceback."""

    def __init__(self, source: ImageSource, geometry: Geometry, views: Views) -> None:
        self.source = source
        self.transform = geometry.transform(views)
        self.channels = len(geometry.mean)
        self.views = views

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | DataError:
        try:
            image, label = self.source.read(index)
            image = image if self.channels == 3 else image.convert("L")
        except DataError as error:
            return error
        shown = []
        for view in range(self.views.count):
            with seeded(mixed_seed(self.views.seed, index, view)):
                shown.append(self.transform(image))
        return torch.stack(shown), label, index


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The transforms draw from Python's, NumPy's and torch's global generators: seed these, and put them back after."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _collate(samples: list[tuple[Tensor, int, int] | DataError]) -> tuple[Tensor, Tensor, Tensor] | DataError:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, labels, index = zip(*samples, strict=True)
    return torch.stack(images, dim=1), torch.tensor(labels), torch.tensor(index)


@dataclass(frozen=True)
class ImageSplit(Split):
    """Image files, decoded and transformed by timm's transforms, in worker processes if asked."""

    source: ImageSource
    geometry: Geometry
    classes: int | None
    name: str
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.source)

    @cached_property
    def _labels(self) -> Tensor | None:
        return self.source.labels()  # some sources open every file for it

    def all_labels(self) -> Tensor | None:
        return self._labels

    @property
    def identity(self) -> Sequence[int | str]:
        return self.source.identity

    def to(self, device: torch.device) -> "ImageSplit":
        return replace(self, device=device)

    def batches(self, chunks: Sequence[Tensor], views: Views) -> Iterator[Batch]:
        decoder = _Decoder(self.source, self.geometry, views)
        chunks = [chunk[views.own(len(chunk))] for chunk in chunks]
        pinned = self.device.type == "cuda"
        loader = DataLoader(
            decoder,
            batch_sampler=[chunk.tolist() for chunk in chunks],
            num_workers=views.workers,
            collate_fn=_collate,
            pin_memory=pinned,
            generator=generator(views.seed),  # or it would draw from, and so change, the global one
        )
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            images, labels, index = batch
            check_labels(labels, self.classes, index, self.name)
            images = (images[0] if views.count == 1 else images).to(self.device, non_blocking=pinned)
            yield Batch(images, None if self.classes is None else labels.to(self.device), index)
