"""One job on several processes, as torchrun starts them: who does what, and how all come to know it.

Every process runs the same program and takes the same decisions. Work is cut into pieces that no process computes in
another way than a single one would; what is gathered are the pieces' results, so that sums are taken in one order
whatever the number of processes. Only the first process writes to the run directory: the others work on a copy.
"""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ekgfx.errors import TeamError

PATIENCE = timedelta(days=7)
"""How long a process waits for another that is at work. One that died is noticed at once, by its broken connection."""


@dataclass(frozen=True)
class Team:
    """The processes of a job, seen from one of them. rank: its number; size: how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def owners(self, efforts: Sequence[float]) -> list[int]:
        """Which process does each piece of work: the largest first, each to the one that has least to do."""
        load = [0.0] * self.size
        owners = [0] * len(efforts)
        for piece in sorted(range(len(efforts)), key=lambda piece: -efforts[piece]):
            owners[piece] = min(range(self.size), key=load.__getitem__)
            load[owners[piece]] += efforts[piece]
        return owners

    def all_reduce(self, table: Tensor) -> Tensor:
        """A table of which every process has filled some rows and left the others 0, as a whole (exactly: one of the
        numbers that are added is not 0)."""
        if self.size > 1:
            with _watching():
                distributed.all_reduce(table)
        return table

    def part(self, count: int) -> slice:
        """This process's part of `count` things; parts follow each other by rank and differ by one thing at most."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def broadcast(self, value: Tensor, owner: int) -> Tensor:
        """The owner's tensor; the others pass one of its shape, which is filled."""
        if self.size > 1:
            with _watching():
                distributed.broadcast(value, owner)
        return value

    def broadcast_object(self, value: Any) -> Any:
        """What the first process says; any value that can be pickled."""
        if self.size == 1:
            return value
        box = [value]
        with _watching():
            distributed.broadcast_object_list(box)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """What each process says, by rank."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        with _watching():
            distributed.all_gather_object(said, value)
        return said

    def broadcast_model(self, model: nn.Module) -> None:
        """Gives all processes the first one's parameters and buffers."""
        with torch.no_grad():
            for _, value in sorted(model.state_dict().items()):
                value.copy_(self.broadcast(value.detach().clone(memory_format=torch.contiguous_format), 0))


ALONE = Team()


def team() -> Team:
    """The processes that this one works with: itself alone, unless torchrun started others."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return ALONE
    return Team(distributed.get_rank(), distributed.get_world_size())


@contextmanager
def joined() -> Iterator[Team]:
    """The processes that torchrun started, connected; one alone where it did not.

    Raises TeamError when another process dies, or torchrun ends this one because another died.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    signal.signal(signal.SIGTERM, _ended)  # torchrun's way of saying so
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _watching():
        distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield team()
    finally:
        with suppress(RuntimeError):  # the others may be gone
            distributed.destroy_process_group()


@contextmanager
def copied(path: Path) -> Iterator[Path]:
    """A copy of a run directory for this process to work on; it goes away afterwards. The memory bank is not copied."""
    with tempfile.TemporaryDirectory(prefix="ekgfx-") as folder:
        copy = Path(folder) / path.name
        shutil.copytree(path, copy, ignore=lambda _, names: [n for n in names if n in (".lock", "bank", "tensorboard")])
        yield copy


def local_device() -> str:
    """The GPU of this process, where several work on one machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


@contextmanager
def _watching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _lost() from error


DIED = "another process of this job died; see its own message, and go on with the same command and --resume RUN"


def _ended(*_: Any) -> None:
    raise _lost()


def _lost() -> TeamError:
    """From here on this process only records that it stops: torchrun's signal, which often comes a moment after the
    connection broke, must not break into that. (What hangs nevertheless it kills 30 seconds later.)"""
    if signal.getsignal(signal.SIGTERM) is _ended:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return TeamError(DIED)
