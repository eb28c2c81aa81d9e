"""Latency of networks side by side: who is faster, by how much, and is it more than noise?"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from ekgfx.errors import ExportError

from .environment import available_cpus, busy, environment
from .io import as_inputs, device_of, with_batch
from .noise import FEWEST_ROUNDS, Ratio, compare
from .numerics import tensor_float32
from .providers import provider as find_provider
from .providers import providers as present_providers
from .runners import Runner, onnx_runner, torch_runner

# Columns that time the PyTorch modules themselves.
TORCH = {"torch": False, "torch-compile": True}


@dataclass(frozen=True)
class Timing:
    """One network in one setting: the median and the 95th percentile of `runs` timed runs, in milliseconds.

    precision is what was computed in, which a provider may choose itself (see `providers.Provider`).
    """

    provider: str
    precision: str
    batch: int
    network: str
    median_ms: float
    p95_ms: float
    runs: int


@dataclass(frozen=True)
class Speedup:
    """How much faster a network is than the first one, in one setting; `ratio` says whether that is noise."""

    provider: str
    precision: str
    batch: int
    network: str
    against: str
    ratio: Ratio


@dataclass(frozen=True)
class LatencyTable:
    """All timings, the comparisons drawn from them, the environment, and a note on what could not be measured."""

    timings: tuple[Timing, ...]
    speedups: tuple[Speedup, ...]
    environment: Mapping[str, str]
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        return cls(
            tuple(Timing(**timing) for timing in value["timings"]),
            tuple(Speedup(**{**speedup, "ratio": Ratio(**speedup["ratio"])}) for speedup in value["speedups"]),
            dict(value["environment"]),
            value["note"],
        )


def measure_latency(
    files: Mapping[str, str | os.PathLike[str]],
    example_inputs: Tensor | Sequence[Tensor],
    batches: Sequence[int] = (1, 64),
    providers: Sequence[str] = ("cpu",),
    precision: str | Mapping[str, str] = "fp32",
    runs: int = 200,
    seconds: float = 10.0,
    *,
    warmup: int = 10,
    threads: int | None = None,
    cpu_fallback: bool = False,
    modules: Mapping[str, nn.Module] | None = None,
    on_setting: Callable[[str, int], None] | None = None,
) -> LatencyTable:
    """Time several networks in turn, in every setting (provider × batch size).

    Args:
        files: network name → ONNX file; the first network, usually "dense", is the one the others are compared with.
        example_inputs: one tensor or a tuple, repeated or cut to each batch size.
        batches: batch 1 shows overhead, a large one throughput.
        providers: "cpu", "cuda", "cuda-graph", "tensorrt" (see `providers()` for those that are present); "torch" and
            "torch-compile" time `modules` on the device where they are.
        precision: "fp32", "tf32" (GPUs), "fp16" (files written with fp16=True) or "int8" (files of `to_int8`, on the
            CPU); or that of each network by its name, to time several beside each other.
        runs: timed runs of each network in each setting, at most; fewer when `seconds` are over, never under 10.
        seconds: bound on the timed part of one setting.
        warmup: untimed runs of each network before.
        threads: CPU threads; by default as many as there are CPUs for this process.
        cpu_fallback: let operators that a GPU provider lacks run on the CPU; otherwise such a file is refused.
        modules: network name → module, for the PyTorch columns.
        on_setting: called with (provider, batch) before each setting, for progress.

    The networks take turns, run by run, and who goes first alternates, so that a machine that slows down slows all of
    them. On a single CPU thread the milliseconds are that thread's own time, so that what other programs take of the
    processor does not count. Inputs and outputs stay in the provider's memory.

    Returns:
        Median and 95th percentile of each network in each setting, and ratios with their 95% range.

    Raises:
        ExportError: a provider is not here, lacks a precision, or cannot run a file.

    Example:
        >>> files = {"dense": "dense.onnx", "pruned": "net.onnx"}
        >>> table = ekgfx.export.measure_latency(files, images, batches=(1,), seconds=0.1)
        >>> print(table.speedups[0].ratio.verdict)
    """
    inputs = as_inputs(example_inputs)
    count = available_cpus() if threads is None else threads
    facts = environment(count)
    timings: list[Timing] = []
    speedups: list[Speedup] = []
    alone = True
    for name in providers:
        clock = clock_of(count, on_cpu=_on_cpu(name, modules or {}))
        alone = alone and clock is not time.perf_counter
        stated, prepare = _column(name, files, modules or {}, precision, threads=count, cpu_fallback=cpu_fallback)
        for batch in batches:
            if on_setting is not None:
                on_setting(name, batch)
            with _settings(count, tf32="tf32" in stated.values()):
                ready = prepare(with_batch(inputs, batch))
                times = interleave(ready, runs=runs, seconds=seconds, warmup=warmup, clock=clock)
            against, *others = times
            timings += [_timing(name, stated[network], batch, network, times[network]) for network in times]
            speedups += [
                Speedup(name, stated[network], batch, network, against, compare(times[against], times[network]))
                for network in others
            ]
    note = "; ".join(filter(None, (present_providers().note, busy(facts, alone))))
    return LatencyTable(tuple(timings), tuple(speedups), facts, note)


def clock_of(threads: int, *, on_cpu: bool) -> Callable[[], float]:
    """What to time a run by: on a single CPU thread its own time, which is the wall clock's on a machine that does
    nothing else, and does not count what interrupts it on another."""
    coarse = sys.platform == "win32"  # where a thread's time goes on in steps of 16 ms
    return time.thread_time if on_cpu and threads == 1 and not coarse else time.perf_counter


def interleave(
    runners: Mapping[str, Runner],
    *,
    runs: int,
    seconds: float,
    warmup: int,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Seconds of each runner by the clock, called in turn for `runs` rounds, or until `seconds` have passed (not before
    the tenth round); every other round goes backwards."""
    for run in runners.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in runners}
    order = list(runners)
    end = clock() + seconds
    for count in range(max(runs, FEWEST_ROUNDS)):
        if count >= FEWEST_ROUNDS and clock() >= end:
            break
        for name in order:
            start = clock()
            runners[name]()
            times[name].append(clock() - start)
        order.reverse()
    return times


