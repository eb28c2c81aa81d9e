"""INT8 files by onnxruntime's own static quantization: QDQ, one scale per output channel, ranges from images.

Activations are unsigned, weights signed, which is what x86 multiplies fastest; onnxruntime takes both to int8 kernels.
"""

import copy
import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    create_calibrator,
    qdq_loss_debug,
    quant_pre_process,
)
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from torch import Tensor

from ekgfx.base.units import several
from ekgfx.errors import ExportError

from .half import WIDE
from .io import PRECISION
from .processor import integer_unit
from .quiet import headline
from .session import feeds, open_session

METHODS: Mapping[str, tuple[CalibrationMethod, Mapping[str, Any]]] = {
    "min-max": (CalibrationMethod.MinMax, {}),
    "entropy": (CalibrationMethod.Entropy, {}),
    "percentile": (CalibrationMethod.Percentile, {"symmetric": False, "percentile": 99.99}),
}
"""How the range of a tensor is found: all that was seen; the part that keeps most information; all but 0.01%."""

HISTOGRAMS = 16
"""Images whose values go into histograms (entropy, percentile): sorting all values of an image into bins takes longer
than computing them, and a few images have millions."""

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# What hands 8-bit values on as they are, or picks among them.
_PASSING = frozenset(
    {
        "Relu",
        "Clip",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "Concat",
        "Split",
        "Slice",
        "Gather",
        "Pad",
        "Resize",
    }
    | {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"}
)
_ALL = frozenset(QDQRegistry) | frozenset(QLinearOpsRegistry)

SCOPES: Mapping[str, frozenset[str]] = {
    "all operators": _ALL,
    "products and sums": (PRODUCTS | _PASSING | {"Add"}) & _ALL,
    "products": (PRODUCTS | _PASSING) & _ALL,
}
"""Which operators become INT8. All that onnxruntime knows, with softmax, norms and gates, whose values may span more
than 8 bits hold; products with weights and residual sums, so that those and attention stay in floating point; and
without the sums."""


@dataclass(frozen=True)
class Recipe:
    """What of a network becomes INT8, and how. method: one of METHODS; scope: one of SCOPES; keep: names of the nodes
    that stay in floating point all the same."""

    method: str = "min-max"
    scope: str = "all operators"
    keep: frozenset[str] = frozenset()

    def __str__(self) -> str:
        kept = f", {several(len(self.keep), 'layer')} in floating point" if self.keep else ""
        return f"{self.scope}, {self.method}{kept}"


class Quantizer:
    """A file of `to_onnx` made ready for quantization, and images to calibrate on.

    file: fp32; images: arguments of the model, one sample each; folder: for the files that onnxruntime writes;
    threads: of its sessions, 0 for all CPUs. Raises ExportError when onnxruntime cannot prepare the file.
    """

    def __init__(self, file: Path, images: Sequence[tuple[Tensor, ...]], folder: Path, threads: int = 0) -> None:
        self.file, self.images, self.folder, self.threads = file, images, folder, threads
        self.prepared = folder / "prepared.onnx"
        self.ranges = cache(self._ranges)
        with understood(f"{file} cannot be prepared for INT8"):
            # torch's exporter has written all shapes that can be known.
            quant_pre_process(str(file), str(self.prepared), skip_symbolic_shape=True)
            self.model = onnx.load(self.prepared)

    def __call__(self, recipe: Recipe, path: Path) -> Path:
        """Writes the network quantized by the recipe; ExportError when onnxruntime cannot."""
        with understood(f"{self.file} cannot be quantized ({recipe})"):
            quantizer = QDQQuantizer(
                copy.deepcopy(self.model),
                True,  # one scale per output channel
                not integer_unit(),  # without such instructions pairs of products are added up in 16 bits
                QuantType.QInt8,
                QuantType.QUInt8,
                self.ranges(recipe.method),
                [],
                sorted(recipe.keep | self.spared(recipe.scope)),
                sorted(SCOPES[recipe.scope]),
                {},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
            model = quantizer.model.model
        _describe(model, recipe, self.kept(recipe))
        onnx.save(model, path)
        return path

    def covers(self, scope: str) -> frozenset[str]:
        """The nodes that become INT8."""
        nodes = {node.name for node in self.model.graph.node if node.op_type in SCOPES[scope]}
        return frozenset(nodes - self.spared(scope))

    def spared(self, scope: str) -> frozenset[str]:
        """Products that stay in floating point: of activations with each other, but where everything is INT8, and with
        several matrices of weights."""
        products = {node.name for node in self.model.graph.node if node.op_type in PRODUCTS}
        apart = set() if scope == "all operators" else products - set(layers(self.model))
        return frozenset(apart | set(stacked(self.model)))

    def kept(self, recipe: Recipe) -> list[str]:
        """The layers with weights that stay in floating point, in order."""
        return [name for name in layers(self.model) if name in recipe.keep | self.spared(recipe.scope)]

    def _ranges(self, method: str) -> TensorsData:
        kind, options = METHODS[method]
        augmented = self.folder / f"{method}.onnx"
        with understood(f"the ranges of {self.file} cannot be measured ({method})"):
            calibrator = create_calibrator(
                self.prepared, sorted(_ALL), str(augmented), kind, extra_options=dict(options)
            )
            # The calibrator's own session optimises nothing and takes all CPUs.
            calibrator.infer_session = open_session(augmented, threads=self.threads)
            few = self.images if kind is CalibrationMethod.MinMax else self.images[:HISTOGRAMS]
            for image in few:  # one by one: the calibrator keeps all values of what it is given
                calibrator.collect_data(_Reader([feeds(calibrator.infer_session, image)]))
            return calibrator.compute_data()

    def noisiest(self, quantized: Path, images: Sequence[tuple[Tensor, ...]]) -> list[str]:
        """Names of the layers with weights by the noise that each adds, most first: how many decibels more there are
        between signal and noise in what it reads than in what it writes, by onnxruntime's own comparison of values."""
        with understood(f"the noise of {quantized} cannot be measured"):
            inputs = [feeds(open_session(self.prepared, threads=self.threads), image) for image in images]
            options = ort.SessionOptions()
            options.intra_op_num_threads = self.threads
            found = []
            for file in (self.prepared, quantized):
                shown = str(self.folder / "shown.onnx")
                qdq_loss_debug.modify_model_output_intermediate_tensors(str(file), shown)
                found.append(qdq_loss_debug.collect_activations(shown, _Reader(inputs), options))
            matched = qdq_loss_debug.create_activation_matching(found[1], found[0])
            ratio = {
                name: error["xmodel_err"]
                for name, error in qdq_loss_debug.compute_activation_error(matched).items()
                if "xmodel_err" in error
            }
        return _by_noise(self.model, ratio)


def layers(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that multiply by weights, in order."""
    constant = {tensor.name for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in PRODUCTS and any(name in constant for name in node.input[:2])
    ]


def stacked(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes that multiply by several matrices of weights at once: onnxruntime's INT8 kernel takes a scale
    for each channel of one matrix only, and fails as it runs."""
    rank = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "MatMul" and any(rank.get(name, 0) > 2 for name in node.input)
    ]


def with_inputs(model: onnx.ModelProto, names: Collection[str]) -> frozenset[str]:
    """The nodes and what computes what they read, back to a layer with weights or to where several values meet: a node
    that stays in floating point reads rounded values all the same where their producer has them rounded."""
    writers = {name: node for node in model.graph.node for name in node.output}
    known, found = set(layers(model)), set(names)
    pending = [node for node in model.graph.node if node.name in found]
    while pending:
        for name in pending.pop().input:
            writer = writers.get(name)
            if writer is None or writer.name in found:
                continue
            found.add(writer.name)
            if writer.name not in known and sum(read in writers for read in writer.input) == 1:
                pending.append(writer)
    return frozenset(found)


def _by_noise(model: onnx.ModelProto, ratio: Mapping[str, float]) -> list[str]:
    """ratio: decibels of each compared value. A value that was not compared, such as one between a convolution and its
    activation, counts as the first one after it that was."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def after(name: str) -> float | None:
        while name not in ratio:
            following = readers.get(name, [])
            if len(following) != 1:
                return None
            name = following[0].output[0]
        return ratio[name]

    added: dict[str, float] = {}
    known = set(layers(model))
    for node in model.graph.node:
        out = after(node.output[0]) if node.name in known else None
        if out is not None:
            before = [ratio[name] for name in node.input if name in ratio]
            added[node.name] = min(before, default=0.0) - out
    return sorted(added, key=lambda name: -added[name])


def _describe(model: onnx.ModelProto, recipe: Recipe, kept: Collection[str]) -> None:
    facts = {prop.key: prop.value for prop in model.metadata_props}
    facts |= {PRECISION: "int8", "ekgfx.int8": str(recipe)}
    if wide := recipe.keep.union(kept):
        facts[WIDE] = ", ".join(sorted(wide))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, facts)


class _Reader(CalibrationDataReader):
    def __init__(self, images: Collection[dict[str, np.ndarray]]) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
        return next(self.images, None)


@contextmanager
def understood(what: str):
    """onnxruntime's commentary away, and what it raises as one line."""
    root = logging.getLogger()  # which its quantization logs to
    level = root.level
    root.setLevel(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()):
            yield
    except ExportError:
        raise
    except Exception as error:  # onnxruntime's and protobuf's exceptions have no common base
        raise ExportError(f"{what}: {headline(error)}; export without --int8") from error
    finally:
        root.setLevel(level)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for the files of a quantization."""
    return tempfile.TemporaryDirectory(prefix="ekgfx-int8-")
