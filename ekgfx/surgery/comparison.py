"""What a cut module does otherwise than was predicted: in which module, and how."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.axes import Axis
from ekgfx.errors import EkgfxError
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.cost import Cost, mac_products, value_of
from ekgfx.graph.opaque import OPERATOR
from ekgfx.graph.plan import Plan
from ekgfx.graph.untouched import State, deep_copy
from ekgfx.graph.ways import Way
from ekgfx.surgery.check import Mismatch, compare_outputs, differences
from ekgfx.surgery.diverging import diverging
from ekgfx.surgery.faults import Problem, blamed, failing, training_error
from ekgfx.surgery.integers import Attributes
from ekgfx.tracing.trace import retrace
from ekgfx.tracing.traced import TracedModel

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3}


@dataclass(frozen=True)
class Prediction:
    """What a cut module must be: the sliced graph on `weights`, the cut tensors themselves.

    twin: the uncut model without its weights, where the original has been cut itself. before: the integers that its
    modules had. state: what modules have otherwise now than when they were traced, as it was then. ways: of training,
    those in which the outputs of the original and of its graph were equal.
    """

    source: TracedModel
    plan: Plan
    kept: Mapping[Axis, Tensor]
    weights: Mapping[str, Tensor]
    before: Attributes
    twin: nn.Module | None = None
    state: State = field(default_factory=dict)
    ways: Collection[Way] = ()

    @property
    def counts(self) -> dict[Axis, int]:
        return {axis: len(index) for axis, index in self.kept.items()}


class Comparison:
    """A cut module beside its prediction."""

    def __init__(self, pruned: nn.Module, predicted: Prediction) -> None:
        self.pruned, self.predicted, self.source = pruned, predicted, predicted.source
        uncut = self.source.model is not pruned
        self.trains = self.source.trains and not (uncut and training_error(self.source.model, self.source))

    def problems(self) -> list[Problem]:
        """Run the cut module, trace it again and compare it with the prediction; empty if all agrees."""
        trained = [replace(self.source.way, training=True)] if self.trains else []
        examples = dict.fromkeys(trained, self.source.example) | {g.way: g.example for g in self.source.graphs}
        for number, (way, example) in enumerate(examples.items()):
            failed = failing(self.pruned, way, example)
            if failed is not None:
                return [replace(failed, way=number)]
        try:
            again = retrace(self.pruned, self.source, self.predicted.state)
        except EkgfxError as error:  # its Python may do otherwise there than when it runs
            module = getattr(error, "module", None)
            return [Problem(None if module is None else blamed(self.pruned, module), str(error))]
        found = differences(self.source, self.predicted.counts, again)
        if all(difference.another for difference in found):
            problems = self._in_numbers(again)
            if not problems or not found:
                return problems
        return [Problem(blamed(self.pruned, d.module), str(d)) for d in _first_of_each(found)]

    def _in_numbers(self, again: TracedModel) -> list[Problem]:
        """What is wrong with the cut module's cost and outputs. again: it, traced."""
        cost, predicted = known_cost(again), known_cost(self.source, self.predicted.plan)
        if cost != predicted:
            return [Problem(None, f"it costs {cost}, predicted were {predicted}")]
        for graph, traced in zip(self.source.graphs, again.graphs, strict=True):
            if graph.way.training and graph.way not in self.predicted.ways:
                continue
            off = self._off(graph, self.pruned, self.predicted.weights, *graph.example)
            if off is not None:
                text = f"its output in {graph.way} differs from the sliced graph's by {off:.1e}"
                first = diverging(graph, self.predicted.kept, _held(self.pruned, self.predicted.weights), traced)
                if first is None:
                    return [Problem(None, text)]
                return [Problem(blamed(self.pruned, first.module), f"{text}, from {first.name} on")]
        fault = training_error(self.pruned, self.source) if self.trains else None
        return [] if fault is None else [Problem(None, f"it does not train: {fault}")]

    def _off(
        self, graph: AxisGraph, pruned: nn.Module, weights: Mapping[str, Tensor], args: tuple, kwargs: dict
    ) -> float | None:
        """How far the output is from the sliced graph's, None where that is rounding: in float64 there is next to
        none, so what differs by more than usual is computed again there, if the model takes that."""
        dtype = next((p.dtype for p in pruned.parameters()), torch.float32)
        held = _held(pruned, weights)
        off = compare_outputs(pruned, SubNetwork(graph, self.predicted.kept, weights=held), args, kwargs)
        if off <= TOLERANCE.get(dtype, 0.05):
            return None
        if dtype == torch.float64:
            return off
        args, kwargs = pytree.tree_map_only(Tensor, _double, (args, kwargs))
        weights = {name: _double(tensor) for name, tensor in weights.items()}
        try:
            return self._off(graph, deep_copy(pruned).double(), weights, args, kwargs)
        except Exception:  # noqa: BLE001  a forward that makes tensors of a type of its own
            return off


def known_cost(traced: TracedModel, plan: Plan | None = None) -> Cost:
    """The cost without that of leaves, which may follow from values: what a detector does with the boxes that it
    finds."""
    left, cost = traced.left_by(plan), traced.cost(plan)
    leaves = (operation for operation in left.operations if operation.target is OPERATOR)
    macs = sum(value_of(mac_products(left, leaf), {left.batch: 1}) for leaf in leaves)
    return replace(cost, macs=cost.macs - macs)


def _held(pruned: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for a run, which changes buffers alone."""
    parameters = dict(pruned.named_parameters(remove_duplicate=False))
    return {name: tensor if name in parameters else tensor.clone() for name, tensor in weights.items()}


def repeatable(source: TracedModel) -> set[Way]:
    """The training ways whose outputs are those of their graphs: their random numbers are drawn in the same order."""
    graphs = [graph for graph in source.others if graph.way.training]
    dtype = next((p.dtype for p in source.model.parameters()), torch.float32)
    off = {graph.way: compare_outputs(source.model, SubNetwork(graph, {}), *graph.example) for graph in graphs}
    return {way for way, error in off.items() if error <= TOLERANCE.get(dtype, 0.05)}


def _first_of_each(found: list[Mismatch]) -> list[Mismatch]:
    first: dict[str, Mismatch] = {}
    for difference in found:
        first.setdefault(difference.module, difference)
    return list(first.values())


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
