"""What a model does beside evaluation on the example inputs: training mode, other arguments, other methods.
The oracle is the user's own Python with zeroed weights, in float64, in every one of these ways."""

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import ekgfx
from ekgfx.errors import EkgfxWarning, PruneError
from ekgfx.graph.ways import Way
from ekgfx.surgery.check import relative_error, trains
from tests.support.trunks import Auxiliary, Optional, Trunk, conv, cut, images, ready, same
from tests.support.zeroed import zeros

pytestmark = pytest.mark.filterwarnings("ignore::ekgfx.errors.EkgfxWarning")


class DeepSupervision(Trunk):
    """A list of outputs in training, the last of them in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head = nn.ModuleList([nn.Conv2d(6, 2, 1), nn.Conv2d(10, 2, 1)]), nn.Identity()

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        outputs = [self.heads[0](a)] if self.training else []
        outputs.append(self.heads[1](self.b(a)))
        return outputs if self.training else outputs[-1]


class SharedHead(Trunk):
    """The auxiliary output goes through the layer that the trunk has, which so ties both widths together."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv2d(6, 10, 1)

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        y = self.head(self.b(a).mean((2, 3)))
        return (y, self.head(self.up(a).mean((2, 3)))) if self.training else y


class Flattening(Trunk):
    """The auxiliary head knows its width as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.aux = 6 * 64, nn.Linear(6 * 64, 4)

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        y = self.head(self.b(a).mean((2, 3)))
        return (y, self.aux(a.reshape(-1, self.width))) if self.training else y


class Center(Trunk):
    """Keeps a moving average of its features, and compares them with prototypes, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(7, 10))
        self.register_buffer("center", torch.zeros(10))

    def forward(self, x: Tensor) -> Any:
        features = self.features(x).mean((2, 3))
        if not self.training:
            return self.head(features)
        self.center.mul_(0.9).add_(features.detach().mean(0), alpha=0.1)
        return self.head(features), (features - self.center) @ self.prototypes.T


class TokenDrop(Trunk):
    """In training a learned token stands in place of some positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 6, 1, 1))

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        if self.training:
            a = torch.where(torch.rand(len(x), 1, 8, 8, dtype=a.dtype) < 0.3, self.token, a)
        return self.head(self.b(a).mean((2, 3)))


class RandomDepth(Trunk):
    """Python's own random numbers decide whether a block is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.aux = conv(10, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.features(x)
        if not self.training or random.random() < 0.5:
            x = x + self.block(x)
        return (self.head(x.mean((2, 3))), self.aux(x.mean((2, 3)))) if self.training else self.head(x.mean((2, 3)))


TRAINING = {  # network → size of every group
    Auxiliary: {"a.0": 6, "b.0": 10},
    DeepSupervision: {"a.0": 6, "b.0": 10},
    SharedHead: {"a.0": 6, "b.0": 10},
    Flattening: {"a.0": 6, "b.0": 10},
    Center: {"a.0": 6, "b.0": 10},
    TokenDrop: {"a.0": 6, "b.0": 10},
    RandomDepth: {"a.0": 6, "b.0": 10},
}


