"""Whether the validation batches are ones that BatchNorm can take its statistics of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ekgfx.data.mixing import Mixture, warn
from ekgfx.execution.subnetwork import SubNetwork, has_batch_norm
from ekgfx.search.problem import Problem
from ekgfx.search.reward import ValidationBatch
from ekgfx.training.loss import at_least_single


def check_mixed(problem: Problem, batches: Sequence[ValidationBatch]) -> None:
    """Say so where the validation batches, as they were given, are sorted by class. Without labels the unpruned network
    says the classes, in evaluation mode, where an answer does not depend on the batch.

    problem: with T₀.
    """
    if not has_batch_norm(problem.traced):
        return
    mixture = Mixture()
    for batch in batches:
        mixture.see(_predicted(problem, batch) if batch.target is None else batch.target)
    labelled = bool(batches) and batches[0].target is not None  # predictions may all be one by the network's own fault
    warn("the validation batches of the search", mixture.fault(problem.unpruned[0].shape[1] if labelled else None))


def _predicted(problem: Problem, batch: ValidationBatch) -> Tensor:
    network = SubNetwork(problem.traced, {}, channels_last=problem.computing.channels_last)
    with torch.no_grad():
        return at_least_single(problem.objective.logits(batch.inputs.into(network)))
