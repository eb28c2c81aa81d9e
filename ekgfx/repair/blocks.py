"""Distillation after the refit, block by block and without labels.

What no closed form reaches, small steps of gradient descent do: the weights of one block after the other are trained to
give what the unpruned network has behind it, from what the pruned network has before it. BatchNorm's statistics stay,
and held-out images say when to stop, the untrained block among what they choose from. A network that is trained as a
whole on so few images soon knows them by heart.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ekgfx.axes import Axis
from ekgfx.data.batches import Inputs
from ekgfx.execution.subnetwork import SubNetwork, slice_tensor
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.liveness import last_reads
from ekgfx.repair.clamped import FLAT
from ekgfx.repair.judge import divergence
from ekgfx.repair.operators import readers
from ekgfx.repair.rearranged import weight_nodes

BATCH = 32
"""Most images of a step."""
RATE = 3e-3
"""Of Adam's steps, in the root mean square of the tensor; it falls to zero along a cosine."""


@dataclass(frozen=True)
class BlockRepair:
    """A block that was trained. name: of the operator that ends it; before, after: error on held-out images, the
    squares of what its output lacks, in the target's variance (of a classifier's output: the KL divergence); epoch: the
    one that was kept, 0 for none."""

    name: str
    before: float
    after: float
    epoch: int

    def __str__(self) -> str:
        kept = f"epoch {self.epoch}" if self.epoch else "untrained"
        return f"block up to {self.name}: error {self.before:.4g} → {self.after:.4g} ({kept})"


def block_ends(graph: AxisGraph, constant: set[fx.Node]) -> list[fx.Node]:
    """Residual sums, each with the activation that alone reads it, and what the model returns."""
    found = []
    for operation in graph.operations:
        node = operation.node
        summands = [source for source in node.all_input_nodes if source not in constant]
        if str(operation.target) == "aten.add.Tensor" and len(summands) == 2 and node not in constant:
            (user,) = node.users if len(node.users) == 1 else (node,)
            after = graph.operation(user)
            found.append(user if after is not None and str(after.target) in FLAT else node)
    return found


class Blocks:
    """Both networks on all images, up to the block at hand.

    Args:
        pruned: the refitted network. Its weights are trained.
        kept: axis → kept positions.
        trainable: names of the parameters.
        fit, held: arguments of the model, batch by batch: to train on, and to stop by.
        classes: whether what the model returns are the logits of a classifier.
    """

    def __init__(
        self,
        pruned: SubNetwork,
        kept: Mapping[Axis, Tensor],
        trainable: Sequence[str],
        fit: Sequence[Inputs],
        held: Sequence[Inputs],
        classes: bool,
    ) -> None:
        self.graph, self.kept, self.classes = pruned.graph, kept, classes
        self.dense, self.pruned = SubNetwork(self.graph, {}), pruned
        self.trainable = set(trainable)
        *nodes, output = self.graph.graph.nodes
        self.constant = weight_nodes(self.graph)
        skip = set(self.constant)
        self.nodes = [node for node in nodes if node not in skip]
        self.returned = [node for node in output.all_input_nodes if node not in skip]
        self.ends = block_ends(self.graph, skip)
        self.dying = last_reads(self.nodes, stay={node.name for node in self.returned})
        self.inputs = [self.dense.inputs(*inputs) for inputs in (*fit, *held)]
        self.truth: list[dict[str, Any]] = [{} for _ in self.inputs]
        self.values: list[dict[str, Any]] = [{} for _ in self.inputs]
        self.fit, self.held = range(len(fit)), range(len(fit), len(self.inputs))

    def parts(self) -> Iterator[tuple[list[fx.Node], list[fx.Node]]]:
        """The nodes of each block, and those whose values are compared: its end, of the last one what is returned."""
        start = 0
        for end in self.ends:
            stop = self.nodes.index(end) + 1
            if stop > start:
                yield self.nodes[start:stop], [end]
                start = stop
        if start < len(self.nodes):
            yield self.nodes[start:], self.returned

    def train(self, epochs: int, seed: int, on_block: Callable[[BlockRepair], None]) -> list[BlockRepair]:
        """Trains block after block."""
        generator, done = torch.Generator().manual_seed(seed), []
        for nodes, ends in self.parts():
            found = self._block(nodes, ends, epochs, generator)
            if found is not None:
                done.append(found)
                on_block(found)
            self._advance(self.pruned, self.values, nodes)
        return done

    def _advance(self, network: SubNetwork, values: list[dict[str, Any]], nodes: list[fx.Node]) -> None:
        with torch.no_grad():
            constants = network.follow(self.constant, {}, {}, {})
            for inputs, each in zip(self.inputs, values, strict=True):
                each.update(constants)
                network.follow(nodes, inputs, each, self.dying)
                for name in constants:
                    each.pop(name, None)

    def _block(
        self, nodes: list[fx.Node], ends: list[fx.Node], epochs: int, generator: torch.Generator
    ) -> BlockRepair | None:
        self._advance(self.dense, self.truth, nodes)
        dims = self.graph.dims
        targets = [[slice_tensor(truth[end.name], dims[end.name], self.kept) for end in ends] for truth in self.truth]
        logits = self.classes and ends == self.returned
        weights = [self.pruned.weights[name].requires_grad_() for name in self._weights_of(nodes)]

        def error(batch: int) -> Tensor:
            constants = self.pruned.follow(self.constant, {}, {}, {})
            values = self.pruned.follow(nodes, self.inputs[batch], {**self.values[batch], **constants}, {})
            pairs = [(values[end.name], t) for end, t in zip(ends, targets[batch], strict=True) if _real(t)]
            if logits:
                ((y, t),) = pairs
                return divergence(t, y)
            return torch.stack([(y - t).square().sum() for y, t in pairs]).sum() if pairs else torch.zeros(())

        scale = sum(_size(t, logits) for batch in self.held for t in targets[batch] if _real(t)) or 1.0

        def held() -> float:
            with torch.no_grad():
                return sum(float(error(batch)) for batch in self.held) / scale

        with torch.enable_grad():
            if not weights or not error(0).requires_grad:
                return None
        first = least = held()
        best, kept = [weight.detach().clone() for weight in weights], 0
        optimizer = torch.optim.Adam(
            [{"params": [weight], "lr": RATE * float(weight.detach().square().mean().sqrt())} for weight in weights]
        )
        steps = epochs * len(self.fit)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for epoch in range(1, epochs + 1):
            for batch in torch.randperm(len(self.fit), generator=generator).tolist():
                optimizer.zero_grad()
                with torch.enable_grad():
                    error(batch).backward()
                optimizer.step()
                schedule.step()
            now = held()
            if now < least:
                least, best, kept = now, [weight.detach().clone() for weight in weights], epoch
        with torch.no_grad():
            for weight, value in zip(weights, best, strict=True):
                weight.requires_grad_(False).copy_(value)
        return BlockRepair(ends[0].name, first, least, kept)

    def _weights_of(self, nodes: list[fx.Node]) -> list[str]:
        """The parameters that these nodes alone read, as they stand or through others on weights."""
        inside, constant = set(nodes), set(self.constant)
        read = {name: set(readers(self.graph, name, constant)) for name in self.trainable}
        return sorted(name for name, by in read.items() if by and by <= inside)


def _size(t: Tensor, logits: bool) -> float:
    return float(len(t)) if logits else float((t - t.mean(0)).square().sum())


def _real(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()