@pytest.mark.parametrize("network", TRAINING, ids=lambda network: network.__name__)
def test_what_only_training_runs_is_cut_with_the_trunk(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = ready(network())
    before = copy.deepcopy(model.state_dict())
    pruned, twin, traced = cut(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert type(pruned) is network
    assert {name: group.size for name, group in traced.groups.items()} == TRAINING[network]
    for batch in (2, 5):
        same(pruned, twin, images(batch, 3))
        same(pruned, twin, images(batch, 3), training=True)
    sum(t.square().mean() for t in pytree.tree_leaves(pruned.train()(images(4)))).backward()


def test_the_widths_of_an_auxiliary_head_stay_and_are_named() -> None:
    with pytest.warns(EkgfxWarning, match="only training mode uses aux: cut where"):
        pruned, _, traced = cut(ready(Auxiliary()))
    assert (pruned.aux[0][0].in_channels, pruned.aux[0][0].out_channels) == (3, 5)
    reasons = {f.reason for f in traced.groups.frozen if f.parameter == "aux.0.0.weight" and f.dim == 0}
    assert reasons == {"only training mode uses aux.0.0.weight: its worth and cost are not seen"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ekgfx.trace(ready(Trunk()), images()).notes == ()


def test_a_head_that_is_switched_off_was_not_seen() -> None:
    traced = ekgfx.trace(ready(Auxiliary(on=False)), images())
    assert list(traced.groups) == ["b.0"], "aux may read the 6 channels of a"
    assert "nothing that was traced uses aux" in traced.notes[0]


class Discarding(Auxiliary):
    """Computes its auxiliary head always, and looks at the result in no mode."""

    def forward(self, x: Tensor) -> Tensor:
        middle = self.a(x)
        self.aux(middle)
        return self.head(self.b(middle).mean((2, 3)))


def test_what_is_computed_for_nobody_is_cut_with_the_trunk_too() -> None:
    pruned, twin, traced = cut(ready(Discarding()))
    assert {"a.0", "b.0"} <= set(traced.groups)
    assert type(pruned) is Discarding
    assert traced.notes == ()
    same(pruned, twin, images(3))
    same(pruned, twin, images(3), training=True)


def test_training_for_verification_leaves_gradients_alone() -> None:
    model = ready(Auxiliary())
    model(images()).sum().backward()
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    trains(model, Way(), (images(),), {})
    assert all(p.grad is b or torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


class Keeping(Trunk):
    """Its forward changes weights, buffers and attributes, and draws random numbers of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.last = 0, None
        self.aux = nn.Linear(10, 4)
        self.register_buffer("center", torch.zeros(10))

    def forward(self, x: Tensor) -> Any:
        x = self.features(x).mean((2, 3))
        self.seen, self.last = self.seen + 1, float(random.random())
        if self.training:
            with torch.no_grad():
                self.aux.weight.copy_(functional.normalize(self.aux.weight, dim=1))
            self.center = self.center * 0.9 + x.detach().mean(0) * 0.1
            return self.head(functional.dropout(x)), self.aux(x - self.center)
        return self.head(x)


def test_looking_at_training_mode_changes_nothing() -> None:
    model = ready(Keeping())
    model.a.train()
    state, numbers = (
        copy.deepcopy(model.state_dict()),
        (torch.get_rng_state(), random.getstate(), np.random.get_state()),
    )
    held = {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    traced = ekgfx.trace(model, images())
    assert len(traced.graphs) == 2
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert held == {name: tensor.data_ptr() for name, tensor in model.state_dict(keep_vars=True).items()}
    assert [module.training for module in (model, model.a, model.a[1], model.b)] == [False, True, True, False]
    assert torch.equal(numbers[0], torch.get_rng_state())
    assert numbers[1] == random.getstate()
    assert np.array_equal(numbers[2][1], np.random.get_state()[1])
    assert "forward" not in vars(model)


def test_dropout_and_batch_norm_alone_ask_for_no_second_graph() -> None:
    layers = (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.1), nn.ReLU(), nn.Dropout2d(), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(216, 4)).double().eval()
    assert len(ekgfx.trace(model, images()).graphs) == 1
    assert len(ekgfx.trace(ready(Auxiliary()), images()).graphs) == 2


def test_further_calls_share_the_axes() -> None:
    other, target = torch.randn(2, 7, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    calls = [{"task": "depth"}, ((images(), other), {}), ("loss", images(), target)]
    pruned, twin, traced = cut(ready(Optional()), also=calls)
    assert list(traced.groups) == ["a.0", "b.0"]
    assert not traced.unseen
    assert pruned.extra.out_features == 3
    assert pruned.project.in_features == 5
    for training in (False, True):
        same(pruned, twin, images(), training=training)
        same(pruned, twin, images(), task="depth", training=training)
        same(pruned, twin, images(), other, training=training)
        same(pruned, twin, images(), target, method="loss", training=training)


class Careful(Trunk):
    """Training mode that Python decides by values, with a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Any:
        features = self.features(x).mean((2, 3))
        if self.training and features.sum() > -1e9:
            return self.head(features), self.aux(features)
        return self.head(features)


def test_training_mode_without_a_graph_keeps_what_it_may_read() -> None:
    pruned, twin, traced = cut(ready(Careful()))
    assert list(traced.groups) == ["a.0"]
    assert "training mode was not traced: Careful could not be traced" in traced.notes[0]
    assert "uses aux" in traced.notes[1]
    same(pruned, twin, images(3), training=True)


class Supervised(Trunk):
    def forward(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        if self.training:
            if target is None:
                raise ValueError("targets should be given in training mode")
            return functional.mse_loss(y, target)
        return y


def test_training_mode_that_does_not_run_is_named_and_can_be_shown() -> None:
    traced = ekgfx.trace(ready(Supervised()), images())
    assert traced.notes == ("training mode was not traced: ValueError: targets should be given in training mode",)
    assert list(traced.groups) == ["a.0", "b.0"]
    target = torch.randn(2, 4, dtype=torch.float64)
    pruned, twin, traced = cut(ready(Supervised()), also=[(images(), target)])
    assert [str(graph.way) for graph in traced.others] == ["evaluation mode on also[0]", "training mode on also[0]"]
    same(pruned, twin, images(), target, training=True)


def test_a_batch_that_training_cannot_take_is_named() -> None:
    """One value per channel has no variance; a size that two inputs don't share is no batch, so it is not doubled."""
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double().eval()
    assert list(ekgfx.trace(model, torch.randn(1, 3, dtype=torch.float64)).groups) == ["0"]


class Counting(Trunk):
    """What training does with a number that is not what it was, once the width has changed."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails, self.aux = fails, nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.features(x).mean((2, 3))
        if self.training and self.fails and x.shape[1] < 10:
            raise ValueError("too narrow")
        return self.head(x) / x.shape[1] if self.training and not self.fails else self.head(x)


@pytest.mark.parametrize(("fails", "said"), [(True, "too narrow"), (False, "other is 3, before the cut it was 10")])
def test_verification_runs_training_mode(fails: bool, said: str) -> None:
    """A forward whose training mode counts channels is replaced, or refused."""
    model = ready(Counting(fails))
    traced = ekgfx.trace(model, images(), unused=["aux"])
    plan = ekgfx.Plan({"b.0": (0, 1, 2)})
    with pytest.raises(PruneError, match=said):
        ekgfx.prune(model, plan, traced, graphs="forbid")
    with pytest.warns(EkgfxWarning, match=said):
        pruned = ekgfx.prune(model, plan, traced)
    twin = zeros(model, traced, plan)
    twin.fails = False
    for training in (False, True):
        assert relative_error(pruned.train(training)(images()), twin.train(training)(images())) < 1e-10 or fails
    ekgfx.prune(model, plan, traced, verify=False)


class Doubled(torch.autograd.Function):
    """A gradient that knows the width."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient.reshape(-1, 10)


class Backwards(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(Doubled.apply(self.features(x).mean((2, 3))))


def test_verification_takes_a_step_of_training() -> None:
    model = ready(Backwards())
    traced = ekgfx.trace(model, images())
    with pytest.raises(PruneError, match=r"it does not train: RuntimeError: shape '\[-1, 10\]' is invalid"):
        ekgfx.prune(model, ekgfx.Plan({"b.0": (0, 1, 2)}), traced)


def test_a_model_that_is_cut_in_place_is_cut_alike() -> None:
    model = ready(Auxiliary())
    traced = ekgfx.trace(model, images())
    plan = ekgfx.Plan({"a.0": (0, 2, 5), "b.0": (1, 2)})
    apart = ekgfx.prune(model, plan, traced)
    there = ekgfx.prune(model, plan, traced, inplace=True)
    assert there is model
    same(there, apart, images(3), training=True)
