"""What hangs on a parameter stays on it when it is cut, and when it is only copied."""

import pytest
import torch
from torch import Tensor, nn

import ekgfx


class Marked(nn.Parameter):
    """A parameter of a class of its own."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(3, 6), nn.Linear(6, 2)
        self.scale = Marked(torch.rand(6))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x).relu() * self.scale)

    def note(self, gradient: Tensor) -> None:
        self.seen.append(gradient.numel())


KEPT = (1, 4, 5)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def cut(net: Net, inplace: bool) -> nn.Module:
    x = torch.randn(2, 3, dtype=torch.float64)
    return ekgfx.prune(net, ekgfx.Plan({"inner": KEPT}), example_inputs=x, inplace=inplace)


@pytest.mark.parametrize("inplace", [False, True])
def test_attributes_classes_and_frozen_parameters_are_kept(net: Net, inplace: bool) -> None:
    mask = torch.arange(6.0)
    net.scale._no_weight_decay = True
    net.scale.mask = mask
    net.out.bias.group = ["head"]
    net.inner.weight.requires_grad_(False)
    pruned = cut(net, inplace)
    assert type(pruned.scale) is Marked
    assert pruned.scale._no_weight_decay
    assert pruned.scale.mask.tolist() == list(KEPT)
    assert pruned.out.bias.group == ["head"]
    assert not pruned.inner.weight.requires_grad
    assert pruned.scale.requires_grad and pruned.scale.is_leaf
    assert inplace or (net.scale.mask is mask and net.out.bias.group is not pruned.out.bias.group)


@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_are_kept_and_a_method_becomes_that_of_the_copy(net: Net, inplace: bool) -> None:
    accumulated: list[tuple[int, ...]] = []
    net.scale.register_hook(lambda gradient: gradient * 0 + 7)
    net.out.bias.register_hook(lambda gradient: gradient * 0 + 5)  # of a tensor that is not cut
    net.inner.weight.register_hook(net.note)
    net.scale.register_post_accumulate_grad_hook(lambda parameter: accumulated.append(tuple(parameter.shape)))
    pruned = cut(net, inplace)
    pruned(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
    assert pruned.scale.grad.tolist() == [7.0] * 3
    assert pruned.out.bias.grad.tolist() == [5.0] * 2
    assert accumulated == [(3,)]
    assert pruned.seen == [9]
    assert inplace or net.seen == []


def test_a_hook_can_be_removed_from_the_copy(net: Net) -> None:
    net.scale.register_hook(lambda gradient: gradient * 0)
    pruned = cut(net, False)
    pruned.scale._backward_hooks.clear()
    pruned(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
    assert pruned.scale.grad.abs().max() > 0
    net(torch.randn(4, 3, dtype=torch.float64)).sum().backward()
    assert net.scale.grad.abs().max() == 0
