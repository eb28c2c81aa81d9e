"""Which layer took what: sizes by hand, bounds by hand, and real profiles on the CPU."""

from dataclasses import replace

import pytest
import torch
from ekgfx.export import Breakdown, LayerTime, Timing, break_down, breakdown, to_onnx
from torch import Tensor, nn

import ekgfx
from ekgfx.graph.plan import Plan
from ekgfx.latency.segments import find_segments
from ekgfx.latency.target import Target
from ekgfx.search.latency import whole_tiles

HERE = Target("cpu", "fp32", 2, 1)


class Chain(nn.Module):
    """Three convolutions of 16 channels between 3 channels and 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def chain():
    torch.manual_seed(0)
    model, inputs = Chain().eval(), torch.randn(2, 3, 8, 8)
    return model, inputs, ekgfx.trace(model, inputs)


def cut(traced, first: int, second: int) -> Plan:
    """The plan that keeps so many channels of the two convolutions."""
    one, two = traced.groups
    plan = Plan(structure=traced.groups.digest)
    return plan.with_kept(one, range(first)).with_kept(two, range(16 - second, 16))


def test_widths_are_rounded_up_to_whole_tiles(chain):
    _, _, traced = chain
    rounded = whole_tiles(traced, cut(traced, 9, 4), 8)
    assert sorted(len(kept) for kept in rounded.kept.values()) == [8, 16]
    for name, kept in cut(traced, 9, 4).kept.items():
        assert set(kept) <= set(rounded.kept[name])
    assert whole_tiles(traced, cut(traced, 8, 16), 8) == cut(traced, 8, 16)


def test_real_networks_layer_by_layer(chain, tmp_path, monkeypatch):
    model, inputs, traced = chain
    plan = cut(traced, 6, 4)
    files = {
        "dense": to_onnx(model, inputs, tmp_path / "dense.onnx"),
        "pruned": to_onnx(ekgfx.prune(model, plan, traced), inputs, tmp_path / "pruned.onnx"),
    }
    found = break_down(traced, plan, files, inputs, HERE, runs=5)
    layers = {layer.name: layer for layer in found.layers if layer.name}
    assert list(layers) == ["first", "second", "head"]
    pixels = 8 * 8
    assert (layers["first"].macs_before, layers["first"].macs_after) == (pixels * 9 * 3 * 16, pixels * 9 * 3 * 6)
    assert (layers["second"].macs_before, layers["second"].macs_after) == (pixels * 9 * 16 * 16, pixels * 9 * 6 * 4)
    assert (layers["head"].macs_before, layers["head"].macs_after) == (16 * 5, 4 * 5)
    assert all(layer.ms_before > 0 and layer.ms_after > 0 for layer in layers.values())
    assert all(layer.ms_aligned is not None for layer in layers.values())
    whole = whole_tiles(traced, plan, found.tile)
    assert break_down(traced, whole, files, inputs, HERE, runs=2).layers[0].ms_aligned is None


def test_bytes_are_those_of_values_and_weights_in_the_precision(chain):
    """The second convolution reads and writes 16 channels of 8 × 8 pixels of two samples, activation included."""
    model, _, traced = chain
    segment, counts = find_segments(traced)["second"], breakdown._counts(traced, Plan(), 2)
    values = 2 * (16 * 64 + 2 * 16 * 64 + 16) + 9 * 16 * 16 + 16
    for precision, size in (("fp32", 4), ("fp16", 2)):
        work = breakdown._work(segment, counts, model, Target("cuda", precision, 2))
        assert work == breakdown._Work(2 * 64 * 9 * 16 * 16, size * values)


def test_bounds_are_those_of_the_best_rates():
    """The best rates are 1000 MACs and 100 bytes a millisecond, and nothing takes less than 0.5 ms."""
    work = breakdown._Work
    rates = breakdown._Rates.of(
        [(work(4000, 40), 4.0), (work(100, 300), 3.0), (work(1, 1), 0.5), (work(9_000_000, 1), 0.0)]
    )
    assert rates == breakdown._Rates(1000, 100, 0.5)
    assert rates.bound(work(2000, 100)) == "compute"
    assert rates.bound(work(2000, 300)) == "memory"
    assert rates.bound(work(400, 40)) == "launch"


def test_a_network_that_is_quicker_than_the_profiler_is_called_so():
    found = Breakdown("cpu:fp32:batch=1", 8, (LayerTime("a", 100, 50, 0.04, 0.05, None, "launch"),))
    assert found.summary.startswith(
        "layers on cpu:fp32:batch=1: 50% of the MACs saved, but the time grew to 1.25 of what it was; "
    )
    times = {("dense", 1): 0.03, ("pruned", 1): 0.01, ("dense", 64): 0.01}
    timings = [Timing("cpu", "fp32", batch, network, ms, ms, 200) for (network, batch), ms in times.items()]
    assert found.doubt(timings) == found.doubt([]) == ""  # it is the dense one at this batch size that counts
    quick = [replace(timing, median_ms=0.019) for timing in timings]
    assert found.doubt(quick).startswith("the layers add up to 0.04 ms, but the network takes 0.019 ms")


def test_summary():
    layers = (
        LayerTime("a", 100, 50, 4.0, 3.0, 2.0, "compute"),
        LayerTime("b", 100, 30, 4.0, 0.75, 0.75, "launch"),
        LayerTime("c", 0, 0, 2.0, 1.25, 1.0, "memory"),
    )
    assert Breakdown("cpu:fp32:batch=1", 8, layers).summary == (
        "layers on cpu:fp32:batch=1: 60% of the MACs and 50% of the time saved; 15% of what is left is launch-bound; "
        "25% of what is left is memory-bound; widths rounded up to 8 would take 0.75 of it"
    )
