"""A cut is checked against the model's own Python with zeros in place of what is cut: a check that knows no graph."""

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ekgfx
from ekgfx.surgery.check import check_pruned, perturb, relative_error
from ekgfx.surgery.masked import check_masked, mask_tensor
from ekgfx.tracing.trace import silently_traced


def exact(
    model: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]], *, zeroed: bool = True, plans: int = 2
) -> ekgfx.TracedModel:
    """Trace at a batch of two, cut at random: the masked, the sliced and the pruned network agree at other batches; and
    where it is `zeroed`, the pruned one with the model itself, evaluating and training."""
    torch.manual_seed(0)
    model.eval()
    perturb(model)
    traced = ekgfx.trace(model, inputs(2), unused=silently_traced(model, inputs(2)).unseen)
    assert not traced.unknown_ops and not traced.uncounted_ops, (traced.unknown_ops, traced.failed_rules)
    for seed in range(plans):
        rng = random.Random(seed)
        kept = {g.name: tuple(sorted(rng.sample(range(g.size), max(1, g.size // 2)))) for g in traced.groups.values()}
        plan, args = ekgfx.Plan(kept), inputs(3)
        assert check_masked(traced, plan, args) < 1e-10
        pruned = ekgfx.prune(model, plan, traced)
        assert check_pruned(traced, plan, pruned, args) < 1e-10
        if zeroed:
            twin = zeros(model, traced, plan)
            for batch, training in ((3, False), (5, False), (4, True)):
                with torch.no_grad():
                    args = inputs(batch)
                    assert relative_error(pruned.train(training)(*args), twin.train(training)(*args)) < 1e-9
    return traced


def zeros(model: nn.Module, traced: ekgfx.TracedModel, plan: ekgfx.Plan) -> nn.Module:
    """The model with zeros in place of what the plan cuts."""
    twin, kept, dims = copy.deepcopy(model), traced.groups.kept(plan), traced.weight_dims()
    with torch.no_grad():
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            if name in dims:
                tensor.copy_(mask_tensor(tensor, dims[name], kept))
    return twin


def zeroed(traced: ekgfx.TracedModel, plan: ekgfx.Plan) -> nn.Module:
    """The traced model with zeros in place of what the plan cuts."""
    return zeros(traced.model, traced, plan)


def distance(pruned: nn.Module, twin: nn.Module, inputs: tuple[Any, ...], *, training: bool = False) -> float:
    """Relative error of copies of the two, in the same mode, with the same random numbers."""
    found = []
    dtype = next(pruned.parameters()).dtype
    inputs = pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, inputs)
    for network in (pruned, twin):
        network = copy.deepcopy(network).train(training)
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(network(*inputs))
    return relative_error(*found)
