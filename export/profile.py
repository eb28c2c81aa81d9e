"""How long does each segment of a network take where it runs, among the others?"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor

from ekgfx.errors import ExportError
from ekgfx.latency.segments import START, latest
from ekgfx.latency.target import Target

from .environment import available_cpus
from .io import as_inputs, with_batch
from .latency import clock_of, interleave
from .providers import provider
from .quiet import headline
from .runners import bound, onnx_runner
from .session import open_session

_WEIGHTED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Attention"}
# What onnxruntime appends to the name of a node or value that it replaces, or that it makes part of another one.
_DECORATION = re.compile(r"(_nchwc|_token_\d+|_kernel_time|/\w*Fusion/?)$")
_EVENT = "_kernel_time"


def profile(
    file: str | os.PathLike[str],
    example_inputs: Tensor | Sequence[Tensor],
    target: Target,
    *,
    runs: int = 30,
    warmup: int = 5,
) -> dict[str, float]:
    """Milliseconds of each segment of an ONNX file (written by `to_onnx`) when it runs as a whole on the target.

    Each node is timed in every run by onnxruntime's profiler, and its shortest time counts: other work on the machine
    can only add to it. Nodes belong to the segment (see `ekgfx.latency.segments`) of the weighted layer that they
    follow; what onnxruntime inserts, such as a change of layout, to that of the node before it.

    On a GPU kernels are launched one after the other without waiting for them (CUDA_LAUNCH_BLOCKING, which is why a
    child process does it there): the profiler's clock sees launches only, otherwise.

    Raises ExportError when the target or the file cannot be used.
    """
    provider(target.provider)
    path, inputs = Path(file), with_batch(as_inputs(example_inputs), target.batch)
    if target.provider == "cpu":
        return _profile(path, inputs, target, runs=runs, warmup=warmup)
    return in_child(path, inputs, target, runs=runs, warmup=warmup)


def whole_runs(
    files: Mapping[str, str | os.PathLike[str]],
    example_inputs: Tensor | Sequence[Tensor],
    target: Target,
    *,
    runs: int = 30,
    seconds: float = 5.0,
    warmup: int = 3,
) -> dict[str, float]:
    """Milliseconds of a run of each whole file on the target, taken in turns, without a profiler; as for segments, the
    shortest counts.

    On a single CPU thread it is that thread's own time, which other work on the machine does not interrupt.
    """
    inputs = with_batch(as_inputs(example_inputs), target.batch)
    threads = target.threads or available_cpus()
    place = provider(target.provider)
    runners = {
        name: onnx_runner(Path(file), place, target.precision, inputs, threads=threads, cpu_fallback=False)
        for name, file in files.items()
    }
    clock = clock_of(threads, on_cpu=place.device == "cpu")
    times = interleave(runners, runs=runs, seconds=seconds, warmup=warmup, clock=clock)
    return {name: min(found) * 1e3 for name, found in times.items()}


def in_child(path: Path, inputs: Sequence[Tensor], target: Target, *, runs: int, warmup: int) -> dict[str, float]:
    """The profile, taken in a process of its own where every kernel is waited for."""
    with tempfile.TemporaryDirectory() as folder:
        arrays = Path(folder) / "inputs.npz"
        np.savez(arrays, *(value.detach().cpu().numpy() for value in inputs))
        task = {"path": str(path), "inputs": str(arrays), "target": asdict(target), "runs": runs, "warmup": warmup}
        command = [sys.executable, "-m", __name__, json.dumps(task)]
        environment = {**os.environ, "CUDA_LAUNCH_BLOCKING": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(f"cannot profile {path} on {target}: {(done.stderr.strip().splitlines() or ['killed'])[-1]}")
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def _profile(path: Path, inputs: Sequence[Tensor], target: Target, *, runs: int, warmup: int) -> dict[str, float]:
    place, threads = provider(target.provider), target.threads or available_cpus()
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(
            path, place, target.precision, batch=target.batch, threads=threads, profile=Path(folder) / "profile"
        )
        run = bound(session, path, place, target.precision, inputs)
        for _ in range(warmup + runs):
            run()
        written = session.end_profiling()
        try:
            events = json.loads(Path(written).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ExportError(f"onnxruntime wrote no profile of {path}: {headline(error)}") from error
    return by_segment(events, node_segments(path), skip=warmup + 1)


def by_segment(events: Sequence[Mapping[str, object]], segments: Mapping[str, str], *, skip: int) -> dict[str, float]:
    """Milliseconds per segment from a profiler's events. segments: of nodes and values by name, see `node_segments`;
    skip: first runs that do not count."""
    times: dict[str, list[float]] = {}
    owner: dict[str, str] = {}
    segment = START
    for event in events:
        name = str(event.get("name"))
        if event.get("cat") != "Node" or not name.endswith(_EVENT):
            continue
        if name not in owner:
            plain = name
            while plain not in segments and _DECORATION.search(plain):
                plain = _DECORATION.sub("", plain)
            owner[name] = segments.get(plain, segment)
        segment = owner[name]
        times.setdefault(name, []).append(float(str(event["dur"])) / 1e3)
    total: dict[str, float] = {}
    for name, found in times.items():
        total[owner[name]] = total.get(owner[name], 0.0) + min(found[skip:] or found)
    return total


def node_segments(path: Path) -> dict[str, str]:
    """The segment of every node and value of a file, by name."""
    graph = onnx.load(path, load_external_data=False).graph
    segments: dict[str, str] = {}
    begun = [START]
    for node in graph.node:
        segment = latest((segments[name] for name in node.input if name in segments), begun)
        if node.op_type in _WEIGHTED:
            segment = node.name.rpartition("/")[0]
        if segment not in begun:
            begun.append(segment)
        segments[node.name] = segment
        segments.update({name: segment for name in node.output if name})
    return segments


def main(task: Mapping[str, object]) -> None:
    """Takes the profile that `in_child` asks for, and prints it."""
    with np.load(str(task["inputs"])) as arrays:
        inputs = [torch.from_numpy(arrays[name]) for name in arrays.files]
    target = Target(**task["target"])  # type: ignore[arg-type]
    counts = {key: int(str(task[key])) for key in ("runs", "warmup")}
    print(json.dumps(_profile(Path(str(task["path"])), inputs, target, **counts)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
