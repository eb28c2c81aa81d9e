"""Constants that the user's Python makes in the precision of its inputs follow it in a forward that is written."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.errors import EkgfxWarning
from tests.support.zeroed import distance, zeroed


class Cached(nn.Module):
    """Heads of a number that its Python knows; numbers in its input's precision, and some in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.up(x).view(x.shape[0], 4, 2)
        scale = torch.tensor([0.1, 0.3], dtype=torch.float64)
        return self.down((heads * torch.tensor([1.3, 0.7], dtype=x.dtype) + scale.sum().to(x.dtype)).flatten(1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_constants_follow_the_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64)
    traced = ekgfx.trace(Cached().double().eval(), x)
    plan = ekgfx.Plan({name: (0, 2) for name, group in traced.groups.items() if group.size == 4})
    assert plan.kept
    with pytest.warns(EkgfxWarning, match="replaced"):
        pruned = ekgfx.prune(traced.model, plan, traced)
    twin = zeroed(traced, plan)
    for training in (False, True):
        networks = (copy.deepcopy(network).to(dtype) for network in (pruned, twin))
        assert distance(*networks, (x,), training=training) < 10 * torch.finfo(dtype).eps
