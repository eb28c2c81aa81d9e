"""The statistics of a sub-network's norms, against what PyTorch says of the same images."""

import copy

import pytest
import torch
from torch import Tensor, nn

import ekgfx
from ekgfx.bank.norms import Settled, statistics
from ekgfx.data.batches import Inputs


class Twice(nn.Module):
    """One norm that is called twice, one that keeps no running averages, one on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(6), nn.BatchNorm2d(6, track_running_stats=False)
        self.head, self.flat = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x)).relu()
        x = self.norm(self.b(x)).relu()
        return self.flat(self.head(self.last(x).mean((2, 3))))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Twice().double().eval()


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1)).double() * 2 + 1


def test_all_in_one_batch_they_are_the_batchs_own(model: nn.Module) -> None:
    """So the network says of each image, alone, what it says of it in that batch."""
    traced, x = ekgfx.trace(model, images(2)), images()
    known = statistics(traced, {}, [Inputs.of(x)])
    assert len(known) == 4
    network = Settled(traced, {}, known)
    expected = traced.subnetwork(batch_stats=True)(x)
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)  # they are kept in float32
    torch.testing.assert_close(torch.cat([network(one) for one in x.split(1)]), network(x), rtol=1e-12, atol=1e-12)
    before = copy.deepcopy(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_first_norm_does_not_see_how_images_are_dealt(model: nn.Module) -> None:
    traced, x = ekgfx.trace(model, images(2)), images()
    values = model.a(x)
    var, mean = torch.var_mean(values, (0, 2, 3), correction=0)
    for sizes in ([24], [5, 5, 5, 9], [1] * 24):
        first = next(iter(statistics(traced, {}, [Inputs.of(part) for part in x.split(sizes)]).values()))
        torch.testing.assert_close(first[0].double(), mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(first[1].double(), var, rtol=1e-6, atol=1e-7)


def test_of_a_cut_network(model: nn.Module) -> None:
    traced, x = ekgfx.trace(model, images(2)), images()
    group = next(iter(traced.groups.values()))
    plan = ekgfx.Plan({group.name: (0, 2, 3)})
    kept = traced.groups.kept(plan)
    network = Settled(traced, kept, statistics(traced, kept, [Inputs.of(x)], rescale=True), rescale=True)
    expected = traced.subnetwork(plan, batch_stats=True, rescale=True)(x)
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)


def test_without_statistics_it_is_evaluation(model: nn.Module) -> None:
    model.last = nn.BatchNorm2d(6).double().eval()
    traced = ekgfx.trace(model, images(2))
    torch.testing.assert_close(Settled(traced, {}, {})(images()), model(images()), rtol=1e-12, atol=1e-12)
