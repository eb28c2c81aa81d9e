"""Times of segments: from events written by hand, and from real runs on the CPU."""

import pytest
import torch
from ekgfx.export import layers, to_onnx
from ekgfx.export.io import with_batch
from ekgfx.export.layers import measure_layers, to_known
from ekgfx.export.profile import by_segment, in_child, node_segments, profile, whole_runs
from torch import nn
from torch.nn import functional as F

import ekgfx
from ekgfx.errors import ExportError
from ekgfx.latency.segments import find_segments
from ekgfx.latency.target import Target
from ekgfx.search.latency import Price, Sample
from ekgfx.search.problem import width_rules
from tests.export.nets import Classifier, LearnedBias

HERE = Target("cpu", "fp32", 4, 1)


def event(name: str, microseconds: int, cat: str = "Node") -> dict[str, object]:
    return {"cat": cat, "name": f"{name}_kernel_time", "dur": microseconds}


def test_shortest_times_of_nodes_add_up_by_segment():
    segments = {
        "stem/Conv": "stem",
        "stem/Conv_out": "stem",
        "Relu_out": "stem",
        "head/Gemm": "head",
        "qkv/MatMul": "qkv",
        "a/MatMul_2": "a",
    }
    run = [
        event("Cast", 1000),  # before the first layer
        event("Relu_out_nchwc", 5000),  # a convolution, fused and named after the end of what it holds
        event("ReorderOutput_token_12", 300),  # inserted: belongs to the node before it
        event("head/Gemm", 200),
        event("qkv/MatMul/MatMulAddFusion", 70),  # fused, and named after the first of what it holds
        event("a/MatMul_2/MatMulScaleFusion/", 30),
    ]
    slow = [{**e, "dur": int(str(e["dur"])) * 10} for e in run]
    others = [event("stem/Conv", 9, cat="Session"), {"cat": "Node", "name": "stem/Conv_fence_before", "dur": 9}]
    lucky = [{**e, "dur": 1} for e in run]
    found = by_segment([*lucky, *others, *slow, *run, *slow], segments, skip=1)
    assert found == pytest.approx({"": 1.0, "stem": 5.3, "head": 0.2, "qkv": 0.07, "a": 0.03})


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(0)
    model, images = Classifier(32).eval(), torch.randn(2, 3, 32, 32)
    return model, images, to_onnx(model, images, tmp_path_factory.mktemp("profile") / "net.onnx")


def test_nodes_belong_to_the_layer_that_they_follow(classifier):
    segments = node_segments(classifier[2])
    assert {name: segments[name] for name in ("stem/Conv", "Relu", "ReduceMean", "head/Gemm")} == {
        "stem/Conv": "stem",
        "Relu": "stem",
        "ReduceMean": "stem",
        "head/Gemm": "head",
    }


