"""Networks that once were cut wrongly, each as small as it could be made."""

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import ekgfx
from ekgfx.surgery.check import check_pruned, perturb
from ekgfx.surgery.masked import check_masked


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
    """A norm layer that runs its activation in a module of its own, in a forward that cannot express the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)
        self.norm = BatchNormAct2d(6, act_layer=nn.Sigmoid)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).view(-1, 6, 16).mean(2))


def test_a_norm_with_an_activation_inside_runs_it_once() -> None:
    pruned = exact(NormWithActivation(), {"conv": (1, 4)}, 3, 4, 4)
    assert [replacement.module for replacement in ekgfx.replaced(pruned)] == [""]


class Unread(nn.Module):
    """A part whose result nobody uses, in a forward that cannot express the cut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 1), nn.Linear(6, 2)
        self.aux = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).view(-1, 6, 16).mean(2)
        self.aux(x)
        return self.head(x)


def test_parameters_stay_whose_values_nobody_reads() -> None:
    model = Unread()
    pruned = exact(model, {"conv": (1, 4)}, 3, 4, 4)
    assert ekgfx.replaced(pruned) and isinstance(pruned, Unread)
    assert pruned.state_dict().keys() == model.state_dict().keys()


class LinearAttention(nn.Module):
    """Features are mapped by elu + 1, so one whose weights are zero has the value one in both queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = nn.functional.elu(self.q(x)) + 1, nn.functional.elu(self.k(x)) + 1
        return self.head(q @ (k.transpose(1, 2) @ self.v(x))).mean(1)


def test_a_feature_that_is_cut_contributes_nothing_to_a_product() -> None:
    pruned = exact(LinearAttention(), {"q": (0, 2, 5), "v": (1, 3)}, 3, 4)
    assert pruned.k.out_features == 3


class Standardized(nn.Module):
    """Weights standardized by hand: where inputs are cut, the weight is not zero but minus its mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.b.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return self.head(nn.functional.conv2d(self.a(x).sigmoid(), weight, self.b.bias).amax((2, 3)))


def test_weights_standardized_by_hand_are_those_of_the_kept_inputs() -> None:
    assert exact(Standardized(), {"a": (0, 3, 4), "b": (1, 2)}, 3, 4, 4).b.in_channels == 3


class Whole(nn.Module):
    """`narrow` over the whole dimension, whose length is an argument all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head, self.width = nn.Linear(4, 6), nn.Linear(6, 2), 6

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).narrow(1, 0, self.width))


def test_narrowing_to_the_whole_takes_the_new_length() -> None:
    assert exact(Whole(), {"a": (0, 2, 5)}, 4).width == 3


def test_the_whole_number_of_copies_follows_the_cut() -> None:
    """diffusers gives `output_size`, so that a GPU need not count: StableAudio, UNet3DConditionModel."""

    class Copying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.out = nn.Linear(5, 8), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inside(x).relu()
            return self.out(y.repeat_interleave(3, 1, output_size=3 * y.shape[1]))

    model, x = Copying().double().eval(), torch.randn(4, 5, dtype=torch.float64)
    traced, plan = ekgfx.trace(model, x), ekgfx.Plan({"inside": (0, 3, 4)})
    pruned = ekgfx.prune(model, plan, traced, graphs="forbid")
    assert pruned.out.weight.shape == (3, 9)
    assert check_masked(traced, plan, (x,)) < 1e-12
    torch.testing.assert_close(pruned(x), traced.subnetwork(plan)(x), rtol=0, atol=1e-12)