def _on_cpu(name: str, modules: Mapping[str, nn.Module]) -> bool:
    if name in TORCH:
        return all(device_of(module).type == "cpu" for module in modules.values())
    return find_provider(name).device == "cpu"


def _column(
    name: str,
    files: Mapping[str, str | os.PathLike[str]],
    modules: Mapping[str, nn.Module],
    precision: str | Mapping[str, str],
    *,
    threads: int,
    cpu_fallback: bool,
) -> tuple[dict[str, str], Callable[[tuple[Tensor, ...]], dict[str, Runner]]]:
    """The precision that each network of a column computes in, and what makes its runners from the inputs."""
    networks = modules if name in TORCH else files
    asked = {network: precision if isinstance(precision, str) else precision[network] for network in networks}
    if name in TORCH:
        if not modules:
            raise ExportError(f"{name!r} times PyTorch modules, and none were given; pass modules={{name: module}}")
        return asked, lambda inputs: {
            network: torch_runner(module, asked[network], inputs, compiled=TORCH[name])
            for network, module in modules.items()
        }
    place = find_provider(name)
    for wanted in asked.values():
        if wanted not in place.precisions:
            raise ExportError(f"{name} has no precision {wanted!r}; it has {', '.join(place.precisions)}")
    return {network: place.precisions[wanted][0] for network, wanted in asked.items()}, lambda inputs: {
        network: onnx_runner(Path(file), place, asked[network], inputs, threads=threads, cpu_fallback=cpu_fallback)
        for network, file in files.items()
    }


def _timing(provider: str, precision: str, batch: int, network: str, times: Sequence[float]) -> Timing:
    median, p95 = np.quantile(times, (0.5, 0.95)) * 1e3
    return Timing(provider, precision, batch, network, float(median), float(p95), len(times))


@contextlib.contextmanager
def _settings(threads: int, *, tf32: bool) -> Iterator[None]:
    """PyTorch's own threads and arithmetic, for its columns; both restored."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tensor_float32(tf32):
            yield
    finally:
        torch.set_num_threads(before)
