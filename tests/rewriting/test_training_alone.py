"""Networks that do in training what evaluation shows nothing of: a second network follows the first; Python decides by
values, which has no graph. The cut model must train as the user's own Python with zeros does."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from ekgfx.errors import PruneError
from ekgfx.surgery.check import perturb, relative_error
from tests.support.zeroed import zeros

pytestmark = pytest.mark.filterwarnings("ignore::ekgfx.errors.EkgfxWarning")


def assigned(theirs: Tensor, ours: Tensor) -> None:
    theirs.data = theirs.data * 0.9 + ours.data * 0.1


def written_to(theirs: Tensor, ours: Tensor) -> None:
    theirs.data.mul_(0.9).add_(ours.data, alpha=0.1)


def encoder() -> nn.Sequential:
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *pooled, nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)
    )


class Contrast(nn.Module):
    """As MoCo: in training the keys' network follows that of the queries."""

    def __init__(self, follow: Callable[[Tensor, Tensor], None]) -> None:
        super().__init__()
        self.queries, self.keys, self.follow = encoder(), encoder().requires_grad_(False), follow
        self.register_buffer("queue", torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        q = F.normalize(self.queries(x), dim=1)
        if not self.training:
            return q
        with torch.no_grad():
            for ours, theirs in zip(self.queries.parameters(), self.keys.parameters(), strict=True):
                self.follow(theirs, ours)
            k = F.normalize(self.keys(x), dim=1)
        return torch.cat([(q * k).sum(1, keepdim=True), q @ self.queue], 1)


class Prototypes(nn.Module):
    """As SwAV: training normalizes a weight where it stands, and every forward reads it without its history."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.prototypes = encoder(), nn.Linear(4, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.prototypes.weight.data.copy_(F.normalize(self.prototypes.weight.data.clone(), dim=1))
        return F.linear(self.encoder(x), self.prototypes.weight.data)


class Decides(nn.Module):
    """Training has no graph. expresses: its Python there can express a cut, which that of evaluation cannot."""

    def __init__(self, expresses: bool) -> None:
        super().__init__()
        self.body, self.pool, self.head = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Linear(32, 3)
        self.expresses = expresses

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.body(x).relu())
        if self.training:
            x = x * 2 if x.mean() > 0 else x
            if self.expresses:
                return self.head(x.flatten(1))
        return self.head(x.view(-1, 32))


class Flattens(nn.Module):
    """Does the same in both modes, in a model whose training has no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pool, self.out = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(2), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.pool(self.body(x).relu()).view(-1, 32))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Flattens(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.head(x * 3 if self.training and x.abs().max() > 0 else x)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 10, 10, dtype=torch.float64)


def trained_as_its_own(model: nn.Module) -> tuple[nn.Module, ekgfx.TracedModel]:
    """The model, cut; it evaluates and trains as the model with zeros in place of what is cut does, step by step."""
    torch.manual_seed(0)
    model.double().eval()
    perturb(model)
    before, x = copy.deepcopy(model.state_dict()), images(4)
    traced = ekgfx.trace(model, x)
    plan = ekgfx.search(traced, flops=0.6, strategy="uniform", importance="magnitude", rescale=False).plan
    pruned = ekgfx.prune(model, plan, traced)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    twin = zeros(model, traced, plan)
    assert relative_error(pruned(x), twin(x)) < 1e-12
    for x in (images(5), images(3)):
        assert relative_error(pruned.train()(x), twin.train()(x)) < 1e-12
    return pruned, traced


@pytest.mark.parametrize("follow", [assigned, written_to])
def test_a_network_that_follows_is_cut_with_the_one_that_it_follows(follow) -> None:
    pruned, traced = trained_as_its_own(Contrast(follow))
    assert {name: group.size for name, group in traced.groups.items()} == {"queries.0": 8, "queries.5": 6}
    assert pruned.keys[0].out_channels == pruned.queries[0].out_channels < 8
    assert not ekgfx.replaced(pruned)


def test_a_weight_that_is_read_and_written_as_data() -> None:
    pruned, traced = trained_as_its_own(Prototypes())
    assert list(traced.groups) == ["encoder.0", "encoder.5", "encoder.7"]
    assert not ekgfx.replaced(pruned)


def test_training_without_a_graph_stays_the_users_own() -> None:
    pruned, _ = trained_as_its_own(Decides(expresses=True))
    (replacement,) = ekgfx.replaced(pruned)
    assert replacement.module == "" and "own_forward(self, x)" in replacement.source
    assert replacement.reason.endswith("; its training has no graph and stays its own")
    again = copy.deepcopy(pruned)
    x = images(2)
    assert torch.equal(again(x), pruned(x))


def test_training_that_cannot_express_the_cut_is_refused() -> None:
    with pytest.raises(PruneError, match="in training it does something else, which has no graph.*ignore="):
        trained_as_its_own(Decides(expresses=False))


def test_a_module_that_does_the_same_in_training_has_one_forward_for_both() -> None:
    pruned, _ = trained_as_its_own(Around())
    (replacement,) = ekgfx.replaced(pruned)
    assert replacement.module == "inner" and "own_forward" not in replacement.source


class Bootstrap(nn.Module):
    """As BYOL: a method that the training loop calls lets the target follow."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target, self.head = encoder(), encoder(), nn.Linear(4, 2)

    @torch.no_grad()
    def update(self) -> None:
        for ours, theirs in zip(self.online.parameters(), self.target.parameters(), strict=True):
            written_to(theirs, ours)

    def loss(self, x: Tensor) -> Tensor:
        return (self.online(x) - self.target(x.flip(-1)).detach()).square().sum(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.online(x))


def test_a_call_that_writes_to_weights_ties_what_it_writes_with_what_it_reads() -> None:
    torch.manual_seed(0)
    model, x = Bootstrap().double().eval(), images(3)
    perturb(model)
    traced = ekgfx.trace(model, x, also=[("loss", x), ("update",)])
    assert [group.size for group in traced.groups.values()] == [8, 6, 4]
    plan = ekgfx.Plan({group.name: range(1, group.size, 2) for group in traced.groups.values()})
    pruned, twin = ekgfx.prune(model, plan, traced), zeros(model, traced, plan)
    for network in (pruned, twin):
        network.update()
    assert pruned.target[0].out_channels == 4
    assert relative_error(pruned.loss(x), twin.loss(x)) < 1e-12
