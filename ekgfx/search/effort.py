"""What a search will cost to run, before it runs."""

import math

from torch import Tensor
from torch.utils import _pytree as pytree

from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.plan import Plan
from ekgfx.search.problem import width_rules
from ekgfx.tracing.traced import TracedModel

PASSES = 5
"""Forward passes of a step besides its candidates: importance (with backward), shared prefix, accepted network."""
SUFFIX = 0.5
"""Part of the network that a candidate computes on average."""


def search_macs(traced: TracedModel, samples: int, keep: float, *, step: float = 0.2, accept: int = 1) -> float:
    """Estimate of the MACs of an EKG search with `samples` validation images to `keep` of the network's MACs."""
    full = traced.cost().macs
    savings = []
    for group, rule in width_rules(traced, frozenset(), 1, 0.0).items():
        cut = Plan().with_kept(group, range(rule.kept(rule.next_width(1.0, step))))
        savings.append(1 - traced.cost(cut).macs / full)
    per_step = accept * sum(savings) / len(savings)
    steps = math.ceil((1 - keep) / per_step)
    return steps * samples * full * (1 + keep) / 2 * (PASSES + SUFFIX * len(savings))


def quick_accept(traced: TracedModel, samples: int, keep: float, *, macs: float = 4e12, step: float = 0.2) -> int:
    """How many candidates to accept at once so that the search takes about `macs` multiply-accumulates.

    The default is what two CPU cores do in two to five minutes. Small networks get 1, the paper's search.
    """
    alone = search_macs(traced, samples, keep, step=step)
    return max(1, math.ceil(alone / macs))


def fitting_batch(graph: AxisGraph, most: int = 256, memory: int = 8 << 30) -> int:
    """The largest power of two up to `most` samples whose activations, all kept as training keeps them, stay within
    `memory` bytes.

    256 samples are the paper's, of 32×32 images; a ResNet-50 on 224×224 images would need over 40 GB for them.
    """
    batch = graph.batch.size or 1
    values = pytree.tree_leaves([operation.node.meta["val"] for operation in graph.operations])
    sample = sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor)) / batch
    return max(1, 1 << int(math.log2(min(most, max(1.0, memory / max(sample, 1))))))
