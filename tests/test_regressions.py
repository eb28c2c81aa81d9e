"""Networks that once were cut wrongly, each as small as it could be made."""

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import ekgfx
from ekgfx.verify import check_masked, check_pruned, perturb


def exact(model: nn.Module, plan: dict[str, tuple[int, ...]], *shape: int) -> nn.Module:
    """Prune in float64 by the plan; the masked, the sliced and the pruned network agree."""
    torch.manual_seed(0)
    model = model.double().eval()
    perturb(model)
    x = torch.randn(3, *shape, dtype=torch.float64)
    traced = ekgfx.trace(model, x[:2])
    assert check_masked(traced, ekgfx.Plan(plan), (x,)) < 1e-10
    pruned = ekgfx.prune(model, ekgfx.Plan(plan), traced)
    assert check_pruned(traced, ekgfx.Plan(plan), pruned, (x,)) < 1e-10
    return pruned


class NormWithActivation(nn.Module):
    """A norm layer that runs its activation in a module of its own, in a forward that only a graph can express."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)
        self.norm = BatchNormAct2d(6, act_layer=nn.Sigmoid)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).view(-1, 6, 16).mean(2))


def test_a_norm_with_an_activation_inside_runs_it_once() -> None:
    pruned = exact(NormWithActivation(), {"conv": (1, 4)}, 3, 4, 4)
    assert isinstance(pruned, torch.fx.GraphModule)
