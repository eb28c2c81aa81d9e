"""`--data SPEC` → Data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import Tensor

from ekgfx.base import named
from ekgfx.base.units import several
from ekgfx.data.arrays import Arrays, ArraySplit, in_grey, read_cifar_binary, read_digits, read_npz, read_photos
from ekgfx.data.augment import Augmentation
from ekgfx.data.base import Data, Split, check_labels, holdout
from ekgfx.data.images import Geometry, ImageSplit
from ekgfx.data.sources import ImageSource, open_folder, open_timm, open_timm_test
from ekgfx.errors import DataError

CROP = 0.875  # of image files, where nobody says
TEST_SHARE = 0.2  # of a set that comes without a split

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
DIGITS = (0.305,), (0.376,)


@dataclass(frozen=True)
class Request:
    """What `load` was asked for; None leaves it to the data set."""

    spec: str
    rest: str
    """What follows the kind in the spec."""
    size: tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: int | None
    channels: int | None
    crop_pct: float | None
    interpolation: str
    seed: int

    def folder(self) -> Path:
        return Path(self.rest).expanduser()

    def geometry(self, sample: tuple[int, int]) -> Geometry:
        """sample: height and width of one of the files. Files that have the size already are taken whole, unless
        somebody says how much of them to keep."""
        channels = self.channels or 3
        if channels not in (1, 3):
            raise DataError(f"image files have 3 channels, or 1 if they are grey, but the model takes {channels}")
        mean, std = self.normalization(IMAGENET, channels)
        size = self.size or (224, 224)
        crop = self.crop_pct or (1.0 if sample == size else CROP)
        return Geometry(size, mean, std, crop, self.interpolation)

    def normalization(
        self, default: tuple[tuple[float, ...], tuple[float, ...]], channels: int
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        mean, std = (self._per_channel(asked, channels) for asked in (self.mean or default[0], self.std or default[1]))
        if not len(mean) == len(std) == channels:
            raise DataError(
                f"the images of {self.spec} have {several(channels, 'channel')}, but the model is fed {len(mean)} "
                f"(mean {mean}, std {std}): use other data or a model for {channels}-channel images"
            )
        return mean, std

    def _per_channel(self, asked: tuple[float, ...], channels: int) -> tuple[float, ...]:
        """One number for all channels, or the mean of the colours' for a grey image of a model that takes such."""
        if len(asked) == 3 and self.channels == channels == 1:
            return (sum(asked) / 3,)
        return asked * channels if len(asked) == 1 else asked


def load(
    spec: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: int | None = None,
    channels: int | None = None,
    crop_pct: float | None = None,
    interpolation: str = "bicubic",
    seed: int = 0,
) -> Data:
    """Opens a data set.

    Args:
        spec: `folder:DIR`, `cifar10:DIR`, `cifar100:DIR`, `npz:DIR`, `timm:NAME[@ROOT]`, `digits` or `photos`.
        image_size: side, or (H, W), of the images given; the data set's own size (224 for files) if None.
        mean: of each channel of images on [0, 1], subtracted; the data set's own if None.
        std: of each channel of images on [0, 1], divided by; the data set's own if None.
        classes: number of the model's outputs; the data must have as many classes (numbered file names: at most).
        channels: of the images given, 1 or 3 for image files; with 1, coloured ones are made grey; the data set's own
            (3 for files) if None.
        crop_pct: share of the short side that timm's evaluation transform keeps of image files. None: 0.875, but all
            of files that have the size asked for already.
        interpolation: of timm's evaluation transform, for image files.
        seed: of photos' crops. A set that comes without a split always has the same fifth of each class as its test
            set, so that no run trains on what another one is tested on.

    Returns:
        The data set; its splits are read at first use.

    Raises:
        DataError: an unknown spec, a missing folder, unusable files, labels or class count.

    Example:
        >>> data = ekgfx.data.load("digits", classes=10)
        >>> loader = data.loader("train", 64, shuffle=True, augment=True)
    """
    named.check_data(spec)
    kind, _, rest = spec.partition(":")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size and (image_size[0], image_size[1])
    request = Request(
        spec=spec,
        rest=rest,
        size=size,
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        classes=classes,
        channels=channels,
        crop_pct=crop_pct,
        interpolation=interpolation,
        seed=seed,
    )
    data = OPENERS[kind](request)
    if classes is not None and data.classes is not None and classes != data.classes:
        raise DataError(
            f"{spec} has {several(data.classes, 'class', 'classes')}, but the model has "
            f"{several(classes, 'output')}: use a model with {data.classes} "
            "(--classes), or other data"
        )
    if channels is not None and data.input_shape[0] != channels:
        raise DataError(
            f"the images of {spec} have {several(data.input_shape[0], 'channel')}, but the model takes "
            f"{channels}: use other data, or a model for {data.input_shape[0]}-channel images (--in-chans)"
        )
    return data


