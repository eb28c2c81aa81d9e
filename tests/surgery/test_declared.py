"""What a pruned model says of its own widths is what they are."""

import pytest
import timm
import torch
from torch import Tensor, nn

import ekgfx


def half(traced: ekgfx.TracedModel) -> ekgfx.Plan:
    return ekgfx.Plan({name: tuple(range(0, group.size, 2)) for name, group in traced.groups.items()})


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_coatnet"])
def test_timm_builds_a_new_head_on_a_pruned_model(name: str) -> None:
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    model = timm.create_model(name).eval()
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    traced = ekgfx.trace(model, x)
    pruned = ekgfx.prune(model, half(traced), traced)
    features = pruned.forward_features(x)
    assert pruned.num_features in features.shape and pruned.num_features < model.num_features
    pruned.reset_classifier(7)
    assert pruned(x).shape == (2, 7)
    classifier = pruned.get_classifier()
    assert classifier.in_features == pruned.head_hidden_size


def test_feature_info_names_the_widths_that_are_left() -> None:
    model = timm.create_model("resnet18").eval()
    x = torch.randn(2, 3, 64, 64)
    traced = ekgfx.trace(model, x)
    pruned = ekgfx.prune(model, half(traced), traced)
    seen = {}
    for entry in model.feature_info:
        name = entry["module"]
        pruned.get_submodule(name).register_forward_hook(lambda *args, name=name: seen.update({name: args[2].shape[1]}))
    pruned(x)
    assert {entry["module"]: entry["num_chs"] for entry in pruned.feature_info} == seen
    assert [entry["num_chs"] for entry in model.feature_info] == [64, 64, 128, 256, 512]


class Announces(nn.Module):
    """Widths under names that say so, and an integer that only looks like one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Linear(8, 5)
        self.num_features, self.in_channels, self.head_hidden_size, self.patch = 8, 3, 8, 8
        self.out_chs = (6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).mean((2, 3)))


class Reads(nn.Module):
    """Uses the width that it declares."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.num_features = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 5), 8

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x).relu()).reshape(-1, self.num_features))


@pytest.mark.parametrize("inplace", [False, True])
def test_a_width_that_the_forward_reads_is_not_taken_for_another_afterwards(inplace: bool) -> None:
    traced = ekgfx.trace(Reads(), torch.zeros(2, 4, 3))
    plan = ekgfx.Plan({"a": (0, 1), "b": (0, 1, 2, 3, 4, 5)})  # 8 become as many as a had, 6, which become 2
    assert ekgfx.prune(traced.model, plan, traced, verify=False, inplace=inplace).num_features == 6


@pytest.mark.parametrize("inplace", [False, True])
def test_only_declared_widths_are_touched(inplace: bool) -> None:
    traced = ekgfx.trace(Announces(), torch.zeros(2, 3, 4, 4))
    pruned = ekgfx.prune(traced.model, ekgfx.Plan({"a": (0, 1), "b": (0, 3, 5)}), traced, inplace=inplace)
    assert (pruned.num_features, pruned.head_hidden_size, pruned.in_channels, pruned.patch) == (3, 3, 3, 8)
    assert pruned.out_chs == (2, 3)


def test_weights_keep_their_memory_format() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    traced = ekgfx.trace(model, torch.zeros(2, 3, 8, 8))
    pruned = ekgfx.prune(model, ekgfx.Plan({"0": (1, 2, 6)}), traced)
    for layer in (pruned[0], pruned[2]):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last) and not layer.weight.is_contiguous()


def test_what_a_module_keeps_of_its_full_width_is_dropped() -> None:
    """LeViT's attention keeps its biases per head from one forward in evaluation mode to the next."""
    model = timm.models.levit.Attention(16, key_dim=8, num_heads=4, resolution=3)
    model.eval()
    x = torch.randn(2, 9, 16)
    model(x)
    traced = ekgfx.trace(model, x)
    (heads,) = [name for name, group in traced.groups.items() if group.size == 4]
    plan = ekgfx.Plan({heads: (1, 3)})
    pruned = ekgfx.prune(model, plan, traced, verify=False)
    torch.testing.assert_close(pruned(x), traced.subnetwork(plan)(x))
