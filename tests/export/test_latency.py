"""Timing: the procedure with a clock that is told what to say, then real networks on the CPU."""

import io
import json
import sys
import time

import onnx
import pytest
import torch
from ekgfx.export import LatencyTable, Ratio, Speedup, Timing, latency_table, measure_latency, to_onnx
from ekgfx.export.environment import busy
from ekgfx.export.latency import _timing, clock_of, interleave
from ekgfx.export.tables import speedup_text
from rich.console import Console
from torch import nn

from ekgfx.errors import ExportError


class Clock:
    """A clock that only runners advance."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def runner(self, name: str, *seconds: float):
        def run() -> None:
            self.now += seconds[sum(call == name for call in self.calls) % len(seconds)]
            self.calls.append(name)

        return run


def test_median_and_95th_percentile_are_milliseconds() -> None:
    seconds = [count / 1000 for count in range(101)]
    assert _timing("cpu", "fp32", 1, "dense", seconds) == Timing("cpu", "fp32", 1, "dense", 50.0, 95.0, 101)


def test_networks_take_turns_and_alternate_who_is_first():
    clock = Clock()
    runners = {"dense": clock.runner("dense", 2.0), "pruned": clock.runner("pruned", 1.0, 3.0)}
    times = interleave(runners, runs=12, seconds=1000, warmup=2, clock=clock)
    assert times == {"dense": [2.0] * 12, "pruned": [1.0, 3.0] * 6}
    assert clock.calls[:4] == ["dense", "dense", "pruned", "pruned"]
    assert clock.calls[4:] == ["dense", "pruned", "pruned", "dense"] * 6


def test_time_bound_ends_a_setting_but_not_before_ten_rounds():
    clock = Clock()
    runners = {"dense": clock.runner("dense", 2.0), "pruned": clock.runner("pruned", 1.0)}
    assert len(interleave(runners, runs=200, seconds=100, warmup=0, clock=clock)["dense"]) == 34
    assert len(interleave(runners, runs=200, seconds=1, warmup=0, clock=clock)["dense"]) == 10
    assert len(interleave(runners, runs=3, seconds=1000, warmup=0, clock=clock)["dense"]) == 10


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)).eval()


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Two networks whose work differs by a factor of 64, and their files."""
    folder = tmp_path_factory.mktemp("latency")
    models = {"dense": mlp(4096), "pruned": mlp(64)}
    inputs = torch.randn(2, 64)
    return models, {name: to_onnx(model, inputs, folder / f"{name}.onnx") for name, model in models.items()}, inputs


def test_a_large_difference_is_found_and_the_same_file_is_not_faster_than_itself(networks):
    _, files, inputs = networks
    settings = []
    table = measure_latency(
        {"dense": files["dense"], "pruned": files["pruned"], "again": files["dense"]},
        inputs,
        batches=(1, 32),
        runs=60,
        seconds=5,
        threads=1,
        on_setting=lambda *setting: settings.append(setting),
    )
    assert settings == [("cpu", 1), ("cpu", 32)]
    assert [(t.network, t.batch) for t in table.timings] == [
        (name, batch) for batch in (1, 32) for name in ("dense", "pruned", "again")
    ]
    assert all(0 < t.median_ms <= t.p95_ms and 10 <= t.runs <= 60 for t in table.timings)
    by_name = {(s.network, s.batch): s for s in table.speedups}
    assert by_name["pruned", 32].ratio.verdict == "faster"
    assert by_name["pruned", 32].against == "dense"
    assert 0.5 < by_name["again", 32].ratio.value < 2
    assert table.environment["threads"] == "1"
    assert {"cpu", "cpus", "torch", "onnxruntime", "python"} <= set(table.environment)
    assert LatencyTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_pytorch_columns(networks):
    models, files, inputs = networks
    threads = torch.get_num_threads()
    table = measure_latency(
        files, inputs, batches=(4,), providers=("cpu", "torch"), runs=10, seconds=5, threads=1, modules=models
    )
    assert [t.provider for t in table.timings] == ["cpu", "cpu", "torch", "torch"]
    assert torch.get_num_threads() == threads
    with pytest.raises(ExportError, match="'torch' times PyTorch modules, and none were given"):
        measure_latency(files, inputs, providers=("torch",))


