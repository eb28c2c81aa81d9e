"""What the benchmarks share: programs of several parts, going on where one was stopped, a process for each measurement,
turns, and what a figure needs beside it."""

import argparse
import ctypes
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from ekgfx.export.environment import processor

import ekgfx
from ekgfx.base.files import append_line, read_json, read_lines, write_json
from ekgfx.base.memory import keep_freed_memory

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"


def program(about: str | None, parts: Mapping[str, ModuleType]) -> None:
    """Runs the part that the command line names: its `options(parser)` say what it takes, its `main(asked)` does it.

    Memory is kept as the command line of ekgfx keeps it.
    """
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=about)
    commands = parser.add_subparsers(metavar="PART", required=True)
    for name, part in parts.items():
        text = part.__doc__ or ""
        raw = argparse.RawDescriptionHelpFormatter
        summary = " ".join(text.partition("\n\n")[0].split()).replace("%", "%%")
        own = commands.add_parser(name, help=summary, description=text, formatter_class=raw)
        own.set_defaults(main=part.main)
        part.options(own)
    asked = parser.parse_args()
    main = asked.main
    del asked.main  # a part may write down what is left as its settings
    main(asked)


def listed() -> list[str]:
    """The smallest model of every distinct architecture signature in every timm module, by parameters."""
    return (Path(__file__).parent / "models.txt").read_text(encoding="utf-8").split()


def environment(device: torch.device | None = None) -> Row:
    """What a figure needs beside it: hardware, versions, date."""
    if device is not None and device.type == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        hardware = f"{processor()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}"
    return {
        "hardware": hardware,
        "versions": {"ekgfx": ekgfx.__version__, "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
    }


# -- going on ------------------------------------------------------------------------------------------------------


class Lines:
    """A file of JSON lines that only grows: what a line of it holds is not measured again."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __iter__(self) -> Iterator[Row]:
        return iter(read_lines(self.path))

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        """Whether a line has all of these entries."""
        return any(all(line.get(name) == value for name, value in key.items()) for line in self)

    def add(self, row: Row) -> None:
        """Writes a line, and prints it."""
        append_line(self.path, row)
        print(row, flush=True)


class Sheet(dict[str, Any]):
    """A JSON file that is written part by part, each with the day of the last.

    settings: what all parts have in common; a file that was made with others is refused.
    """

    def __init__(self, output: str | Path, settings: Row | None = None, **empty: Any) -> None:
        self.path = Path(output)
        super().__init__(read_json(self.path) if self.path.exists() else empty)
        if settings is not None and self.setdefault("settings", settings) != settings:
            raise SystemExit(f"{self.path} was made with other settings; choose another --output")

    def keep(self, **parts: Any) -> None:
        """Adds parts, and writes the file, wholly or not at all."""
        self.update(parts, **environment())
        write_json(self.path, dict(self))


def chosen(asked: argparse.Namespace, *names: str) -> Row:
    """Some of what the command line asks for, by name."""
    return {name: getattr(asked, name) for name in names}


# -- processes and turns -------------------------------------------------------------------------------------------


class Ended(Exception):
    """A process that ended, or was ended, before it was done. The message says how."""


def apart(work: Callable[..., Any], *arguments: Any, timeout: float | None = None, start: str = "spawn") -> Any:
    """What `work(*arguments)` returns in a process of its own, where nothing counts that was done before.

    start: "fork" for one in which all is imported already. Raises Ended with the exception's type and message, or when
    nothing came within `timeout` seconds.
    """
    (found,) = streamed(_once, work, *arguments, timeout=timeout, start=start)
    return found


def _once(work: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    yield work(*arguments)


def streamed(
    work: Callable[..., Iterable[Any]], *arguments: Any, timeout: float | None = None, start: str = "spawn"
) -> Iterator[Any]:
    """What `work(*arguments)` yields in a process of its own, as it comes; see `apart`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    context: Any = multiprocessing.get_context(start)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, arguments))
    process.start()
    sender.close()
    end = time.monotonic() + (float("inf") if timeout is None else timeout)
    try:
        while True:
            if not receiver.poll(None if timeout is None else max(0.0, end - time.monotonic())):
                raise Ended(f"no result after {timeout:g} s")
            kind, value = receiver.recv()
            if kind == "done":
                return
            if kind == "failed":
                raise Ended(value)
            yield value
    except EOFError:
        process.join()
        raise Ended(f"the process ended with code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, work: Callable[..., Iterable[Any]], arguments: Sequence[Any]) -> None:
    try:
        for value in work(*arguments):
            sender.send(("value", value))
        sender.send(("done", None))
    except Exception as error:  # noqa: BLE001  every failure is a result
        sender.send(("failed", f"{type(error).__name__}: {error}"))


def in_turn(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """All names in each of the rounds, each beginning with another one: what disturbs a machine disturbs all alike."""
    for turn in range(rounds):
        shift = turn % len(names)
        yield from ((turn, name) for name in (*names[shift:], *names[:shift]))


def with_memory(work: Callable[[], Any], device: torch.device | None = None) -> tuple[Any, int]:
    """What `work` returns, and the MiB by which this process grew at most (GPU: peak memory in all)."""
    if device is not None and device.type != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return work(), torch.cuda.max_memory_allocated(device) >> 20
    ctypes.CDLL(None).malloc_trim(0)  # or it would grow into what was freed before
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    return work(), (resident("VmHWM") - before) >> 10


def resident(kind: str) -> int:
    """KiB of this process in memory: now (VmRSS), at most so far (VmHWM), its own alone (RssAnon)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1])
