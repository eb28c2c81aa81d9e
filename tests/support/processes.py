"""Processes that find a few networks traced when they start, and have not differentiated anything (a fork of this one
may have, and could not do it again)."""

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from ekgfx.tracing.traced import TracedModel
from tests.search import nets

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "tests.support.processes",
        "tests.support.traced",
        "ekgfx.search",
        "ekgfx.training.finetune",
        "ekgfx.bank",
        "ekgfx.cli",
    ]
)
_READY: dict[str, TracedModel] = {}


def ready(name: str) -> TracedModel:
    """The network that `tests.search.nets` makes under that name, traced."""
    if name not in _READY:
        _READY[name] = getattr(nets, name)()
    return _READY[name]


def start(work: Callable[..., Any], *arguments: Any) -> Any:
    """A new process that does `work`, a function of a module."""
    process = _CONTEXT.Process(target=work, args=arguments)
    process.start()
    return process


def together(size: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work` returns in each of `size` processes that are connected by gloo; a traceback where it fails."""
    folder.mkdir(exist_ok=True)
    processes = [start(_member, rank, size, folder, work, arguments) for rank in range(size)]
    for process in processes:
        process.join()
    return [pickle.loads((folder / f"{size}-{rank}").read_bytes()) for rank in range(size)]


def killed_and_resumed(
    job: Callable[..., Any], run: Path, first: Iterable[object], moments: Iterable[Callable[[Path], bool]]
) -> Iterator[None]:
    """A job that is started with the arguments `first`, killed (kill -9) at each of the moments, gone on with by
    `--resume` every time, and then left to end. Yields after each kill."""
    arguments = tuple(first)
    for reached in moments:
        process = start(job, *map(str, arguments))
        while not reached(run):
            assert process.exitcode is None
            time.sleep(0.005)
        process.kill()
        process.join()
        yield
        arguments = ("--resume", run)
    process = start(job, *map(str, arguments))
    process.join()
    assert process.exitcode == 0


def _member(rank: int, size: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting-{size}", rank=rank, world_size=size
        )
        result = work(*arguments)
        distributed.barrier()
    except BaseException:  # noqa: BLE001  # whatever it is, the test shall see it
        result = traceback.format_exc()
    (folder / f"{size}-{rank}").write_bytes(pickle.dumps(result))
