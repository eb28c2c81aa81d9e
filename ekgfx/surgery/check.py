"""Whether a cut module is what was predicted: its operators, traced again, its outputs, a step of its training."""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ekgfx.axes import Axis, Expr, axes, count
from ekgfx.base.containers import tensors_by_place
from ekgfx.errors import PruneError
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.nodes import op_name
from ekgfx.graph.opaque import OPERATOR
from ekgfx.graph.plan import Plan
from ekgfx.graph.propagation import Operation
from ekgfx.graph.ways import Way, undisturbed
from ekgfx.tracing.traced import TracedModel

TINY = torch.finfo(torch.float32).tiny
# Copies that PyTorch leaves out where a narrower tensor happens to be contiguous already.
LAYOUT_ONLY = {f"aten.{name}.default" for name in ("contiguous", "clone", "alias")}


VIEWS = {"aten._unsafe_view.default", "aten.reshape.default"}  # of a tensor that has been copied, or may be


def relative_error(a: Any, b: Any) -> float:
    """Largest |a − b| over all output tensors, relative to the largest finite |b|.

    Where both are the same infinity, or both no number, they agree; where one of them is, the error is infinite.

    Raises:
        PruneError: they hold other tensors, or tensors of other shapes.
    """
    worst = 0.0
    found, wanted = tensors_by_place(a), tensors_by_place(b)
    if len(found) != len(wanted):
        lacks = ", ".join(sorted(wanted.keys() - found.keys())[:3]) or "nothing"
        more = ", ".join(sorted(found.keys() - wanted.keys())[:3]) or "nothing"
        raise PruneError(
            f"outputs hold other tensors: {lacks} lacking, {more} besides; a forward that fills a cache on its way "
            "cannot be replaced: leave the cache out (use_cache=False), or cut widths that its class can express"
        )
    for x, y in zip(found.values(), wanted.values(), strict=True):
        if x.shape != y.shape:
            raise PruneError(f"outputs have different shapes: {tuple(x.shape)} and {tuple(y.shape)}")
        if x.numel():
            x, y = (t.int() if t.dtype == torch.bool else t for t in (x, y))
            off = torch.where((x == y) | (x != x) & (y != y), 0, (x - y).abs())
            size = y.abs().nan_to_num(0, 0).max().item()
            worst = max(worst, off.nan_to_num(math.inf, math.inf).max().item() / max(size, TINY))
    return worst


@dataclass(frozen=True)
class Mismatch:
    """An operator of the pruned model that is not what was predicted, in words, and the module that runs it.

    another: another operator stands in its place. That need not be wrong: Python may leave out what does nothing, as
    repeating once does.
    """

    module: str
    text: str
    way: Way = Way()  # noqa: RUF009  frozen
    another: bool = False

    def __str__(self) -> str:
        return self.text if self.way == Way() else f"{self.text} ({self.way})"


def predicted_shapes(graph: AxisGraph, counts: Mapping[Axis, int]) -> dict[str, tuple[int | None, ...]]:
    """Operator node → shape of its (first) output when the axes keep `counts` positions; None for a size that a leaf
    makes, which may follow from values, as the number of boxes that it finds does."""
    leaves = (operation for operation in graph.operations if operation.target is OPERATOR)
    dims = (dim for leaf in leaves for output in leaf.effect.outputs for dim in output)
    made = {axis for dim in dims for axis in axes(dim) if not axis.batch}

    def size(dim: Expr) -> int | None:
        return count(dim, counts) if made.isdisjoint(axes(dim)) else None

    return {operation.name: tuple(map(size, operation.effect.outputs[0])) for operation in graph.operations}


