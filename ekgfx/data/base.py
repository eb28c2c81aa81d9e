"""What every data set gives: splits, deterministic re-iterable loaders, and the subsets that the search works on."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ekgfx.distributed.team import Team
from ekgfx.errors import DataError

SPLITS = ("train", "test")
CPU = torch.device("cpu")


class Batch(NamedTuple):
    """One batch. Images and labels are on the data's device; the index stays on the CPU, where it looks up rows."""

    images: Tensor
    """float32, normalized: B×C×H×W, or V×B×C×H×W where the loader was asked for V > 1 views."""
    labels: Tensor | None
    """int64, B; None where the data has no labels."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks a batch for
    """int64, B: each sample's index within its split."""


@dataclass(frozen=True)
class Views:
    """How a loader shows a sample: `count` times, augmented or not, with randomness drawn from `seed`."""

    count: int = 1
    augment: bool = False
    seed: int = 0
    workers: int = 0
    part: tuple[int, int] = (0, 1)
    """Only the k-th of n parts of every batch, as several processes share it; the random numbers are those of the
    whole."""

    def own(self, count: int) -> slice:
        """The places of the part among `count`."""
        return Team(*self.part).part(count)


class Split(ABC):
    """The samples of one split, by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def all_labels(self) -> Tensor | None:
        """int64 labels of all samples, in order, on the CPU; None where there are none."""

    @property
    def identity(self) -> Sequence[int | str]:
        """What tells the samples apart, as far as it is known without opening them: labels, names of files."""
        return ()

    @abstractmethod
    def batches(self, chunks: Sequence[Tensor], views: Views) -> Iterator[Batch]:
        """One batch for each tensor of indices in `chunks`, in that order."""

    @abstractmethod
    def to(self, device: torch.device) -> "Split":
        """The same samples, giving their batches on `device`."""


class Loader:
    """Batches of a split. May be iterated many times; the same (seed, epoch) gives the same batches, bit for bit.

    `set_epoch` moves on to another shuffle and other augmentations; without it every pass is the same.
    """

    def __init__(
        self,
        split: Split,
        indices: Tensor,
        batch_size: int,
        views: Views,
        shuffle: bool = False,
        drop_last: bool = False,
    ) -> None:
        self.split = split
        self.indices = indices
        self.batch_size = batch_size
        self.views = views
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.turn = (0, 1)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def dealt(self, rank: int, size: int) -> "Loader":
        """Every size-th batch of an unshuffled pass, beginning with number `rank`; the others are not even opened."""
        assert not (self.shuffle or self.views.augment)  # whose random numbers follow each other
        dealt = Loader(self.split, self.indices, self.batch_size, self.views, drop_last=self.drop_last)
        dealt.turn = (rank, size)
        return dealt

    def after(self, samples: int) -> "Loader":
        """The batches that follow the first `samples` samples of an unshuffled pass; those are not even opened.

        Raises DataError where that is not the end of a batch, or the batches are shuffled.
        """
        if self.shuffle or (samples % self.batch_size and samples != len(self.indices)):
            order = "shuffled" if self.shuffle else f"of {self.batch_size}"
            raise DataError(f"cannot go on after {samples} samples in batches {order}")
        return self._unshuffled(self.indices[samples:])

    def mixed(self, most: int | None = None) -> "Loader":
        """The same samples (or `most` of them, drawn at random) in a random order that is the same every time.

        For whatever takes the statistics of a batch: files come class after class, and a batch of one class has others.
        """
        return self._unshuffled(shuffled(self.indices, generator(5))[:most])

    def in_order(self) -> "Loader":
        """The same samples by ascending index."""
        return self._unshuffled(self.indices.sort().values)

    def _unshuffled(self, indices: Tensor) -> "Loader":
        other = Loader(self.split, indices, self.batch_size, self.views, drop_last=self.drop_last)
        other.epoch = self.epoch
        return other

    @property
    def samples(self) -> int:
        """Number of samples that one pass gives."""
        count = len(self.indices)
        return count - count % self.batch_size if self.drop_last else count

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = self.indices
        if self.shuffle:
            order = shuffled(order, generator(self.views.seed, self.epoch, 0))
        order = order[: self.samples]
        first, every = self.turn
        chunks = order.split(self.batch_size)[first::every] if len(order) else ()
        yield from self.split.batches(chunks, replace(self.views, seed=mixed_seed(self.views.seed, self.epoch, 1)))


@dataclass(frozen=True)
class Data:
    """A data set: two splits (opened at first use), the number of classes, and the shape of one normalized image.

    Example:
        >>> data = ekgfx.data.load("digits")
        >>> for images, labels, index in data.loader("test", 256):
        ...     print(images.shape)
    """

    name: str
    spec: str
    classes: int | None
    """Number of classes; None where the data has no labels."""
    input_shape: tuple[int, int, int]
    """C, H, W of one image as the loaders give it."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    openers: dict[str, Callable[[], Split]] = field(repr=False)
    resized: str = ""
    """How images come to that size, in words."""
    augmented: str = ""
    """What training does to them where it augments, in words."""
    device: torch.device = CPU
    _opened: dict[str, Split] = field(default_factory=dict, repr=False, compare=False)

    def split(self, name: str) -> Split:
        """The split "train" or "test". Raises DataError for any other name."""
        if name not in SPLITS:
            raise DataError(f"no split '{name}': use {' or '.join(SPLITS)}")
        if name not in self._opened:
            self._opened[name] = self.openers[name]().to(self.device)
        return self._opened[name]

    def size(self, split: str) -> int:
        """Number of samples in the split."""
        return len(self.split(split))

    def labels(self, split: str) -> Tensor | None:
        """int64 labels of the split's samples in order, on the CPU; None where there are none."""
        return self.split(split).all_labels()

    def digest(self, split: str) -> str:
        """Tells whether a split holds the same samples in the same order as another time, as far as names and labels
        say so."""
        of = self.split(split)
        told = json.dumps([len(of), *of.identity])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def to(self, device: torch.device | str) -> "Data":
        """The same data with batches on `device`; sets that are held in memory are moved there as a whole."""
        device = torch.device(device)
        opened = {name: split.to(device) for name, split in self._opened.items()}
        return replace(self, device=device, _opened=opened)

    def loader(
        self,
        split: str,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: bool = False,
        views: int = 1,
        seed: int = 0,
        drop_last: bool = False,
        subset: Tensor | Sequence[int] | None = None,
        workers: int = 0,
        part: tuple[int, int] = (0, 1),
    ) -> Loader:
        """Batches of a split.

        Args:
            split: "train" or "test"
            batch_size: samples in a batch; the last one may be smaller
            shuffle: in another order for every epoch. Otherwise in the order of `subset`; without one, the test split
                in its own order, and the training split in a random order that is the same every time, so that every
                batch mixes the classes also where files are sorted by class (a batch says which samples it holds)
            augment: flips and crops; with two or more views also brightness, contrast and saturation
            views: how many (augmented) views of each sample; more than one adds a leading dimension
            seed: of the shuffle and the augmentation, together with the epoch
            drop_last: leave a smaller last batch out
            subset: indices into the split; all samples if None
            workers: processes that decode image files; data held in memory needs none
            part: (k, n) gives only the k-th of n parts of every batch, for n processes that share it

        Raises:
            DataError: an unknown split, a batch size or number of views below 1, an index out of range.
        """
        opened = self.split(split)
        if batch_size < 1 or views < 1:
            raise DataError(f"batch size {batch_size} and {views} views: both must be at least 1")
        indices = torch.arange(len(opened)) if subset is None else torch.as_tensor(subset, dtype=torch.int64).cpu()
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(opened):
            raise DataError(
                f"subset index {int(indices.max() if indices.min() >= 0 else indices.min())} is out of range: "
                f"{self.name} has {len(opened)} samples in '{split}'"
            )
        loader = Loader(opened, indices, batch_size, Views(views, augment, seed, workers, part), shuffle, drop_last)
        return loader.mixed() if split == "train" and subset is None and not shuffle else loader

    def search_subset(
        self, per_class_train: int = 256, per_class_val: int = 32, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Two disjoint sets of indices into 'train' (EKG, step 0): one to fine-tune on, one to evaluate candidates on.

        Both are shuffled, so that every batch mixes the classes. Classes with fewer than both numbers of samples are
        divided in the same proportion, taken together. Data without labels count as one class.
        """
        if per_class_train < 0 or per_class_val < 1:
            raise DataError(f"{per_class_train} and {per_class_val} samples per class: use at least 0 and 1")
        draw = generator(seed, 2)
        train, val, short = [], [], []
        for members in by_class(self.labels("train"), self.size("train"), draw):
            if len(members) < per_class_train + per_class_val:
                short.append(members)
            else:
                val.append(members[:per_class_val])
                train.append(members[per_class_val : per_class_val + per_class_train])
        if short:
            kept, held = spread(torch.cat(short), per_class_val / (per_class_train + per_class_val), draw)
            train.append(kept)
            val.append(held)
        if not sum(map(len, val)):
            raise DataError(f"{self.name} has too few samples to evaluate candidates on: {self.size('train')}")
        return shuffled(torch.cat(train), draw), shuffled(torch.cat(val), draw)


def shuffled(items: Tensor, draw: torch.Generator) -> Tensor:
    return items[torch.randperm(len(items), generator=draw)]


def by_class(labels: Tensor | None, count: int, draw: torch.Generator) -> list[Tensor]:
    """The indices 0 … count-1 of each class, in random order; one class where there are no labels."""
    order = shuffled(torch.arange(count), draw)
    if labels is None:
        return [order]
    order = order[labels[order].argsort(stable=True)]
    return list(order.split(labels.unique(return_counts=True)[1].tolist()))


def spread(items: Tensor, share: float, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Divides items into (rest, chosen): about `share` of them, at equal distances from a random start.

    Of items sorted by class it so takes the same share of each, also where a class has less than one item to give.
    """
    start = torch.rand(1, generator=draw, dtype=torch.float64)
    ticks = (torch.arange(len(items) + 1, dtype=torch.float64) * share + start).floor()
    chosen = ticks.diff() > 0
    return items[~chosen], items[chosen]


def holdout(labels: Tensor | None, count: int, share: float) -> tuple[Tensor, Tensor]:
    """Divides the indices 0 … count-1 into (train, test), `share` of each class for the test; sorted.

    At random, but the same every time: no run may train on what another one is tested on.

    Raises:
        DataError: too few samples to give some to either.
    """
    draw = generator(3)
    train, test = spread(torch.cat(by_class(labels, count, draw)), share, draw)
    if not (len(train) and len(test)):
        raise DataError(f"{count} samples are too few to hold {share:.0%} of them out for the test")
    return train.sort().values, test.sort().values


def check_labels(labels: Tensor | None, classes: int | None, index: Tensor | None, where: str) -> None:
    """Raises DataError for a label below 0 or not below the number of classes; `index`: of which images (None: all)."""
    if labels is None or classes is None:
        return
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten()
    if len(wrong):
        image = wrong[0] if index is None else index[wrong[0]]
        raise DataError(
            f"{where}: label {int(labels[wrong[0]])} of image {int(image)} is out of range 0…{classes - 1} "
            f"({len(wrong)} such labels of {len(labels)})"
        )


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several; other parts or another order give an unrelated one."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(*parts: int) -> torch.Generator:
    """A CPU generator seeded from several numbers. Random numbers are drawn on the CPU and moved, so that every device
    sees the same."""
    return torch.Generator().manual_seed(mixed_seed(*parts))
