"""Networks in which one unit alone is cut: judged as a search judges its candidates, or cut for real and repaired."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.opaque import evaluation_mode
from ekgfx.graph.plan import Plan
from ekgfx.repair import repair
from ekgfx.repair.judge import divergence
from ekgfx.search.forks import Branch, Forks, Walk
from ekgfx.search.problem import Problem
from ekgfx.search.reward import Objective, ValidationBatch
from ekgfx.surgery.check import compare_outputs
from ekgfx.surgery.cut import prune
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.loss import at_least_single, is_classes, label_loss

OFF = 1e-3
"""Relative error of a cut module's output that is no rounding."""

Key = tuple[str, float]
"""A unit, and the share of it that is kept."""

OnCut = Callable[[int, int], None]
"""Told how many of all cuts are done, and how many there are."""


@dataclass(frozen=True)
class Worth:
    """A network on the images that it is judged on. accuracy, loss: against the labels, None without. agreement: share
    of images (of positions, in a dense task) of which it says what the unpruned network says; error: mean KL divergence
    from the unpruned network's answers. Where the network gives one number, there is no agreement, and the error is the
    squared difference in squares of the unpruned network's."""

    accuracy: float | None
    loss: float | None
    agreement: float | None
    error: float


class Tally:
    """Adds up what a network is worth, batch by batch."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.samples = 0
        self.labelled = self.classes = True
        self.loss = self.off = self.size = self.same = self.right = self.places = 0.0

    def see(self, batch: ValidationBatch, output: Any, truth: Tensor) -> None:
        """truth: the unpruned network's logits of the batch, B × K × …"""
        logits = at_least_single(self.objective.logits(output)).double()
        truth = truth.double()
        self.samples += batch.samples
        self.labelled &= batch.target is not None
        if batch.target is not None:
            loss = label_loss(self.objective.loss, self.objective.logits)(output, batch.target)
            self.loss += batch.samples * float(loss)
            if is_classes(batch.target, logits):
                self.right += float((logits.argmax(1) == batch.target).sum())
                self.places += batch.target.numel()
        self.classes &= logits.ndim > 1 and logits.shape[1] > 1
        if self.classes:
            self.off += float(divergence(truth, logits))
            self.same += float((logits.argmax(1) == truth.argmax(1)).sum())
            self.size += truth[:, 0].numel()
        else:
            self.off += float((logits - truth).square().sum())
            self.size += float(truth.square().sum())

    def worth(self) -> Worth:
        """The means."""
        return Worth(
            accuracy=self.right / self.places if self.places else None,
            loss=self.loss / self.samples if self.labelled else None,
            agreement=self.same / self.size if self.classes else None,
            error=self.off / self.size if self.size else self.off,
        )


def judged(
    problem: Problem, batches: Sequence[ValidationBatch], plans: Mapping[Key, Plan], on_cut: OnCut
) -> tuple[Worth, dict[Key, Worth]]:
    """The unpruned network and every cut of it, with the batch's statistics. What a cut does not reach is computed
    once. problem: with its units, and without their being cut."""
    dense, forks, objective = problem.network(problem.full()), Forks(problem.traced), problem.objective
    branches = {
        key: Branch(dense, forks, problem.axes(key[0]), problem.traced.groups.kept(plan), rescale=problem.rescale)
        for key, plan in plans.items()
    }
    order = sorted(branches, key=lambda key: branches[key].fork.at)
    whole, tallies = Tally(objective), {key: Tally(objective) for key in order}
    done, total = 0, len(order) * len(batches)
    with torch.no_grad():
        for batch in batches:
            output = batch.inputs.into(dense)
            truth = at_least_single(objective.logits(output))
            whole.see(batch, output, truth)
            walk = Walk(forks, dense, batch.inputs, [branches[key].fork for key in order], {})
            for key in order:
                tallies[key].see(batch, branches[key].go_on(batch.inputs, walk.to(branches[key].fork)), truth)
                done += 1
                on_cut(done, total)
    return whole.worth(), {key: tally.worth() for key, tally in tallies.items()}


def repaired(
    problem: Problem, batches: Sequence[ValidationBatch], plans: Mapping[Key, Plan], on_cut: OnCut
) -> tuple[Worth, dict[Key, Worth]]:
    """The same in evaluation mode, every cut made for real and refitted on the problem's own batches."""
    traced, objective = problem.traced, problem.objective
    images = [(batch.inputs, None) for batch in problem.batches]
    dense = SubNetwork(traced, {}, channels_last=problem.computing.channels_last)
    with torch.no_grad():
        truths = [at_least_single(objective.logits(batch.inputs.into(dense))) for batch in batches]

    def worth(network: Callable[..., Any]) -> Worth:
        tally = Tally(objective)
        with torch.no_grad():
            for batch, truth in zip(batches, truths, strict=True):
                tally.see(batch, batch.inputs.into(network), truth)
        return tally.worth()

    found = {}
    for number, (key, plan) in enumerate(plans.items(), 1):
        pruned = cut(traced, plan)
        repair(pruned, traced, plan, images, seed=problem.seed)
        with evaluation_mode(pruned):
            found[key] = worth(pruned)
        on_cut(number, len(plans))
    return worth(dense), found


def cut(traced: TracedModel, plan: Plan) -> nn.Module:
    """The cut module. Whether its integers are right is told by what it computes, which takes less than to trace it;
    where they are not, it is cut with every check."""
    made = prune(traced.model, plan, traced, verify=False, graphs="allow")
    network = SubNetwork(traced, traced.groups.kept(plan), rescale=plan.rescale)
    try:
        right = compare_outputs(made, network, *traced.example) < OFF
    except Exception:  # noqa: BLE001  whatever a module raises whose integers are wrong
        right = False
    return made if right else prune(traced.model, plan, traced, graphs="allow")
