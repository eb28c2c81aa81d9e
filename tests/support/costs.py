"""MACs as the rules say them, and as PyTorch counts them."""

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ekgfx
from ekgfx.graph.cost import mac_table, value_of
from ekgfx.graph.opaque import evaluation_mode


def said_macs(traced: ekgfx.TracedModel, plan: ekgfx.Plan, batch: int) -> int:
    """What the rules say of a whole batch."""
    counts = {axis: len(kept) for axis, kept in traced.groups.kept(plan).items()} | {traced.batch: batch}
    return sum(value_of(products, counts) for products in mac_table(traced).values())


def counted_macs(model: nn.Module, inputs: tuple) -> int:
    """What PyTorch counts, with attention as the two products that it is (the CPU's own kernel is not counted)."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), evaluation_mode(model):
        model(*inputs)
    return counter.get_total_flops() // 2
