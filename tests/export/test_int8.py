"""INT8 files: what becomes INT8, that it computes nearly the same, and how a variant is chosen."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from ekgfx.export import (
    Samples,
    choosing,
    export_report,
    int8,
    measure_latency,
    precisions_table,
    processor,
    to_fp16,
    to_int8,
    to_onnx,
)
from ekgfx.export.choosing import onnx_call
from ekgfx.export.int8 import Quantizer, Recipe
from ekgfx.export.latency import LatencyTable, Speedup, Timing
from ekgfx.export.noise import Ratio
from ekgfx.export.precisions import faster_fp16
from torch import nn

from ekgfx.errors import ExportError
from ekgfx.repair.judge import Judgement
from tests.export.nets import Classifier, Windows

NAMES = ["dense", "dense fp16", "dense int8", "pruned", "pruned fp16", "pruned int8"]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return Classifier(16).eval()


@pytest.fixture(scope="module")
def file(network, images, tmp_path_factory) -> Path:
    return to_onnx(network, images, tmp_path_factory.mktemp("int8") / "net.onnx")


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_the_file_is_int8_checked_and_nearly_the_network(network, images, file, tmp_path):
    made = to_int8(file, tmp_path / "small.onnx", images)
    written = onnx.load(tmp_path / "small.onnx")
    onnx.checker.check_model(written, full_check=True)
    weights = [t for t in written.graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 4]
    assert [list(t.dims) for t in weights] == [[16, 3, 3, 3]]
    scales = [t for t in written.graph.initializer if t.name.endswith("weight_scale")]
    assert [16] in [list(t.dims) for t in scales]  # one per output channel
    assert {p.key: p.value for p in written.metadata_props}["ekgfx.precision"] == "int8"
    assert made.images == made.held_out == 12
    # Nothing but products: the scopes are one, and are tried once.
    assert [trial.method for trial in made.tried] == ["min-max", "entropy", "percentile"]
    with torch.no_grad():
        expected = network(images)
    found = onnx_call(tmp_path / "small.onnx", 1)(images)[0]
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_calibration_and_judgement_share_no_image(file, images, tmp_path, monkeypatch):
    seen = []
    record = int8.Quantizer.__init__

    def initialised(self, path, given, *rest) -> None:
        seen.extend(given)
        record(self, path, given, *rest)

    monkeypatch.setattr(choosing.Quantizer, "__init__", initialised)
    judged = []
    monkeypatch.setattr(choosing, "Judge", lambda dense, calls: judged.extend(calls) or choosing_judge(dense, calls))
    to_int8(file, tmp_path / "small.onnx", images, methods=["min-max"], scopes=["products"])
    pairs = itertools.product(seen, judged)
    assert len(seen) == len(judged) == 12 and not any(torch.equal(a[0], b.args[0]) for a, b in pairs)


choosing_judge = choosing.Judge


def test_labels_are_not_looked_at_and_bad_images_are_left_out_by_name(file, images, tmp_path):
    broken = images.clone()
    broken[3] = torch.nan
    batches = [(broken[:12], None), (broken[12:], "no label at all")]
    made = to_int8(file, tmp_path / "small.onnx", batches, methods=["min-max"], scopes=["products"])
    assert "1 image left out: not finite" in made.notes
    assert made.images + made.held_out == 23


def test_one_image_cannot_be_both_calibrated_on_and_judged_by(file, images, tmp_path):
    with pytest.raises(ExportError, match="INT8 needs images to calibrate on and others to judge by, and there are 1"):
        to_int8(file, tmp_path / "small.onnx", images[:1])
    assert not (tmp_path / "small.onnx").exists()


@pytest.fixture(scope="module")
def attention(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    torch.manual_seed(0)
    inputs = torch.randn(4, 16, 8)
    return to_onnx(Windows().eval(), inputs, tmp_path_factory.mktemp("attention") / "net.onnx"), inputs


def test_scopes_say_what_stays_in_floating_point(attention, tmp_path):
    file, inputs = attention
    quantizer = Quantizer(file, [(one[None],) for one in inputs], tmp_path, 1)

    def quantized(scope: str) -> list[str]:
        """Operators of which all that is read and written is rounded to 8 bits."""
        graph = onnx.load(quantizer(Recipe(scope=scope), tmp_path / "small.onnx")).graph
        rounded = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
        rounding = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
        return [
            node.op_type
            for node in graph.node
            if node.op_type in ("Softmax", "Mul", "MatMul", "Gemm")
            and set(node.input[:2]) & rounded
            and set(node.output) <= rounding
        ]

    everything, sums, products = map(quantized, ("all operators", "products and sums", "products"))
    assert "Softmax" in everything
    # Of the attention, the products of activations with each other stay as they are.
    assert "Softmax" not in sums + products
    assert everything.count("MatMul") - 2 == sums.count("MatMul") == products.count("MatMul") > 0


class OneBadLayer(nn.Module):
    """Three layers, of which the second has one input feature a thousand times the others', which carry the answer: on
    eight bits for all of them nothing is left of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.first.weight[0] *= 3000
            self.second.weight[:, 0] = 0

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.tanh(self.first(x) / 100) * 100)))


