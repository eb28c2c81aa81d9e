"""The user's own Python with the pruned entries of every weight set to zero: what a pruned module must compute."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ekgfx
from ekgfx.verify import mask_tensor, relative_error


def zeroed(traced: ekgfx.TracedModel, plan: ekgfx.Plan) -> nn.Module:
    """A copy of the traced model whose pruned entries are zero."""
    twin, kept, dims = copy.deepcopy(traced.model), traced.groups.kept(plan), traced.weight_dims()
    with torch.no_grad():
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            if name in dims:
                tensor.copy_(mask_tensor(tensor, dims[name], kept))
    return twin


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
