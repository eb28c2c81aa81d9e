"""BatchNorm's statistics after the refit: corrected or re-estimated, as far as held-out images ask for.

The way and the share of the new statistics are chosen with those of the fitted images, since images that judge must not
be in what they judge. Once they are chosen, the statistics of all images take their place: they are better estimates.
They are the mean of both parts', so that no image is looked at twice.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.data.batches import Inputs
from ekgfx.errors import DataError
from ekgfx.repair.images import Images
from ekgfx.repair.judge import Judgement

SHARES = (1.0, 0.75, 0.5, 0.25)
"""Of new statistics, that are tried, until a smaller one is worse than the one before."""

Estimate = Callable[[list[Any]], Any]
"""Gives the network new statistics by some batches."""


@dataclass(frozen=True)
class Settled:
    """share: of new statistics that was taken; judgement: on held-out images, with statistics of the others; way: how
    they were found; note: why there are none."""

    share: float
    judgement: Judgement
    way: str | None = None
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


def settle(
    network: nn.Module, judge: Callable[[nn.Module], Judgement], images: Images, ways: Mapping[str, Estimate]
) -> Settled:
    """Takes that way's new statistics, and as much of them, as lowers the held-out error most, in place."""
    own = {name: tensor.clone() for name, tensor in state(network).items()}
    best, share, way = judge(network), 0.0, ""
    chosen: dict[str, Tensor] = {}
    statistics: dict[str, Tensor] = {}
    failed: list[str] = []
    for name, estimate in ways.items():
        try:
            fitted = _estimated(network, own, estimate, images.fit)
        except DataError as error:
            failed.append(str(error))
            continue
        last = Judgement(None, None)
        for blend in SHARES if fitted else ():
            mixed = _mixed(own, fitted, blend)
            write(network, mixed)
            found = judge(network)
            if found.better(best):
                best, share, way, chosen, statistics = found, blend, name, mixed, fitted
            elif last.better(found):
                break
            last = found
        write(network, own)
    write(network, chosen)
    if not share:
        note = f"BatchNorm keeps its statistics: {failed[-1]}" if len(failed) == len(ways) else None
        return Settled(0.0, best, note=note)
    write(network, own)
    try:
        held = {**statistics, **_estimated(network, own, ways[way], images.held)}
    except DataError:  # too few of them
        held = statistics
    part = images.held_out / images.used
    write(network, _mixed(own, {name: torch.lerp(t, held[name], part) for name, t in statistics.items()}, share))
    if best.better(judge(network)):
        write(network, chosen)
    return Settled(share, best, way)


def _mixed(own: Mapping[str, Tensor], new: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    # of what is not finite (a variance that half precision cannot hold) a share of nothing would still be no number
    return {name: t if share == 1 else torch.lerp(own[name], t, share) for name, t in new.items()}


def _estimated(
    network: nn.Module, own: Mapping[str, Tensor], estimate: Estimate, batches: list[Inputs]
) -> dict[str, Tensor]:
    """Statistics by these images; the network is left with `own`."""
    estimate([(inputs,) for inputs in batches])
    new = {
        name: tensor.clone()
        for name, tensor in state(network).items()
        if tensor.is_floating_point() and not torch.equal(tensor, own[name])
    }
    write(network, own)
    return new
