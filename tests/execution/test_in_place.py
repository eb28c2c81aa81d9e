"""Operators write over what nobody reads any more, and over nothing else."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx


class Net(nn.Module):
    """a is read twice; the norm of b and its ReLU have b to themselves; the sum is read twice; c's view is not c's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        y = F.relu(self.norm(self.b(F.relu(a))))
        y = self.c(y).transpose(2, 3).relu() + a + F.relu(a)
        return self.head((F.silu(y) + y).mean((2, 3)))


def test_only_what_is_read_once_can_be_overwritten() -> None:
    traced = ekgfx.trace(Net().eval(), torch.randn(2, 3, 6, 6))
    names = {node.name: str(node.target).split(".")[1] for node in traced.graph.nodes if node.op == "call_function"}
    found = [(names[node], names[source]) for node, source in traced.overwritable.items()]
    assert found == [("batch_norm", "conv2d"), ("relu", "batch_norm"), ("add", "relu"), ("add", "add"), ("add", "silu")]
    found = [(names[n], names[traced.overwritable[n]]) for n in names if n in traced.overwritable_with_gradients]
    assert found == [("relu", "batch_norm"), ("add", "add")]


def test_values_stay_those_of_the_model() -> None:
    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for inputs in (x, x.contiguous(memory_format=torch.channels_last)):
        expected = copy.deepcopy(model).train()(inputs).detach()
        traced = ekgfx.trace(model.eval(), x)
        network = traced.subnetwork(batch_stats=True)
        wanted = [node.name for node in traced.graph.nodes if node.op == "call_function"]
        for capture in ([], wanted, [w for w in wanted if "relu" in w], [w for w in wanted if "norm" in w]):
            with torch.no_grad():
                output, values = network.run((inputs,), capture=capture)
            torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
            with torch.enable_grad():
                again, kept = network.run((inputs,), capture=capture)
            torch.testing.assert_close(again, output, rtol=0, atol=0)
            assert all(torch.equal(values[name], kept[name]) for name in capture)


def test_gradients_stay_those_of_the_model() -> None:
    """Though the norm and the sums are overwritten here too, the derivatives find all that they read."""
    torch.manual_seed(0)
    model = Net().double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    for inputs in (x, x.contiguous(memory_format=torch.channels_last)):
        trained = copy.deepcopy(model).train()
        expected = torch.autograd.grad(trained(inputs).square().sum(), [*trained.parameters()])
        network = ekgfx.trace(model.eval(), x).subnetwork(batch_stats=True)
        weights = [network.weights[name] for name, _ in model.named_parameters()]
        found = torch.autograd.grad(network(inputs).square().sum(), weights)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