def differences(traced: TracedModel, counts: Mapping[Axis, int], again: TracedModel) -> list[Mismatch]:
    """Where the pruned model, traced again in every way in which it was traced, is not the traced one with `counts`
    positions left of its axes.

    Every operator must read the same values as before, have the predicted shape, and the same numbers: an attention
    that divides by the root of a width divides by the width before the cut. Where other operators run, the first of
    them ends the comparison.
    """
    pairs = zip(traced.graphs, again.graphs, strict=True)
    return [replace(found, way=old.way) for old, new in pairs for found in _differences(old, counts, new)]


def _differences(traced: AxisGraph, counts: Mapping[Axis, int], again: AxisGraph) -> list[Mismatch]:
    shapes, actual = predicted_shapes(traced, counts), predicted_shapes(again, {})
    before, after = Reader(traced), Reader(again)
    found = []
    for old, new in zip(before.operations, after.operations, strict=False):
        if operator_name(old.target) != operator_name(new.target):
            break
        place = f"{old.name} in {old.module or 'the model'}"
        if not _same(shapes[old.name], actual[new.name]):
            text = f"{place}: predicted shape {shapes[old.name]}, found {actual[new.name]}"
            found.append(Mismatch(old.module, text))
        else:
            otherwise = (*_otherwise(old, new, before, after), *_other_sizes(old, new, counts))
            found += [Mismatch(old.module, f"{place}: {what}") for what in otherwise]
    else:
        if len(before.operations) == len(after.operations):
            return found
    common = min(len(before.operations), len(after.operations)) - 1
    pairs = enumerate(zip(before.operations, after.operations, strict=False))
    first = before.operations[
        next((i for i, (a, b) in pairs if operator_name(a.target) != operator_name(b.target)), common)
    ]
    text = f"the pruned model runs other operators than the original, from {first.name} in {first.module or 'it'} on"
    return [*found, Mismatch(first.module, text, another=True)]


def _same(predicted: tuple[int | None, ...], found: tuple[int | None, ...]) -> bool:
    pairs = zip(predicted, found, strict=False)
    return len(predicted) == len(found) and all(None in (a, b) or a == b for a, b in pairs)


def operator_name(target: Any) -> str:
    """An operator's name, the same for those that differ in where their result lies in memory only."""
    name = op_name(target).replace("_.", ".")
    return "aten.view.default" if name in VIEWS else name


def takes_all(operation: Operation) -> bool:
    """Whether an operator takes all of a tensor by a slice, which the export leaves out where Python slices."""
    if str(operation.target) != "aten.slice.Tensor" or operation.args["step"] != 1:
        return False
    read, made = (node.meta["val"].shape for node in (operation.args["self"], operation.node))
    return bool(read == made)


class Reader:
    """Says what a value of a graph is, in words that are the same for another graph of the same model."""

    def __init__(self, graph: AxisGraph) -> None:
        self.graph = graph
        self.operations = [op for op in graph.operations if str(op.target) not in LAYOUT_ONLY and not takes_all(op)]
        self.numbers = {op.node: i for i, op in enumerate(self.operations)}

    def __call__(self, node: fx.Node) -> Any:
        if node in self.numbers:
            return self.numbers[node]
        if node.op == "call_function" and node.target is operator.getitem:
            return (self(node.args[0]), node.args[1])  # type: ignore[arg-type]
        if node.op == "call_function" and node.all_input_nodes:
            return self(node.all_input_nodes[0])
        if node.name in self.graph.inputs:
            return f"input {self.graph.inputs.index(node.name)}"
        return self.graph.weights.get(node.name, "a constant")


def _otherwise(old: Operation, new: Operation, before: Reader, after: Reader) -> Iterator[str]:
    """What an operator is given that is not what it was given before, apart from sizes."""
    for name, value in old.args.items():
        other = new.args.get(name)
        if name in old.effect.sizes or name in new.effect.sizes:
            continue
        if isinstance(value, fx.Node) and isinstance(other, fx.Node):
            if before(value) != after(other):
                yield f"{name} is another value than before"
        elif type(value) in (float, bool, int) and type(other) in (float, bool, int):
            exact = type(value) is not int or name in ("other", "exponent", "alpha", "value", "fill_value")
            if exact and value != other:
                yield f"{name} is {other}, before the cut it was {value}"


