"""A callback of Lightning that prunes the network of a LightningModule while it trains, and teaches it from then on."""

from typing import Any

import torch
from torch import nn

from ekgfx.callbacks.midway import Midway
from ekgfx.data.batches import Inputs
from ekgfx.errors import RecipeError

try:
    import lightning.pytorch as lightning  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    try:
        import pytorch_lightning as lightning  # type: ignore[no-redef, unused-ignore]
    except ImportError as error:
        raise RecipeError(
            "ekgfx.callbacks.lightning needs Lightning, which is not here: pip install lightning"
        ) from error


class PruneAndTeach(lightning.Callback):  # type: ignore[misc, unused-ignore]  # Any to a checker without Lightning
    """Prunes a network at the start of an epoch; its optimizers go on with it, and what it was teaches it.

    Args:
        flops: the budget: the fraction of the MACs that is kept, or an amount; or give `params`.
        epoch: before which epoch (from 0) the network is cut.
        network: name of the LightningModule's attribute that is pruned; None where it has one module with parameters.
        options: of `ekgfx.callbacks.midway.Midway` (batches, teach, …) and of `ekgfx.search` (importance, align, …).

    Raises RecipeError for a network that is not clear, or for several processes.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[PruneAndTeach(flops=0.55, epoch=10)])
    """

    def __init__(
        self, flops: float | str | None = None, *, epoch: int = 0, network: str | None = None, **options: Any
    ) -> None:
        self.midway = Midway(flops=flops, **options)
        self.epoch, self.network = epoch, network
        self._hook: Any = None

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Cuts the network when it is time."""
        if self.midway.result is not None or trainer.current_epoch < self.epoch:
            return
        if trainer.world_size > 1:
            raise RecipeError(f"{trainer.world_size} processes train this network; prune it on one device, before that")
        network = getattr(pl_module, self.network or self._found(pl_module))
        self.midway.cut(network, trainer.train_dataloader, trainer.optimizers)
        self._teach(pl_module, network)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """The module is as it came, but for its network."""
        pl_module.__dict__.pop("training_step", None)
        if self._hook is not None:  # it would gather what is computed with gradients, and nobody would look at it
            self._hook.remove()

    def _teach(self, pl_module: Any, network: nn.Module) -> None:
        """Adds the guidance to what training_step returns."""
        step, seen = pl_module.training_step, []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if torch.is_grad_enabled():
                seen.append((Inputs(args, kwargs), output))

        self._hook = network.register_forward_hook(note, with_kwargs=True)

        def taught(*args: Any, **kwargs: Any) -> Any:
            seen.clear()
            loss = step(*args, **kwargs)
            calls = [self.midway.guidance(inputs, output) for inputs, output in seen]
            seen.clear()
            if loss is None or not calls:
                return loss
            guidance = sum(calls) / len(calls)
            return {**loss, "loss": loss["loss"] + guidance} if isinstance(loss, dict) else loss + guidance

        pl_module.__dict__["training_step"] = taught

    @staticmethod
    def _found(pl_module: Any) -> str:
        names = [name for name, child in pl_module.named_children() if any(True for _ in child.parameters())]
        if len(names) != 1:
            told = ", ".join(names) or "none"
            raise RecipeError(f"which module is to be pruned is not clear ({told}); pass network='NAME'")
        return str(names[0])
