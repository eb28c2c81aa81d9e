"""A callback of Hugging Face's Trainer that prunes the model while it trains, and teaches it from then on."""

from typing import Any

import torch
from torch import nn

from ekgfx.callbacks.midway import Midway, without_labels
from ekgfx.data.batches import Inputs
from ekgfx.errors import RecipeError

try:
    from transformers import TrainerCallback  # type: ignore[import-not-found, unused-ignore]
except ImportError as error:
    raise RecipeError(
        "ekgfx.callbacks.transformers needs transformers, which is not here: pip install transformers accelerate"
    ) from error


class PruneAndTeach(TrainerCallback):  # type: ignore[misc, unused-ignore]  # Any to a checker without transformers
    """Prunes the Trainer's model in place after a part of the training; the optimizer goes on with it, and what it was
    teaches it: the guidance is added to the loss that the model returns.

    Args:
        flops: the budget: the fraction of the MACs that is kept, or an amount; or give `params`.
        after: part of the steps that are trained before the cut; 0 cuts before the first.
        options: of `ekgfx.callbacks.midway.Midway` (batches, teach, …) and of `ekgfx.search` (importance, align, …).

    Raises RecipeError for several processes or GPUs.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[PruneAndTeach(flops=0.55, after=0.2)])
    """

    def __init__(self, flops: float | str | None = None, *, after: float = 0.0, **options: Any) -> None:
        self.midway = Midway(flops=flops, **options)
        self.after = after
        self._hook: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        """Cuts the model when it is time."""
        if self.midway.result is not None or state.global_step < self.after * state.max_steps:
            return
        if args.world_size > 1 or args.n_gpu > 1:
            raise RecipeError(
                f"{max(args.world_size, args.n_gpu)} devices train this model; prune it on one, before that"
            )
        model, optimizer = found["model"], found["optimizer"]
        self.midway.cut(model, found["train_dataloader"], [getattr(optimizer, "optimizer", optimizer)])
        self._hook = model.register_forward_hook(self._taught, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        """The model is as it came, but smaller."""
        if self._hook is not None:
            self._hook.remove()

    def _taught(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not torch.is_grad_enabled() or getattr(output, "loss", None) is None:
            return None
        output["loss"] = output.loss + self.midway.guidance(Inputs(args, without_labels(kwargs)), output)
        return output
