"""What is in a training batch, view by view and process by process."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ekgfx.distributed import Team
from ekgfx.evaluation import to_device


def unpacked(batch: Any) -> tuple[Any, Any, Tensor]:
    """Images, labels and sample indices of a batch; a batch without indices has none to look up."""
    index = batch[2] if len(batch) > 2 else torch.empty(0, dtype=torch.long)
    return batch[0], batch[1], index


def side_by_side(images: Any, device: torch.device) -> tuple[Tensor, int]:
    """V views as one batch of V·B, so that BatchNorm sees all of them; and B."""
    views = [to_device(view, device) for view in images]
    return torch.cat(views), len(views[0])


def of_view(output: Any, samples: int, view: int) -> Any:
    """One view's part of every tensor in an output."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor[view * samples : (view + 1) * samples], output)


def own_share(batch: Any, views: int, mates: Team) -> tuple[Any, Any, Tensor]:
    """This process's part of a batch."""
    images, labels, index = unpacked(batch)

    def part(value: Any, dim: int = 0) -> Any:
        def cut(whole: Tensor) -> Tensor:
            return whole.movedim(dim, 0)[mates.part(whole.shape[dim])].movedim(0, dim)

        return pytree.tree_map_only(Tensor, cut, value)

    return part(images, 1 if views > 1 and isinstance(images, Tensor) else 0), part(labels), part(index)
