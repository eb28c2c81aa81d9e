"""Ultralytics' trainer goes on with a pruned network, where it would build the network anew from its YAML file."""

from typing import Any

from torch import nn

from ekgfx.errors import RecipeError


def keep(yolo: Any, pruned: nn.Module | None = None) -> None:
    """Let `yolo.train(...)` train the pruned network itself, in this and in every later call, also one that resumes.

    Args:
        yolo: an `ultralytics.YOLO`, or another of Ultralytics' models.
        pruned: what `ekgfx.prune` made of `yolo.model`; None where it is in its place already.

    Raises:
        RecipeError: when the training begins, for several GPUs (they train in processes that know nothing of this one),
            and for data of another number of classes than the network has.

    Example:
        >>> keep(yolo, ekgfx.prune(yolo.model, plan, traced))  # doctest: +SKIP
        >>> yolo.train(data="my.yaml", epochs=50)  # doctest: +SKIP
    """
    if pruned is not None:
        yolo.model, yolo.predictor = pruned, None

    def begins(trainer: Any) -> None:
        if getattr(trainer, "world_size", 1) > 1:
            raise RecipeError(
                f"{trainer.world_size} processes train this network, and build the unpruned one; pass one device"
            )
        trainer.get_model = lambda cfg=None, weights=None, verbose=True: _kept(yolo.model, weights, trainer)

    yolo.add_callback("on_pretrain_routine_start", begins)  # a trainer calls it before it makes its network


def _kept(network: Any, weights: Any, trainer: Any) -> nn.Module:
    """The network in place of what the trainer would build, with the weights of a checkpoint of it."""
    has, wanted = _classes(network), getattr(trainer, "data", None) or {}
    if has is not None and wanted.get("nc", has) != has:
        raise RecipeError(
            f"the pruned network tells {has} classes apart, and the data have {wanted['nc']}: give the network that "
            "many before it is pruned (yolo.train on these data, say)"
        )
    if isinstance(weights, nn.Module) and weights is not network:
        try:
            network.load_state_dict(weights.state_dict())
        except RuntimeError as error:
            raise RecipeError("the checkpoint is not one of the pruned network: its tensors are others") from error
    return network  # type: ignore[no-any-return]


def _classes(network: Any) -> int | None:
    layers = getattr(network, "model", None)
    last = layers[-1] if isinstance(layers, nn.Sequential) and len(layers) else None
    linear = getattr(last, "linear", None)  # of a classifier
    found = linear.out_features if isinstance(linear, nn.Linear) else getattr(last, "nc", None)
    return found if isinstance(found, int) else None