class Residual(nn.Module):
    """Tokens to which the answer of two layers is added three times, as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.wide, self.back = nn.Conv2d(3, 64, 4, 4), nn.Linear(64, 256), nn.Linear(256, 64)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        for _ in range(3):
            x = x + self.back(F.gelu(self.wide(self.norm(x))))
        return self.head(x.mean(1))


def test_sums_and_fused_products_belong_to_the_layer_that_they_follow(tmp_path):
    """In the file, in the graph, and in what onnxruntime makes of it: a product and its bias become one, renamed."""
    model, images = Residual().eval(), torch.randn(2, 3, 32, 32)
    file = to_onnx(model, images, tmp_path / "net.onnx")
    norms = {segment for name, segment in node_segments(file).items() if name.startswith("norm/LayerNormalization")}
    assert norms == {"patches", "back"}
    traced = ekgfx.trace(model, images)
    one, tokens = {traced.batch: 1}, 64
    segments = find_segments(traced)
    # The patches are read from pixels; what comes back is read by the sum, with the tokens from before.
    assert segments["patches"].sizes(one)[1] == 3 * 32 * 32
    assert segments["back"].sizes(one)[1] == 3 * 256 * tokens + 64 * tokens
    found = profile(file, images, HERE)
    assert min(found["wide"], found["back"]) > found["head"]  # 12,000 times its MACs
    assert found.get("", 0.0) < 0.1 * sum(found.values())


def test_layers_in_int8_are_named_as_in_fp32(classifier, tmp_path):
    """onnxruntime makes one integer operator of a layer and the rounding around it."""
    model, images, _ = classifier
    here = Target("cpu", "int8", 4, 1)
    file = layers.write_for(here, model, (images,), tmp_path / "net.onnx")
    found = profile(file, images, here)
    assert set(found) == {"", "stem", "head"}  # pixels are rounded before the first layer
    assert found["stem"] > found["head"] > 0
    with pytest.raises(ExportError, match="is an int8 file and cannot be timed in fp32"):
        profile(file, images, HERE)


def test_a_latency_budget_is_priced_by_int8_layers():
    torch.manual_seed(0)
    traced = ekgfx.trace(Classifier(32).eval(), torch.randn(2, 3, 16, 16))
    here = Target("cpu", "int8", 1, 1)
    table = measure_layers(traced, here, width_rules(traced, frozenset(), 1, 0.0), count=2)
    assert table.target == "cpu:int8:batch=1:threads=1"
    assert all(sample.network > 0 and set(sample.segments) <= {"", "stem", "head"} for sample in table.samples)


def test_a_real_profile_accounts_for_the_run(classifier):
    _, images, file = classifier
    found = profile(file, images, HERE)
    assert set(found) == {"stem", "head"}
    assert found["stem"] > found["head"] > 0
    whole = whole_runs({"one": file, "again": file}, images, HERE)
    assert 0.5 < sum(found.values()) / whole["one"] < 2
    assert 0.5 < whole["again"] / whole["one"] < 2


def test_a_child_process_finds_the_same_segments(classifier):
    _, images, file = classifier
    assert set(in_child(file, with_batch([images], 4), HERE, runs=3, warmup=1)) == {"stem", "head"}
    with pytest.raises(ExportError, match="cannot profile .*none.onnx on cpu:fp32:batch=4"):
        in_child(file.with_name("none.onnx"), [images], HERE, runs=3, warmup=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_provider_is_refused(classifier):
    with pytest.raises(ExportError, match="'cuda' cannot be used"):
        profile(classifier[2], classifier[1], Target("cuda"))
    traced = ekgfx.trace(classifier[0], classifier[1])
    with pytest.raises(ExportError, match="'cuda' cannot be used"):
        measure_layers(traced, Target("cuda"), {})


def test_attention_is_a_segment_of_its_own(tmp_path):
    model, inputs = LearnedBias().eval(), torch.randn(2, 8, 8)
    traced = ekgfx.trace(model, inputs)
    found = to_known(profile(to_onnx(model, inputs, tmp_path / "net.onnx"), inputs, HERE), traced)
    assert set(found) <= set(find_segments(traced))
    assert {"qkv", "head"} <= set(found)
    assert found[""] > 0  # the attention itself: its module is the model


def test_unknown_inner_modules_count_for_the_module_around_them(classifier):
    traced = ekgfx.trace(classifier[0], classifier[1])
    assert to_known({"stem.act": 1.0, "stem": 2.0, "elsewhere": 4.0}, traced) == {"stem": 3.0, "": 4.0}


def test_real_table_prices_what_it_measured(classifier):
    """Real networks cut, exported and timed; then again from an interrupted measurement, which is not repeated."""
    model, images, _ = classifier
    traced = ekgfx.trace(model, images)
    rules = width_rules(traced, frozenset(), 8, 0.0)
    seen = []
    table = measure_layers(traced, HERE, rules, count=3, on_network=seen.append)
    assert [len(part.samples) for part in seen] == [1, 2, 3]
    assert table.samples[0].widths == {"stem": 32}
    assert table.samples[0].segments["stem"] > min(s.segments["stem"] for s in table.samples[1:])
    assert Price(traced, table).of_widths({"stem": 8}) < Price(traced, table).of_widths({"stem": 32})
    assert table.environment["threads"] == "1"
    longer = measure_layers(traced, HERE, rules, count=4, begun=seen[1])
    assert longer.samples[:2] == seen[1].samples
    assert len(longer.samples) == 4


def test_a_beginning_of_another_target_is_not_gone_on_with(classifier, monkeypatch):
    model, images, _ = classifier
    traced = ekgfx.trace(model, images)
    monkeypatch.setattr(
        layers, "measure", lambda traced, plan, _: Sample(traced.groups.widths(plan), {"stem": 1.0}, 1.0)
    )
    begun = measure_layers(traced, HERE, {}, count=2)
    assert measure_layers(traced, HERE, {}, count=2, begun=begun).samples == begun.samples
    other = measure_layers(traced, Target("cpu", "fp32", 8, 1), {}, count=1, begun=begun)
    assert (other.target, len(other.samples)) == ("cpu:fp32:batch=8:threads=1", 1)
