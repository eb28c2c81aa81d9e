"""What a model makes of numbers on inputs of another size, and does not make on the example.

An export follows the example's path. A table of positions that a model holds for one size, and computes by its width
for every other, is there a table that can be cut as any; a cut model would compute another one. So the model is run
once on larger inputs. Where tensors are made there that were not seen, such a call is traced besides, and what would
have to stay for it is said.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ekgfx.axes import Dims, axes
from ekgfx.errors import TraceError
from ekgfx.graph.axis_graph import AxisGraph, Example
from ekgfx.graph.sizes import GIVEN_SIZES
from ekgfx.graph.ways import Way
from ekgfx.tracing.observe import Observation, observe
from ekgfx.tracing.parts import further_call
from ekgfx.tracing.traced import TracedModel


def unlike(
    traced: TracedModel, seen: Sequence[Observation], graph: Callable[[Way, Example], dict[str, Any]]
) -> Iterator[str]:
    """What to say of inputs of another size: nothing where all that is made there was seen, or holds nothing back.

    seen: runs of the forward in evaluation mode, on the example and on further ones. graph: traces a further call.
    """
    known: Counter[str] = Counter()
    for each in seen:
        known |= _made(each)
    for example in _larger(traced.example):
        there = observe(traced.model, Way(), *example)
        if there.error is not None:
            continue
        new = _made(there) - known
        if not new:
            return
        try:
            further = AxisGraph(traced.model, **graph(Way(number=len(traced.others) + 1), example))
        except TraceError:
            return  # nor can it be traced as a further call
        kept = _kept_by(traced, further)
        if kept:
            more = f" and {len(kept) - 3} more" if len(kept) > 3 else ""
            made, cut = ", ".join(sorted(new)), ", ".join(kept[:3]) + more
            yield (
                f"on inputs of another size {type(traced.model).__name__} makes numbers ({made}) that it does not make "
                f"on the example: once {cut} is cut, these may be others; pass such a call "
                f"(also=[{further_call(*example)}]) to keep it whole, or keep to the size of the example"
            )
        return


def _made(seen: Observation) -> Counter[str]:
    """How often a run called each function that makes a tensor, or the size of one, from numbers alone."""
    names = ((getattr(call[0], "__name__", ""), call[1:]) for call in seen.calls)
    return Counter(name for name, given in names if name in GIVEN_SIZES or not any(type(v) is tuple for v in given))


def _larger(example: Example) -> Iterator[Example]:
    """The example with its images twice as wide, all of its images' sides twice as long, its sequences twice as long:
    a model may take but one of these."""
    tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
    most = max((tensor.ndim for tensor in tensors), default=0)
    for first, end in dict.fromkeys(((most - 1, most), (2, most), (1, 2))):

        def twice(tensor: Tensor, first: int = first, end: int = end) -> Tensor:
            for dim in range(first, end) if tensor.ndim == most else ():
                tensor = torch.cat([tensor, tensor], dim)
            return tensor

        if 0 < first < end <= most:
            yield pytree.tree_map_only(Tensor, twice, example)


def _kept_by(traced: TracedModel, further: AxisGraph) -> list[str]:
    """The groups of which something stays whole for a further call."""
    joint = traced.assuming({})
    joint.others = (*joint.others, further)
    joint._start()
    before, after = traced.weight_dims(), joint.weight_dims()

    def free(dims: Dims) -> list[int]:
        return [sum(not axis.frozen and axis.size > 1 for axis in axes(dim)) for dim in dims]

    lost = {
        (name, dim)
        for name in before.keys() & after.keys()
        for dim, counts in enumerate(zip(free(before[name]), free(after[name]), strict=True))
        if counts[0] > counts[1]
    }
    return [name for name, group in traced.groups.items() if any((p.parameter, p.dim) in lost for p in group.places)]