def _array_data(
    request: Request,
    name: str,
    read: Callable[[str], Arrays],
    augmentation: Augmentation | None,
    normalization: tuple[tuple[float, ...], tuple[float, ...]] | None,
    classes: int | None,
) -> Data:
    """Data in memory. Left open (None): augmentation and normalization follow the images, classes the labels."""
    given = read
    read = cache(read if request.channels != 1 else lambda split: in_grey(given(split)))
    sample = read("test")  # the smaller split; the other one is read when it is needed
    channels, height, width = sample.images.shape[1:]
    if augmentation is None:
        augmentation = Augmentation(flip=channels == 3, pad=max(1, height // 8))
    mean, std = request.normalization(
        normalization or (IMAGENET if channels == 3 else ((0.5,) * channels,) * 2), channels
    )
    size = request.size or (height, width)
    if classes is None and sample.labels is not None:
        classes = 1 + max(_top_label(read(split).labels) for split in ("train", "test"))

    def opener(split: str) -> Callable[[], Split]:
        def opened() -> Split:
            arrays = read(split)
            check_labels(arrays.labels, classes, None, f"{request.spec} ({split})")
            return ArraySplit(arrays.images, arrays.labels, size, mean, std, augmentation)

        return opened

    openers = {split: opener(split) for split in ("train", "test")}
    resized = "as they are" if size == (height, width) else f"resized from {height}×{width}"
    return Data(name, request.spec, classes, (channels, *size), mean, std, openers, resized, str(augmentation))


def _top_label(labels: Tensor | None) -> int:
    return -1 if labels is None else int(labels.max())


def _held_out(everything: Arrays, split: str) -> Arrays:
    train, test = holdout(everything.labels, len(everything.images), TEST_SHARE)
    return everything.take(train if split == "train" else test)


def _cifar(request: Request, name: str, classes: int, binary: str, label_bytes: int, normalization: tuple) -> Data:
    folder = request.folder()

    def read(split: str) -> Arrays:
        npz = sorted(folder.glob(f"{split}*.npz"))
        if npz:
            return read_npz(npz)
        pattern = {"train": "data_batch_*.bin", "test": "test_batch.bin"}[split] if classes == 10 else f"{split}.bin"
        files = sorted(folder.glob(pattern)) or sorted((folder / binary).glob(pattern))
        if files:
            return read_cifar_binary(files, label_bytes)
        raise DataError(
            f"no {name} in {folder}: it needs {split}*.npz (images N×32×32×3 uint8, labels) or the binary version's "
            f"{pattern}; the Python version is pickled, which is not read"
        )

    return _array_data(request, name, read, Augmentation(), normalization, classes)


def _cifar10(request: Request) -> Data:
    return _cifar(request, "cifar10", 10, "cifar-10-batches-bin", 1, CIFAR10)


def _cifar100(request: Request) -> Data:
    return _cifar(request, "cifar100", 100, "cifar-100-binary", 2, CIFAR100)


def _npz(request: Request) -> Data:
    """`train*.npz` and `test*.npz`, or any .npz files as one set."""
    folder = request.folder()
    files = {split: sorted(folder.glob(f"{split}*.npz")) for split in ("train", "test")}
    everything = sorted(folder.glob("*.npz"))
    if not everything:
        raise DataError(f"no .npz files in {folder}: use train*.npz and test*.npz with arrays 'images' and 'labels'")
    if all(files.values()):
        return _array_data(request, folder.name, lambda split: read_npz(files[split]), None, None, None)
    whole = read_npz(everything)
    return _array_data(request, folder.name, lambda split: _held_out(whole, split), None, None, None)


def _digits(request: Request) -> Data:
    # A mirrored 2 is no 2: no flips
    whole = read_digits()
    return _array_data(
        request, "digits", lambda split: _held_out(whole, split), Augmentation(flip=False, pad=1), DIGITS, 10
    )


def _photos(request: Request) -> Data:
    size = request.size or (224, 224)
    return _array_data(
        request,
        "photos",
        lambda split: read_photos(split, size, request.seed),
        Augmentation(pad=size[0] // 8),
        IMAGENET,
        None,
    )


def _image_data(request: Request, name: str, sources: dict[str, ImageSource], classes: int | None) -> Data:
    first = sources["test"].read(0)[0] if len(sources["test"]) else None
    geometry = request.geometry((first.height, first.width) if first is not None else (0, 0))

    def opener(split: str) -> Callable[[], Split]:
        return lambda: ImageSplit(sources[split], geometry, classes, f"{request.spec} ({split})")

    openers = {split: opener(split) for split in ("train", "test")}
    resized = f"the middle {geometry.crop_pct:.1%} of files, {geometry.interpolation}"
    if first is not None and geometry.crop_pct == 1 and (first.height, first.width) == geometry.size:
        resized = "files as they are"
    shape = (len(geometry.mean), *geometry.size)
    return Data(name, request.spec, classes, shape, geometry.mean, geometry.std, openers, resized, geometry.augmented)


def _folder(request: Request) -> Data:
    folder = request.folder()
    sets, count = open_folder(folder, request.classes)
    if "all" in sets:
        whole = sets["all"]
        train, test = holdout(whole.labels(), len(whole), TEST_SHARE)
        sets = {"train": whole.take(train), "test": whole.take(test)}
    return _image_data(request, folder.resolve().name, dict(sets), count)


def _timm(request: Request) -> Data:
    name, _, root = request.rest.partition("@")
    if not name:
        raise DataError(f"'{request.spec}' names no data set: use timm:NAME[@ROOT], such as timm:torch/cifar10@DIR")
    sources = {
        "train": open_timm(name, root or None, "train"),
        "test": open_timm_test(name, root or None),
    }
    classes = request.classes
    if classes is None:
        labels = sources["train"].labels()
        classes = None if labels is None else int(labels.max()) + 1
    return _image_data(request, name, sources, classes)


OPENERS: dict[str, Callable[[Request], Data]] = {
    "folder": _folder,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "npz": _npz,
    "timm": _timm,
    "digits": _digits,
    "photos": _photos,
}
