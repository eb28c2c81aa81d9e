"""BatchNorm's statistics after the refit: re-estimated as far as held-out images ask for.

The share of re-estimated statistics is chosen with those of the fitted images, since images that judge must not be in
what they judge. Once it is chosen, the statistics of all images take their place: they are better estimates.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.errors import DataError
from ekgfx.repair.images import Images
from ekgfx.repair.judge import Judgement
from ekgfx.surgery.calibrate import calibrate

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of re-estimated statistics, that are tried."""


@dataclass(frozen=True)
class Settled:
    """share: of re-estimated statistics that was taken; judgement: on held-out images, with statistics of the others;
    note: why nothing was re-estimated."""

    share: float
    judgement: Judgement
    note: str | None = None


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}


def write(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies tensors into the parameters and buffers of these names."""
    own = state(model)
    for name, tensor in weights.items():
        if own[name] is not tensor:
            own[name].copy_(tensor)


def settle(network: nn.Module, judge: Callable[[nn.Module], Judgement], images: Images) -> Settled:
    """Re-estimates as much of the statistics as lowers the held-out error most, in place."""
    own = {name: tensor.clone() for name, tensor in state(network).items()}
    best, share = judge(network), 0.0
    try:
        fitted = _estimated(network, own, images.fit)
    except DataError as error:
        return Settled(0.0, best, f"BatchNorm keeps its statistics: {error}")
    chosen: dict[str, Tensor] = {}
    for blend in SHARES if fitted else ():
        mixed = _mixed(own, fitted, blend)
        write(network, mixed)
        found = judge(network)
        if found.better(best):
            best, share, chosen = found, blend, mixed
    write(network, {**own, **chosen})
    if not share:
        return Settled(0.0, best)
    everything = _estimated(network, {**own, **chosen}, images.whole())
    write(network, _mixed(own, everything, share))
    if best.better(judge(network)):
        write(network, chosen)
    return Settled(share, best)


def _mixed(own: Mapping[str, Tensor], new: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    # of what is not finite (a variance that half precision cannot hold) a share of nothing would still be no number
    return {name: t if share == 1 else torch.lerp(own[name], t, share) for name, t in new.items()}


def _estimated(network: nn.Module, own: Mapping[str, Tensor], batches: list[tuple[Any, ...]]) -> dict[str, Tensor]:
    """Statistics of these images; the network is left with `own`."""
    calibrate(network, [(args,) for args in batches])
    new = {
        name: tensor.clone()
        for name, tensor in state(network).items()
        if tensor.is_floating_point() and not torch.equal(tensor, own[name])
    }
    write(network, own)
    return new