def test_precision_must_be_that_of_the_file(networks, tmp_path):
    models, files, inputs = networks
    half = to_onnx(models["pruned"], inputs, tmp_path / "half.onnx", fp16=True)
    with pytest.raises(ExportError, match="fp16 file and cannot be timed in fp32"):
        measure_latency({"half": half}, inputs, batches=(1,))
    with pytest.raises(ExportError, match="fp32 file and cannot be timed in fp16"):
        measure_latency({"dense": files["dense"]}, inputs, batches=(1,), precision="fp16")
    with pytest.raises(ExportError, match="cpu has no precision 'tf32'"):
        measure_latency(files, inputs, precision="tf32")
    table = measure_latency({"half": half}, inputs, batches=(1,), precision="fp16", runs=10, seconds=1)
    assert [t.precision for t in table.timings] == ["fp16"]
    assert table.speedups == ()


def test_file_that_cannot_run_is_named(networks, tmp_path):
    _, files, inputs = networks
    fixed = onnx.load(files["pruned"])
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7
    onnx.save(fixed, tmp_path / "fixed.onnx")
    with pytest.raises(ExportError, match=r"cannot run .*fixed.onnx on cpu at batch 3"):
        measure_latency({"fixed": tmp_path / "fixed.onnx"}, inputs, batches=(3,))
    with pytest.raises(ExportError, match="takes 1 inputs .x?.*., but 2 were given"):
        measure_latency(files, (inputs, inputs), batches=(3,))


def test_table_shows_the_verdict():
    timings = [Timing("cpu", "fp32", 1, name, 12.0, 15.0, 200) for name in ("dense", "pruned")]
    environment = {"cpu": "Z80", "threads": "2", "onnxruntime": "1.0", "gpu": "Voodoo"}
    equal = Speedup("cpu", "fp32", 1, "pruned", "dense", Ratio(1.01, 0.98, 1.04))
    faster = Speedup("cpu", "fp32", 1, "pruned", "dense", Ratio(1.52, 1.48, 1.56))
    assert speedup_text(equal) == "no difference (0.98–1.04)"
    assert speedup_text(faster) == "1.52× (1.48–1.56)"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(latency_table(LatencyTable(tuple(timings), (equal,), environment, "cuda not available: none")))
    shown = console.export_text()
    assert "no difference (0.98–1.04)" in shown
    assert "Voodoo" in shown
    assert "cuda not available: none" in shown


def test_a_busy_machine_is_reported():
    assert busy({"load": "1.9", "cpus": "2"}) == ""
    assert "load 7.5 on 2 CPUs" in busy({"load": "7.5", "cpus": "2"})
    assert busy({"cpus": "2"}) == ""
    assert "these timings tell little" in busy({"load": "7.5", "cpus": "2"})
    assert "what others took of the processor is not counted" in busy({"load": "7.5", "cpus": "2"}, alone=True)


@pytest.mark.skipif(sys.platform == "win32", reason="a thread's time goes on in steps of 16 ms")
def test_what_interrupts_a_single_thread_is_not_counted(networks) -> None:
    """Sleeping stands for waiting while others have the processor."""
    own, wall = clock_of(1, on_cpu=True), clock_of(2, on_cpu=True)
    assert clock_of(1, on_cpu=False) is wall and own is not wall
    naps = {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.01)}
    for clock, counted in ((own, False), (wall, True)):
        times = interleave(naps, runs=10, seconds=0, warmup=0, clock=clock)
        assert (min(times["long"]) > 0.005) == counted
