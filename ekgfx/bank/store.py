"""A finished memory bank: files of fixed-size rows per teacher, memory-mapped, and the manifest that describes them."""

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ekgfx.bank.rows import RowFormat, Rows
from ekgfx.base.files import checksum, read_json
from ekgfx.base.schema import read, show
from ekgfx.errors import DataError, RunError

FORMAT = 1
MANIFEST = "bank.json"


class Bank:
    """Logits of every teacher for every training sample. `bank.logits(index)` → B × K × C × …, float32.

    Attributes:
        row: how a sample's logits are stored.
        teachers: K descriptions, the best teacher first: step, loss, infidelity (mean KL_T of what is stored).
        samples: N.

    Example:
        >>> print(bank.logits(torch.tensor([0, 5])).shape)
    """

    def __init__(self, row: RowFormat, teachers: Sequence[Mapping[str, Any]], rows: Sequence[Rows]) -> None:
        self.row, self.teachers, self._rows = row, tuple(teachers), tuple(rows)
        self.samples = len(rows[0])
        # A bank on all of a data set is read by position. One on a part of it looks the samples up.
        whole = not self.samples or int(rows[0]["sample"][-1]) == self.samples - 1
        self._known = None if whole else np.array(rows[0]["sample"])

    def logits(self, index: Tensor) -> Tensor:
        """Logits of the K teachers for some samples: B × K × C × …, float32 on the CPU.

        Args:
            index: B numbers of samples in the training set.

        Raises:
            DataError: the teachers were not asked about one of them.
        """
        wanted = index.cpu().numpy()
        places = wanted if self._known is None else np.searchsorted(self._known, wanted)
        found = (places >= 0) & (places < self.samples)
        if self._known is not None and found.all():
            found = self._known[places] == wanted
        if not found.all():
            raise DataError(
                f"sample {int(wanted[~found][0])} is not among the {self.samples} samples of the memory bank; the bank "
                "belongs to another data set, split or subset: build it again"
            )
        return torch.stack([self.row.decode(rows[places]) for rows in self._rows], 1)

    def spread(self, most: int) -> Tensor:
        """Indices of at most `most` samples, evenly spread over the bank, for `logits`."""
        stride = -(-self.samples // most) or 1
        return torch.from_numpy(np.asarray(self._rows[0]["sample"][::stride]).astype(np.int64))

    def resident(self, device: torch.device | str) -> "ResidentBank":
        """The whole bank in the memory of `device`, for data sets that fit (CIFAR-10: 5 MB)."""
        size = int(self._rows[0]["sample"][-1]) + 1
        index = torch.from_numpy(self._rows[0]["sample"].astype(np.int64))
        whole = torch.zeros(size, len(self._rows), *self.row.shape, dtype=torch.float16)
        for rows in self._rows:
            _advise(rows, "MADV_SEQUENTIAL")
        whole[index] = torch.stack([self.row.decode(np.asarray(rows)).half() for rows in self._rows], 1)
        return ResidentBank(whole.to(device))

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Self:
        """A bank that was written before, memory-mapped.

        Args:
            path: its folder.
            verify: compare the files with their checksums, which reads all of them once.

        Raises:
            RunError: the bank is unfinished, damaged, or written by a newer version.
        """
        path = Path(path)
        manifest = read_manifest(path)
        for number, teacher in enumerate(manifest.teachers):
            file = rows_file(path, number)
            if teacher.file is None:
                raise RunError(
                    f"the memory bank {path} is unfinished (teacher {number}); build it again, it goes on there"
                )
            size = file.stat().st_size if file.is_file() else -1
            if size != teacher.file.get("bytes") or (verify and checksum(file) != teacher.file):
                raise RunError(f"{file} was changed, cut short or removed since it was written; build the bank again")
        row = RowFormat(manifest.shape, manifest.top_k, manifest.temperature)
        try:
            rows = [map_rows(rows_file(path, n), row.dtype) for n in range(len(manifest.teachers))]
        except ValueError as error:  # rows of another length, or none
            raise RunError(f"{path / MANIFEST} does not describe the rows beside it; build the bank again") from error
        if not rows or len({len(part) for part in rows}) > 1:
            raise RunError(f"{path / MANIFEST} does not describe the rows beside it; build the bank again")
        return cls(row, [asdict(teacher) for teacher in manifest.teachers], rows)


@dataclass(frozen=True)
class Teacher:
    """A teacher as bank.json describes it. file: None as long as its rows are not complete."""

    step: int
    loss: float
    infidelity: float | None = None
    file: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Manifest:
    """bank.json."""

    format: int
    shape: tuple[int, ...]
    top_k: int | None
    temperature: float
    teachers: tuple[Teacher, ...]
    fingerprint: str = ""


def read_manifest(path: Path) -> Manifest:
    """bank.json of the bank at `path`; RunError when it is missing, damaged, or written by a newer version."""
    value = read_json(path / MANIFEST)
    version = value.get("format") if isinstance(value, dict) else None
    if isinstance(version, int) and version > FORMAT:
        raise RunError(f"{path} has bank format {version}, this ekgfx reads up to {FORMAT}: upgrade ekgfx")
    manifest: Manifest = read(Manifest, value, str(path / MANIFEST), RunError)
    sizes = (*manifest.shape, *(() if manifest.top_k is None else (manifest.top_k,)))
    if not manifest.shape or min(sizes) < 1 or (manifest.top_k or 0) > manifest.shape[0]:
        raise RunError(f"{path / MANIFEST} is damaged: no logits are {show(sizes)} large; build the bank again")
    return manifest


@dataclass(frozen=True)
class ResidentBank:
    """A bank that lies in a device's memory. values: N × K × C × …, float16, by sample index."""

    values: Tensor

    def logits(self, index: Tensor) -> Tensor:
        """Logits of the K teachers for the samples `index` (B): B × K × C × …, float32, on the bank's device."""
        return self.values[index.to(self.values.device)].float()


def map_rows(path: Path, dtype: np.dtype[Any]) -> Rows:
    """The rows in a file, memory-mapped for reading in random order.

    Without that advice the system reads 128 KB around every row of 2 KB, which in a file larger than its cache takes
    twenty times as long (see benchmarks/bank.py scale).
    """
    with path.open("rb") as file:
        rows: Rows = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
    _advise(rows, "MADV_RANDOM")
    return rows


def _advise(rows: Rows, advice: str) -> None:
    """Tell the system in which order mapped rows will be read, where it listens."""
    region = rows.base.obj if isinstance(rows.base, memoryview) else None
    if isinstance(region, mmap.mmap) and hasattr(mmap, advice):
        region.madvise(getattr(mmap, advice))


def rows_file(folder: Path, number: int) -> Path:
    """Where the rows of teacher `number` lie."""
    return folder / f"teacher-{number}.rows"