def _other_sizes(old: Operation, new: Operation, counts: Mapping[Axis, int]) -> Iterator[str]:
    """Sizes that are not what was predicted, where the shape of the result need not show it: how many groups a norm
    has, where a slice starts. Where one ends is seen, or makes no difference."""
    for name, exprs in old.effect.sizes.items():
        before, after = old.args.get(name), new.args.get(name)
        sequences = (exprs, before, after) if isinstance(exprs, Sequence) else ([exprs], [before], [after])
        if name in ("end", "length") or not all(isinstance(each, Sequence) for each in sequences):
            continue
        for expr, was, now in zip(*sequences, strict=False):
            follows = type(was) is int and type(now) is int and was == count(expr, {}) and now >= 0
            if follows and now != count(expr, counts):
                yield f"{name} is {now}, predicted was {count(expr, counts)}"


def check_pruned(
    traced: TracedModel, plan: Plan, pruned: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None
) -> float:
    """Relative error between the pruned module and the sliced graph, both in evaluation mode."""
    return compare_outputs(pruned, traced.subnetwork(plan, rescale=plan.rescale), args, kwargs or {})


def compare_outputs(pruned: nn.Module, network: SubNetwork, args: tuple, kwargs: Mapping[str, Any]) -> float:
    """Relative error between a module and a sub-network, both run in the way of the latter's graph."""
    way = network.graph.way
    with torch.no_grad(), way.entered(pruned), undisturbed(pruned):
        output = pytree.tree_map_only(Tensor, torch.clone, pruned(*args, **kwargs))
    with torch.no_grad(), way.entered(pruned), undisturbed(pruned):  # again, for the same random numbers
        return relative_error(output, network(*args, **kwargs))


def trains(pruned: nn.Module, way: Way, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Run a module forward and backward in training mode; nothing of it is changed. Raises what it raises."""
    held = [(parameter, parameter.grad) for parameter in pruned.parameters() if parameter.requires_grad]
    known = [hooks for p, _ in held for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks) if hooks]
    own = [(hooks, dict(hooks)) for hooks in known]  # the user's hooks see nothing of this
    for hooks in known:
        hooks.clear()
    handles = [parameter.register_post_accumulate_grad_hook(_drop_gradient) for parameter, _ in held]
    for parameter, _ in held:
        parameter.grad = None
    try:
        with torch.enable_grad(), replace(way, training=True).entered(pruned), undisturbed(pruned):
            outputs = (t for t in pytree.tree_leaves(pruned(*args, **kwargs)) if isinstance(t, Tensor))
            if wanted := [t.abs().sum() for t in outputs if t.requires_grad]:
                torch.autograd.backward(wanted)
    finally:
        for handle in handles:
            handle.remove()
        for hooks, before in own:
            hooks.update(before)
        for parameter, gradient in held:
            parameter.grad = gradient


def _drop_gradient(parameter: Tensor) -> None:
    """No more than one gradient exists at a time."""
    parameter.grad = None


def perturb(model: nn.Module, seed: int = 0) -> None:
    """Randomize all parameters and norm statistics in place, so that an error in the analysis cannot hide.

    Freshly initialized networks hide errors: scales and residual gammas are zero or one, biases zero, running
    statistics trivial, and attention maps are nearly uniform (so query and key weights are scaled up as well).
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.ndim < 2 else 0.5 * max(parameter.std(correction=0).item(), 0.02)
            parameter.add_(noise(parameter) * scale)
            if any(part in name for part in ("qkv", "query", "key", ".q.", ".k.", "q_", "k_", ".kv")):
                parameter.mul_(3)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(noise(buffer) * 0.2)
            elif name.endswith("running_var"):
                buffer.mul_(1 + 0.5 * torch.rand(buffer.shape, generator=generator).to(buffer))
