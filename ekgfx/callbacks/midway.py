"""A network that is pruned in the middle of its training, where it stands, and taught from then on by what it was."""

import copy
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from ekgfx.base.units import percent
from ekgfx.data.batches import LABELS, Inputs, unpacked
from ekgfx.errors import DataError, EkgfxError
from ekgfx.graph.plan import Plan
from ekgfx.repair import repair
from ekgfx.search import SearchResult, search
from ekgfx.surgery.cut import prune
from ekgfx.surgery.transfer import transfer
from ekgfx.tracing.trace import trace
from ekgfx.tracing.traced import TracedModel
from ekgfx.training.loss import at_least_single, default_temperature, guided_loss
from ekgfx.training.outputs import Logits, finder, logits_of

log = logging.getLogger("ekgfx")


class Midway:
    """Searches, cuts and repairs a network in place, takes its optimizers along, and then is its teacher.

    Args:
        batches: to search and repair on, `(inputs, labels)` or mappings; None draws `count` of the training loader's.
        count: how many batches are drawn.
        teach: weight of the guidance, KL_T(unpruned ‖ pruned), beside the loop's own loss; 0 leaves it out.
        temperature: T of the guidance; 4 below 1000 classes and 10 from there on.
        logits: where the logits are in the network's output, as in `ekgfx.finetune`.
        refit: whether the cut network is repaired in closed form (`ekgfx.repair`).
        options: of `ekgfx.search`: the budget (`flops=0.55`) and the way to it.

    Attributes:
        result: what the search found; None before the cut.
        teacher: the network as it was; None before the cut.
    """

    def __init__(
        self,
        *,
        batches: Iterable[Any] | None = None,
        count: int = 8,
        teach: float = 1.0,
        temperature: float | None = None,
        logits: Logits = logits_of,
        refit: bool = True,
        **options: Any,
    ) -> None:
        self.batches, self.count, self.teach, self.temperature = batches, count, teach, temperature
        self.logits, self.refit, self.options = finder(logits), refit, options
        self.result: SearchResult | None = None
        self.teacher: nn.Module | None = None

    @property
    def plan(self) -> Plan | None:
        """The plan that the network was cut by; None before. A checkpoint of the cut network loads into
        `ekgfx.prune(network, plan, …)`."""
        return None if self.result is None else self.result.plan

    def cut(self, network: nn.Module, loader: Any, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Cuts `network` itself: whoever holds it, holds the pruned one; so do the optimizers.

        Raises DataError where no batches can be drawn, and whatever the search and the cut raise.
        """
        batches = [_plain(batch) for batch in (self.batches if self.batches is not None else drawn(loader, self.count))]
        training = network.training
        inputs = Inputs.of(batches[0][0]).onto(network)
        traced = trace(network, inputs.args, inputs.kwargs)
        self.result = search(traced, batches, logits=self.logits, **self.options)
        plan = self.result.plan
        teacher = copy.deepcopy(network).eval().requires_grad_(False)
        pruned = prune(network, plan, traced, calibrate=[images for images, _ in batches])
        if self.refit:
            _refit(pruned, traced, plan, [_in_order(network, images) for images, _ in batches])
        for optimizer in optimizers:
            transfer(optimizer, pruned, plan, traced)
        before, after = traced.cost(), traced.cost(plan)
        become(network, pruned)
        network.train(training)
        self.teacher = teacher
        log.info(
            "pruned to %s of the MACs and %s of the parameters",
            percent(after.macs / before.macs),
            percent(after.params / before.params),
        )

    def guidance(self, inputs: Inputs, output: Any) -> Tensor | float:
        """What is added to the loss of one call of the network: 0 before the cut."""
        if self.teacher is None or not self.teach:
            return 0.0
        with torch.no_grad():
            said = at_least_single(self.logits(inputs.into(self.teacher))).movedim(1, -1)
        own = at_least_single(self.logits(output)).movedim(1, -1)
        temperature = self.temperature or default_temperature(own.shape[-1])
        return self.teach * guided_loss([own], None, said[:, None], temperature)


def _refit(pruned: nn.Module, traced: TracedModel, plan: Plan, images: list[Any]) -> None:
    try:
        log.info("%s", repair(pruned, traced, plan, images))
    except EkgfxError as error:  # the cut is right without it, and training goes on
        log.warning("the cut network was not repaired: %s", error)


def _in_order(network: nn.Module, images: Any) -> Any:
    """A batch's inputs as `repair` takes them: those given by name in the order of forward's arguments."""
    if not isinstance(images, Mapping):
        return (images,)
    names = list(inspect.signature(network.forward).parameters)
    return (tuple(images[name] for name in sorted(images, key=names.index)),)


def become(network: nn.Module, pruned: nn.Module) -> None:
    """Turns a module into another of its kind, in place. A forward that a trainer has set on it stays."""
    own = {name: value for name, value in vars(network).items() if name in ("forward", "_original_forward")}
    network.__class__ = pruned.__class__
    network.__dict__.clear()
    network.__dict__.update({**vars(pruned), **own})


def without_labels(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward that takes its labels with its inputs."""
    return {name: value for name, value in arguments.items() if name not in LABELS}


def drawn(loader: Any, count: int) -> list[Any]:
    """`count` batches of a loader's data set in random order, by a loader of its own: one that is in use stays where it
    is. Raises DataError for a loader whose samples cannot be drawn."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        raise DataError(f"batches cannot be drawn from a {type(loader).__name__}; pass batches=[(inputs, labels), …]")
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or 32
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(0))[: size * count]  # type: ignore[arg-type]
    chunks = [chunk.tolist() for chunk in order.split(size)]
    return list(DataLoader(loader.dataset, batch_sampler=chunks, collate_fn=loader.collate_fn))


def _plain(batch: Any) -> tuple[Any, Any]:
    inputs, labels, _ = unpacked(batch)
    return inputs, labels
