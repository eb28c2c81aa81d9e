"""How to train: the settings, and the optimizer and learning rates that they make."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ekgfx.errors import RecipeError
from ekgfx.settings import recipe

MILESTONES, DECAY = (0.3, 0.6, 0.8), 0.2
"""The paper's schedule: ×0.2 after these parts of the epochs."""


@dataclass(frozen=True)
class Training(recipe.Training):
    """How to train: a recipe's settings and a seed. The defaults are the paper's for CIFAR.

    epochs; batch_size; lr; momentum; weight_decay (on all parameters). optimizer: any name that timm knows ("sgd" is
    with Nesterov momentum). schedule: "multistep" (×0.2 after 30, 60 and 80% of the epochs), "cosine" (to 0) or
    "constant". warmup: epochs of linear warm-up. augment: flips, crops and, with two views, colours. views: augmented
    views per image; None takes 2 with a bank and 1 without, or as many as batches of your own hold. amp: None, or the
    half precision to compute in.
    channels_last: memory format of images and weights. None: while an epoch lasts, on the CPU, where convolutions and
    norms are faster so, for models with convolutions whose forward, backward and loss take it. workers: processes that
    decode images. seed: of shuffle, augmentation and dropout.

    val_fraction: part of the training images, of each class the same, that is not trained on but tells which epoch was
    the best; 0 trains on all of them and keeps the last epoch, as the paper does. patience: epochs without a better
    one after which training ends. ema: decay of a moving average of the weights (timm's ModelEmaV3, which begins with
    less), which then is what is judged and kept. mixup, cutmix: alpha of timm's Mixup; 0 is off.
    """

    epochs: int = 100
    seed: int = 0

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Training":
        """Raises RecipeError for a setting that does not exist."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise RecipeError(f"fine-tuning has no setting {unknown[0]!r}; it has {', '.join(known)}")
        return cls(**settings)

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of all of a model's parameters."""
        return create_optimizer_v2(
            model,
            self.optimizer,
            lr=self.lr,
            weight_decay=self.weight_decay,
            momentum=self.momentum,
            filter_bias_and_bn=False,
        )

    def schedule_of(self, optimizer: torch.optim.Optimizer) -> Scheduler | None:
        """timm's scheduler, stepped at the start of every epoch (counted from 0)."""
        if self.schedule == "constant":
            return None
        warmup: dict[str, Any] = {
            "warmup_t": self.warmup,
            "warmup_lr_init": self.lr / (self.warmup + 1),
            "warmup_prefix": False,
        }
        if self.schedule == "cosine":
            return CosineLRScheduler(optimizer, t_initial=self.epochs, **warmup)
        if self.schedule != "multistep":
            raise RecipeError(f"unknown schedule {self.schedule!r}; use multistep, cosine or constant")
        # timm decays one step before a milestone. The first epoch has the rate asked for, be it the only one.
        milestones = [max(1, round(part * self.epochs)) + 1 for part in MILESTONES]
        return MultiStepLRScheduler(optimizer, milestones, DECAY, **warmup)
