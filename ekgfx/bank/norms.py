"""BatchNorm by statistics that are taken once, for sub-networks that are asked about single images.

What a network that takes the statistics of each batch says of an image depends on the others in its batch: on their
classes, and on how many they are. By statistics that are taken once it says the same of it in any company. They are the
network's running averages, corrected by what the cut changed (`ekgfx.execution.averages`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from ekgfx.axes import Axis
from ekgfx.data.batches import Inputs
from ekgfx.execution import averages
from ekgfx.execution.subnetwork import BATCH_NORM, SubNetwork, slice_tensor
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.propagation import Operation

Statistics = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and variance per channel of what each BatchNorm normalizes, by the name of its operator; on the CPU."""


AVERAGES = ("running_mean", "running_var")

Noted = dict[str, averages.Statistics]
"""What each BatchNorm normalized of one batch, by the name of its operator."""


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
    """A network that adds up what its BatchNorms normalize.

    full: what they normalize of the same batches in the uncut network, batch by batch, as its own observer has `noted`
    it. They normalize by their running averages, corrected by what is different in the batch at hand; where there is
    nothing to compare with, by the averages as they are; where they keep none, by the batch.
    """

    def __init__(
        self, graph: AxisGraph, kept: Mapping[Axis, Tensor], full: Sequence["Noted"] | None = None, **manner: Any
    ) -> None:
        super().__init__(graph, kept, **manner)
        self.positions, self.full = kept, full
        self.noted: list[Noted] = []
        self.sums: dict[str, tuple[Moments, Moments]] = {}
        self.old: dict[str, tuple[averages.Statistics, float]] = {}

    def observe(self, inputs: Inputs) -> None:
        """Takes in another batch."""
        self.noted.append({})
        inputs.into(self)

    def compute(self, operation: Operation, args: dict[str, Any], counts: Mapping[Axis, int], spare: bool) -> Any:
        if operation.target is BATCH_NORM:
            args |= self._normalizing(operation, args)
        return super().compute(operation, args, counts, spare)

    def _normalizing(self, operation: Operation, args: Mapping[str, Any]) -> dict[str, Any]:
        """Notes what is normalized; returns the arguments that say by what."""
        x, name = args["input"], operation.name
        wide = torch.float64 if x.device.type == "cpu" else torch.float32
        var, mean = torch.var_mean(x.to(wide), [dim for dim in range(x.ndim) if dim != 1], correction=0)
        count, here = x.numel() // x.shape[1], averages.Statistics(mean, var)
        self.noted[-1][name] = here
        empty = Moments(0, torch.zeros_like(mean), torch.zeros_like(var))
        whole, reference = self.sums.setdefault(name, (empty, replace(empty)))
        whole.add(count, mean, var)
        averaged = operation.args["running_mean"]
        if args["running_mean"] is None or not isinstance(averaged, fx.Node) or averaged.name not in self.graph.weights:
            return {}
        old = averages.Statistics(args["running_mean"].to(wide), args["running_var"].to(wide))
        self.old[name] = old, args["eps"]
        if self.full is None:
            return {}
        dims = self.graph.weight_dims()[self.graph.weights[averaged.name]]
        full = averages.Statistics(
            *(slice_tensor(value, dims, self.positions) for value in self.full[len(self.noted) - 1][name])
        )
        reference.add(count, full.mean, full.var)
        new = averages.corrected(old, full, here, args["eps"])
        return {name: value.to(args[name].dtype) for name, value in zip(AVERAGES, new, strict=True)}

    def statistics(self) -> Statistics:
        """Of all batches: the corrected averages, or what was seen where there are none."""
        found = {}
        for name, (whole, reference) in self.sums.items():
            seen = averages.Statistics(whole.mean, whole.var)
            if reference.count:
                old, eps = self.old[name]
                seen = averages.corrected(old, averages.Statistics(reference.mean, reference.var), seen, eps)
            found[name] = seen.mean.cpu(), seen.var.cpu()
        return found


def noted(graph: AxisGraph, batches: Iterable[Inputs]) -> list[Noted]:
    """What the BatchNorms of the uncut network normalize, batch by batch."""
    network = Observer(graph, {})
    with torch.no_grad():
        for inputs in batches:
            network.observe(inputs)
    return network.noted


def statistics(
    graph: AxisGraph, kept: Mapping[Axis, Tensor], batches: Iterable[Inputs], full: Sequence[Noted], **manner: Any
) -> Statistics:
    """What the BatchNorms of a sub-network normalize by: over all samples, so that their number in a batch hardly
    counts. full: what was `noted` of the same batches."""
    network = Observer(graph, kept, full, **manner)
    with torch.no_grad():
        for inputs in batches:
            network.observe(inputs)
    return network.statistics()
