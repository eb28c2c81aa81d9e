"""How much of a search step's time does the device compute, and what? One step under PyTorch's profiler.

    python benchmarks/search.py kernels --network resnet50 --device cuda --output FOLDER
    python benchmarks/search.py kernels --network resnet56 --data cifar10:DIR --weights resnet56-cifar10.safetensors \\
        --output FOLDER

The step is the first of a search, evaluated as a search does by default, after one that warms up. On a GPU the share is
that of the time in which at least one kernel or copy runs; what is left is Python and PyTorch not giving it work in
time. On the CPU operators stand for kernels: what is left is Python's alone. The profiler slows the processor's side
down, so the share of a step that nobody looks at is higher; its seconds stand beside.

FOLDER gets NETWORK-DEVICE-kernels.json, with the kernels (operators) that take most, and the profile itself,
NETWORK-DEVICE-kernels.trace.json.gz, for https://ui.perfetto.dev.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from common import environment
from parts.search_cases import NETWORKS, Case, problem_of
from parts.search_ways import timed
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ekgfx.base.files import write_json

Interval = tuple[float, float]
"""From when to when, in µs."""
LARGEST = 15
"""Kernels that are listed."""


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    folder, device = Path(asked.output), torch.device(asked.device)
    folder.mkdir(parents=True, exist_ok=True)
    case = Case(asked.network, folder, device)
    case.make(asked.data, asked.weights, asked.images)
    (first,) = case.states(1)
    traced, batches = case.opened()
    problem, state = problem_of(traced, batches), case.state(first)
    way = "all" if device.type == "cpu" else "contiguous"

    def step() -> float:
        began = time.perf_counter()
        timed(problem, state, way)
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    step()
    alone = step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type != "cpu")
    with profile(activities=activities) as seen:
        seconds = step()
    target = folder / f"{case.name}-{device.type}-kernels"
    seen.export_chrome_trace(f"{target}.trace.json.gz")
    kind = DeviceType.CPU if device.type == "cpu" else DeviceType.CUDA
    events = [event for event in seen.events() if event.device_type == kind and not event.is_user_annotation]
    found = {
        "network": case.name,
        **environment(device),
        "step_seconds": round(alone, 3),
        "profiled_seconds": round(seconds, 3),
        "share": round(covered((e.time_range.start, e.time_range.end) for e in events) / 1e6 / seconds, 4),
        "largest": largest(events),
    }
    write_json(Path(f"{target}.json"), found)
    print(json.dumps(found, indent=1))


def covered(intervals: Iterable[Interval]) -> float:
    """µs within at least one of the intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def largest(events: Iterable[Any]) -> list[dict[str, Any]]:
    """The kernels that take most, with the seconds of all their calls; of operators, without those they call."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        own = event.self_cpu_time_total if event.device_type == DeviceType.CPU else event.time_range.elapsed_us()
        seconds[event.name] += own / 1e6
        calls[event.name] += 1
    names = sorted(seconds, key=seconds.__getitem__, reverse=True)[:LARGEST]
    return [{"name": name, "seconds": round(seconds[name], 3), "calls": calls[name]} for name in names]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=tuple(NETWORKS), default="resnet50")
    parser.add_argument("--data", default="cifar10:data/cifar10", help="of trained ones")
    parser.add_argument("--weights", default="data/weights/resnet56-cifar10.safetensors", help="of trained ones")
    parser.add_argument("--images", type=int, default=64, help="of the others, in batches of 16")
    parser.add_argument("--output", required=True, help="folder")
    parser.add_argument("--device", default="cpu")
