"""BatchNorm by the statistics of a set of images, for sub-networks that are asked about single ones.

What a network that takes the statistics of each batch says of an image depends on the others in its batch: on their
classes, and on how many they are. By statistics that are taken once it says the same of it in any company.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ekgfx.axes import Axis
from ekgfx.data.batches import Inputs
from ekgfx.execution.subnetwork import BATCH_NORM, SubNetwork
from ekgfx.graph.axis_graph import AxisGraph, Operation

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and variance per channel of what each BatchNorm normalizes, by the name of its operator; on the CPU."""


class Settled(SubNetwork):
    """A sub-network whose BatchNorms normalize by known statistics; one that has none there by its running averages."""

    def __init__(self, graph: AxisGraph, kept: Mapping[Axis, Tensor], statistics: Statistics, **manner: Any) -> None:
        super().__init__(graph, kept, **manner)
        self.statistics = {
            name: (mean.to(self.device), var.to(self.device)) for name, (mean, var) in statistics.items()
        }

    def compute(self, operation: Operation, args: dict[str, Any], counts: Mapping[Axis, int], spare: bool) -> Any:
        if operation.name in self.statistics:
            mean, var = (value.to(args["input"].dtype) for value in self.statistics[operation.name])
            args |= {"running_mean": mean, "running_var": var, "training": False}
        return super().compute(operation, args, counts, spare)


@dataclass
class Moments:
    """Count, mean and mean square distance from it, per channel, of all that was added so far."""

    count: int
    mean: Tensor
    var: Tensor

    def add(self, count: int, mean: Tensor, var: Tensor) -> None:
        """Take in other moments (Chan et al. 1979)."""
        whole = self.count + count
        apart = mean - self.mean
        self.var = (self.var * self.count + var * count + apart.square() * (self.count * count / whole)) / whole
        self.mean = self.mean + apart * (count / whole)
        self.count = whole


class Observer(SubNetwork):
    """A sub-network by the statistics of each batch, which it adds up over all that it sees."""

    def __init__(self, graph: AxisGraph, kept: Mapping[Axis, Tensor], **manner: Any) -> None:
        super().__init__(graph, kept, batch_stats=True, **manner)
        self.moments: dict[str, Moments] = {}

    def compute(self, operation: Operation, args: dict[str, Any], counts: Mapping[Axis, int], spare: bool) -> Any:
        if operation.target is BATCH_NORM:
            x = args["input"]
            dims = [dim for dim in range(x.ndim) if dim != 1]
            var, mean = torch.var_mean(x.double() if x.device.type == "cpu" else x.float(), dims, correction=0)
            count = x.numel() // x.shape[1]
            found = self.moments.setdefault(operation.name, Moments(0, torch.zeros_like(mean), torch.zeros_like(var)))
            found.add(count, mean, var)
        return super().compute(operation, args, counts, spare)


def statistics(graph: AxisGraph, kept: Mapping[Axis, Tensor], batches: Iterable[Inputs], **manner: Any) -> Statistics:
    """What the BatchNorms of a sub-network normalize on `batches`, each by the batch's statistics
    as in the search; over all samples, so that their number in a batch hardly counts."""
    network = Observer(graph, kept, **manner)
    with torch.no_grad():
        for inputs in batches:
            inputs.into(network)
    return {name: (found.mean.float().cpu(), found.var.float().cpu()) for name, found in network.moments.items()}