class Stacked(nn.Module):
    """Multiplies by several matrices at once, as one of each position or head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.stack = nn.Linear(16, 24), nn.Parameter(torch.randn(3, 24, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a(x).relu()[:, None] @ self.stack).mean((1, 2))


@pytest.mark.parametrize("scope", int8.SCOPES)
def test_products_with_several_matrices_stay_in_floating_point(scope: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = to_onnx(Stacked().eval(), torch.randn(2, 6, 16), tmp_path / "net.onnx")
    made = to_int8(file, tmp_path / "int8.onnx", torch.randn(32, 6, 16), methods=["min-max"], scopes=[scope])
    assert made.agreement is not None and made.agreement >= 0.75
    quantized = onnx.load(tmp_path / "int8.onnx").graph
    made_by = {name: node.op_type for node in quantized.node for name in node.output}
    (product,) = (node for node in quantized.node if node.op_type == "MatMul" and "stack" in "".join(node.input))
    assert made_by.get(product.input[1]) != "DequantizeLinear"
    assert product.name in made.kept and product.name in str(made), "what stays is named"


def test_a_file_that_does_not_run_is_told_in_one_line(file, images, tmp_path, monkeypatch):
    def fails(path, *more):
        if path != file:
            raise RuntimeError("a kernel fails\nsomewhere")
        return onnx_call(path, *more)

    monkeypatch.setattr(choosing, "onnx_call", fails)
    with pytest.raises(ExportError, match=r"does not run \(.*\): .*a kernel fails.*; export without --int8$"):
        to_int8(file, tmp_path / "int8.onnx", images)


def test_the_layer_that_adds_the_noise_stays_in_floating_point(tmp_path):
    torch.manual_seed(0)
    model, inputs = OneBadLayer().eval(), torch.randn(64, 16)
    file = to_onnx(model, inputs, tmp_path / "net.onnx")
    made = to_int8(file, tmp_path / "small.onnx", inputs, methods=["min-max"], scopes=["products"])
    alone = made.tried[0]
    assert alone.kept == () and alone.loss > 0.1
    assert made.kept and 1 - made.agreement < alone.loss
    assert "floating point: " in str(made) and all(name in str(made) for name in made.kept)
    facts = {p.key: p.value for p in onnx.load(tmp_path / "small.onnx").metadata_props}
    assert set(made.kept) <= set(facts["ekgfx.fp32_nodes"].split(", "))


def test_the_choice_is_by_answers_then_by_error(file, images, tmp_path):
    made = to_int8(file, tmp_path / "small.onnx", images, scopes=["products"])
    assert [trial.method for trial in made.tried[:3]] == ["min-max", "entropy", "percentile"]
    best = min(made.tried, key=lambda trial: (trial.loss, trial.error))
    assert (made.method, made.error) == (best.method, best.error)


class Told(choosing._Search):
    """Files that are judged as they are told: by scope, or by method where that is known."""

    def __init__(self, answers: dict[str, tuple[float | None, float | None]], ms: dict[str, float] | None = None):
        super().__init__(SimpleNamespace(covers=lambda scope: scope), None, None)
        self.answers, self.ms = answers, ms or {}

    def made(self, recipe):
        agreement, error = self.answers.get(recipe.method, self.answers.get(recipe.scope))
        made = choosing._Made(recipe, Path(), Judgement(error, agreement))
        self.trials.append(choosing.Trial(recipe.method, recipe.scope, (), made.loss, error))
        return made

    def clocked(self, made):
        return [self.ms[one.recipe.scope] for one in made]


@pytest.mark.parametrize(
    ("answers", "best"),
    [
        ({"all": (0.90, 0.1), "entropy": (0.95, 0.5)}, "entropy"),  # more of the answers, though further off
        ({"all": (0.95, 0.1), "entropy": (0.95, 0.05)}, "entropy"),  # as many, and nearer
        ({"all": (0.95, 0.1), "entropy": (0.90, 0.05)}, "min-max"),
        ({"all": (None, 0.3), "entropy": (None, 0.2)}, "entropy"),  # no classes: the error alone
        ({"all": (0.5, 0.3), "entropy": (1.0, None)}, "min-max"),  # no numbers
    ],
)
def test_ranges_are_chosen_by_answers_then_by_error(answers, best):
    search = Told(answers)
    assert search.method(search.made(Recipe(scope="all")), ["entropy"]).recipe.method == best


def test_a_scope_that_loses_answers_is_not_taken_for_its_speed():
    answers = {"all": (0.95, 0.1), "products": (0.97, 0.1), "sums": (0.965, 0.2)}
    search = Told(answers, {"all": 1.0, "products": 3.0, "sums": 2.0})
    assert search.scope(list(answers)).recipe.scope == "sums"  # within 1% of the best, and faster than it
    assert [trial.ms for trial in search.trials] == [None, 3.0, 2.0]  # the other is not even timed


def test_of_scopes_that_are_as_good_the_fastest_is_taken(attention, tmp_path, monkeypatch):
    file, images = attention
    monkeypatch.setattr(choosing._Search, "clocked", lambda self, made: [3.0, 1.0, 2.0])
    monkeypatch.setattr(choosing, "ENOUGH", 1.0)
    made = to_int8(file, tmp_path / "small.onnx", images, methods=["min-max"])
    assert made.scope == "products and sums"
    assert [trial.ms for trial in made.tried[:3]] == [3.0, 1.0, 2.0]


def test_processors_without_units_are_named_and_get_seven_bits(file, images, tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    for flags, unit in (
        ("avx2 avx512f", ""),
        ("avx512f avx512_vnni avx_vnni", "AVX-512 VNNI"),
        ("asimddp i8mm", "Arm i8mm"),
    ):
        info.write_text(f"processor : 0\nflags : fpu {flags}\n")
        assert processor.integer_unit(info) == unit
    for module in (processor, int8):
        monkeypatch.setattr(module, "integer_unit", lambda: "")
    made = to_int8(file, tmp_path / "small.onnx", images, methods=["min-max"], scopes=["products"])
    assert any("has no VNNI, AMX or dot-product instructions" in note for note in made.notes)
    weights = [
        onnx.numpy_helper.to_array(t)
        for t in onnx.load(tmp_path / "small.onnx").graph.initializer
        if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1
    ]
    assert max(np.abs(w.astype(int)).max() for w in weights) <= 64


def test_networks_of_several_precisions_are_timed_in_turn(file, images, tmp_path):
    to_int8(file, tmp_path / "small.onnx", images, methods=["min-max"], scopes=["products"])
    files = {"dense": file, "dense int8": tmp_path / "small.onnx"}
    table = measure_latency(
        files, images, [2], ["cpu"], {"dense": "fp32", "dense int8": "int8"}, runs=10, seconds=1, threads=1
    )
    assert [(t.network, t.precision) for t in table.timings] == [("dense", "fp32"), ("dense int8", "int8")]
    assert [(s.network, s.precision, s.against) for s in table.speedups] == [("dense int8", "int8", "dense")]
    with pytest.raises(ExportError, match="is an int8 file and cannot be timed in fp32; write one with to_onnx"):
        measure_latency({"dense": tmp_path / "small.onnx"}, images, [2], ["cpu"], runs=10, seconds=1)
    with pytest.raises(ExportError, match="is an fp32 file and cannot be timed in int8; write one with to_int8"):
        measure_latency({"dense": file}, images, [2], ["cpu"], "int8", runs=10, seconds=1)
    with pytest.raises(ExportError, match="is an int8 file; half precision is made from an fp32 one"):
        to_fp16(tmp_path / "small.onnx", tmp_path / "half.onnx")


def test_fp16_is_shown_where_it_is_faster():
    def timed(network: str, precision: str, batch: int, ms: float) -> Timing:
        return Timing("cpu", precision, batch, network, ms, ms, 10)

    timings = [
        timed("dense", "fp32", 1, 4.0),
        timed("dense fp16", "fp16", 1, 3.0),
        timed("dense int8", "int8", 1, 5.0),
        timed("dense", "fp32", 8, 4.0),
        timed("dense fp16", "fp16", 8, 4.0),
    ]
    ratio = Ratio(1.0, 0.9, 1.1)
    speedups = [Speedup("cpu", "fp16", batch, "dense fp16", "dense", ratio) for batch in (1, 8)]
    kept = faster_fp16(LatencyTable(tuple(timings), tuple(speedups), {}))
    assert list(kept.timings) == timings[:4]
    assert list(kept.speedups) == speedups[:1]


def test_one_table_of_both_networks_in_every_precision(network, images, tmp_path):
    torch.manual_seed(1)
    pruned = Classifier(4).eval()
    with torch.no_grad():
        labels = network(images).argmax(1)
    report = export_report(
        network,
        pruned,
        images[:4],
        tmp_path,
        batches=(1,),
        int8=Samples([images], [(images[:20], labels[:20]), (images[20:], labels[20:])]),
        runs=10,
        seconds=1,
        threads=1,
    )
    variants = {variant.name: variant for variant in report.precisions.variants}
    assert set(variants) <= set(NAMES) and {"dense", "dense int8", "pruned", "pruned int8"} <= set(variants)
    assert report.precisions.quality == "accuracy" and report.precisions.images == 24
    assert variants["dense"].score == 1.0
    with torch.no_grad():
        assert variants["pruned"].score == pytest.approx(float((pruned(images).argmax(1) == labels).float().mean()))
    for variant in variants.values():
        assert variant.bytes == (tmp_path / variant.file).stat().st_size
    # An fp16 file that is not faster is gone, and that is said.
    gone = set(NAMES) - set(variants)
    assert {file.name for file in tmp_path.iterdir()} == {variant.file for variant in variants.values()}
    assert all(any(note.startswith(f"{name}: no faster") for note in report.precisions.notes) for name in gone)
    table = precisions_table(report.precisions, report.latency)
    assert [column.header for column in table.columns][:4] == ["network", "precision", "accuracy", "file"]
    assert table.row_count == len(variants)


def test_without_labels_answers_are_compared_with_the_first_network(network, images, tmp_path):
    samples = Samples([images], [(images, None)])
    report = export_report(network, Classifier(4).eval(), images[:4], tmp_path, latency=False, int8=samples)
    scores = {variant.name: variant.score for variant in report.precisions.variants}
    assert report.precisions.quality == "agreement"
    assert set(scores) == {"pruned", "pruned int8"} and scores["pruned"] == 1.0 and scores["pruned int8"] > 0.8


def test_int8_goes_with_nothing_else(network, images, tmp_path):
    samples = Samples([images])
    with pytest.raises(ExportError, match="leave out fp16"):
        export_report(None, network, images, tmp_path, fp16=True, int8=samples)
    with pytest.raises(ExportError, match="timed on cpu alone, not on torch"):
        export_report(None, network, images, tmp_path, providers=("cpu", "torch"), int8=samples)
    assert list(tmp_path.iterdir()) == []
