"""Repair: give back what a cut took, in closed form, without labels and without gradients.

The kept channels predict much of the removed ones, and whoever reads them is linear in both. So every linear operator
is refitted by least squares to what it computed in the unpruned network; see docs/repair.md for the equation.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ekgfx.axes import Axis
from ekgfx.base.units import several
from ekgfx.errors import PruneError
from ekgfx.execution.subnetwork import BATCH_NORM, SubNetwork, slice_weights
from ekgfx.graph.arguments import check_inputs
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.graph.plan import Plan
from ekgfx.repair.batch_norm import Estimate, settle, state, write
from ekgfx.repair.images import Images, gather
from ekgfx.repair.judge import Judge, Judgement
from ekgfx.repair.operators import Skipped, find_operators
from ekgfx.repair.progress import Progress
from ekgfx.repair.refitting import repair_operators
from ekgfx.repair.walk import LayerRepair, Walk
from ekgfx.surgery.calibrate import estimated
from ekgfx.tracing.traced import TracedModel

__all__ = ["repair", "Repair", "LayerRepair", "Skipped", "Judgement"]


@dataclass(frozen=True)
class Repair:
    """What a repair did. before, after: on held-out images; batch_norm: share of new statistics that was taken;
    statistics: how they were found, "corrected" or "re-estimated" (`ekgfx.calibrate`), None where none were taken;
    kept: whether the network was changed at all. `after` is measured with statistics of the fitted images alone; the
    network has those of all images, unless they are worse on the held-out ones."""

    before: Judgement
    after: Judgement
    kept: bool
    classes: bool
    batch_norm: float
    statistics: str | None
    layers: tuple[LayerRepair, ...]
    skipped: tuple[Skipped, ...]
    images: int
    held_out: int
    seconds: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        if not self.kept:
            why = (
                f"the repair gained nothing on {self.held_out} held-out images" if self.layers else "nothing to repair"
            )
            return "; ".join((*self.notes, f"{why}: the network is as it was"))
        changed = sum(layer.done != "nothing" for layer in self.layers)
        what = "KL divergence from the unpruned network" if self.classes else "relative error"
        said = (
            f"{several(changed, 'operator')} refitted on {several(self.images - self.held_out, 'image')}; "
            f"on {self.held_out} others the {what} fell from "
            f"{_number(self.before.error)} to {_number(self.after.error)}"
        )
        if self.before.agreement is not None and self.after.agreement is not None:
            said += f", equal answers went from {self.before.agreement:.1%} to {self.after.agreement:.1%}"
        return "; ".join((*self.notes, said))

    def to_json(self) -> dict[str, Any]:
        """JSON values of all fields."""
        return asdict(self)


def repair(
    pruned: nn.Module,
    traced: TracedModel,
    plan: Plan,
    images: Tensor | Iterable[Any],
    *,
    most: int = 256,
    positions: int = 40_000,
    batch_size: int = 64,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    on_layer: Callable[[LayerRepair, int, int], None] | None = None,
) -> Repair:
    """Give back, on unlabelled images, what a cut took: every linear operator is refitted in closed form.

    The pruned network is changed in place, and only where images that were not fitted say that it became better: of the
    weights as they were, the refitted ones, and those with BatchNorm's statistics corrected or re-estimated (in part),
    the ones that are nearest to the unpruned network on them are kept. Its class and its state dict's names and shapes
    stay.

    Args:
        pruned: what `ekgfx.prune` made of the traced model by the plan.
        traced: the unpruned model, traced.
        plan: what the model was pruned by.
        images: B × …, on the scale that the model expects; or batches: tensors, mappings of inputs by name, or tuples
            `(inputs, …)` whose rest (labels) is not looked at. Every fifth sample is held out.
        most: images that are used; the others are not read.
        positions: most output positions of an operator that its refit looks at.
        batch_size: most images that are computed at a time, in batches as equal as they can be. The widest activations
            of all images are in memory at once.
        seed: of the sampled positions.
        checkpoint: file to write to every now and then, and to go on from where it exists: a repair that was
            interrupted ends as if it had not been.
        on_layer: called after every operator with what was done, its number and their count.

    Returns:
        What was done, and what it brought, in figures that need no labels.

    Raises:
        PlanError: the plan does not fit the traced model, or that was traced with other arguments than a batch gives.
        PruneError: the pruned network is not what the plan leaves.
        DataError: the model does not take such inputs.

    Example:
        >>> pruned = ekgfx.prune(model, plan, traced)
        >>> print(ekgfx.repair(pruned, traced, plan, images))
    """
    start = time.monotonic()
    kept = traced.groups.kept(plan)
    given = gather(images, batch_size if traced.example_batch else 0, most, pruned)
    with torch.no_grad(), evaluation_mode(pruned):
        if not given.fit or not given.held:
            return _nothing(given, start)
        check_inputs(traced, *given.fit[0])
        weights, left = _weights(pruned, traced, kept, plan), traced.left_by(plan)
        judge = Judge(SubNetwork(traced, {}), given.held)
        before = judge(pruned)
        original = {name: tensor.clone() for name, tensor in state(pruned).items()}
        network = SubNetwork(traced, kept, weights=_with_sliced_statistics(weights, traced, kept, plan))
        operators, skipped = find_operators(network, {operation.name for operation in left.operations})
        bypassed = traced.bypassed(plan)
        walk = Walk(traced, kept, dict(network.weights), given.fit, given.held, positions, seed, bypassed)
        identity = {
            "plan": plan.digest,
            "weights": sum(float(weight.double().abs().sum()) for weight in weights.values()),
            "images": given.digest,
            "batch_size": batch_size,
            "positions": positions,
            "seed": seed,
        }
        progress = Progress(None if checkpoint is None else Path(checkpoint), identity, list(weights))
        layers = repair_operators(walk, operators, progress, on_layer or (lambda *_: None))
        write(pruned, {name: tensor for name, tensor in walk.pruned.weights.items() if name in original})
        walk.batches.clear()
        ways: dict[str, Estimate] = {
            "corrected": lambda batches: estimated(pruned, batches, traced, kept),
            "re-estimated": lambda batches: estimated(pruned, batches),
        }
        settled = settle(pruned, judge, given, ways)
        better = settled.judgement.better(before)
        if not better:
            write(pruned, original)
    return Repair(
        before,
        settled.judgement if better else before,
        better,
        judge.classes,
        settled.share if better else 0.0,
        settled.way if better else None,
        tuple(layers),
        tuple(skipped),
        given.used,
        given.held_out,
        round(time.monotonic() - start, 2),
        given.notes if settled.note is None else (*given.notes, settled.note),
    )


def _number(error: float | None) -> str:
    return "what is no number" if error is None else f"{error:.4g}"


def _nothing(given: Images, start: float) -> Repair:
    unknown = Judgement(None, None)
    images = "1 usable image" if given.used == 1 else f"{given.used or 'no'} usable images"
    need = f"{images}: a repair needs one to fit on and another to judge by"
    notes = (*given.notes, need)
    seconds = round(time.monotonic() - start, 2)
    return Repair(unknown, unknown, False, False, 0.0, None, (), (), given.used, given.held_out, seconds, notes)


def _weights(pruned: nn.Module, traced: TracedModel, kept: Mapping[Axis, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The pruned network's weights by the names that they have in the graph; of what went with a block those that it
    would have had."""
    own, graph = state(pruned), traced.left_by(plan).graph
    if plan.dropped:
        read = {traced.weights.get(node.name) for node in graph.nodes if node.users}
        gone = traced.weight_dims().keys() - own.keys() - read
        own |= slice_weights(traced, kept, rescale=plan.rescale, names=gone)
    for name, cut in slice_weights(traced, kept).items():
        found = tuple(own[name].shape) if name in own else None
        if found != tuple(cut.shape):
            raise PruneError(
                f"the network to repair is not what the plan leaves: {name} should be {tuple(cut.shape)}, but is "
                f"{found or 'not there'}; pass the network that ekgfx.prune made by this plan"
            )
    return {name: own[name] for name in traced.weight_dims()}


def _with_sliced_statistics(
    weights: dict[str, Tensor], traced: TracedModel, kept: Mapping[Axis, Tensor], plan: Plan
) -> dict[str, Tensor]:
    """A network that was only cut starts from the unpruned one's BatchNorm statistics: what its operators are refitted
    to belongs to these. One that was trained since has its own."""
    cut = slice_weights(traced, kept, rescale=plan.rescale)
    statistics = {
        traced.weights[node.name]
        for operation in traced.operations
        if operation.target is BATCH_NORM
        for node in (operation.args["running_mean"], operation.args["running_var"])
        if isinstance(node, fx.Node) and node.name in traced.weights
    }
    trained = any(not torch.equal(weights[name], cut[name]) for name in weights if name not in statistics)
    return dict(weights) if trained else {**weights, **{name: cut[name].clone() for name in statistics}}
