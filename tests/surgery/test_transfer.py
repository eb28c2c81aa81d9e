"""Training goes on with the pruned network as it would have with the original whose cut weights stay zero."""

import copy
from collections.abc import Callable

import pytest
import torch
from timm.optim import Lookahead
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ekgfx
from ekgfx.surgery.masked import mask_tensor

PLAN = ekgfx.Plan({"stem.0": (0, 2, 3, 6), "wide.0": (1, 2, 5, 7, 8)})


def network() -> nn.Module:
    def block(taken: int, given: int) -> nn.Sequential:
        # A bias before a BatchNorm has no gradient but rounding, of which AdamW and RMSprop make whole steps.
        return nn.Sequential(nn.Conv2d(taken, given, 3, padding=1, bias=False), nn.BatchNorm2d(given), nn.ReLU())

    torch.manual_seed(0)
    parts = {"stem": block(2, 8), "wide": block(8, 10), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    net = nn.Sequential()
    for name, part in {**parts, "head": nn.Linear(10, 3)}.items():
        net.add_module(name, part)
    return net.double()


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(6, 2, 5, 5, generator=generator).double(), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, data: list, after: Callable[[], object] = lambda: None
) -> None:
    net.train()
    for images, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
        after()


def masked(net: nn.Module, traced: ekgfx.TracedModel) -> Callable[[], None]:
    """Sets the cut entries of the weights to zero; call it after every step."""
    dims, kept = traced.weight_dims(), traced.groups.kept(PLAN)

    def mask() -> None:
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                parameter.copy_(mask_tensor(parameter, dims[name], kept))

    return mask


def grouped(make: Callable, **options) -> Callable:
    """An optimizer with two groups: vectors do not decay."""

    def build(net: nn.Module) -> torch.optim.Optimizer:
        vectors = [p for p in net.parameters() if p.ndim < 2]
        others = [p for p in net.parameters() if p.ndim >= 2]
        return make([{"params": others}, {"params": vectors, "weight_decay": 0.0, "lr": 0.02}], **options)

    return build


OPTIMIZERS = {
    "sgd": grouped(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": grouped(torch.optim.AdamW, lr=0.01, amsgrad=True, weight_decay=0.01),
    "rmsprop": grouped(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "lookahead": lambda net: Lookahead(torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9), k=2),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_that_of_the_masked_network(name: str, inplace: bool) -> None:
    net = network()
    optimizer = OPTIMIZERS[name](net)
    train(net, optimizer, batches(3, seed=1))
    twin = copy.deepcopy(net)
    other = OPTIMIZERS[name](twin)
    traced = ekgfx.trace(net, batches(1, seed=2)[0][0])
    mask = masked(twin, ekgfx.trace(twin, batches(1, seed=2)[0][0]))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    ekgfx.transfer(optimizer, net, ekgfx.Plan(), traced)  # a plan that leaves all changes nothing

    pruned = ekgfx.prune(net, PLAN, traced, inplace=inplace)
    assert ekgfx.transfer(optimizer, pruned, PLAN, traced) is optimizer
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in pruned.parameters()}
    mask()
    train(pruned, optimizer, batches(5, seed=3))
    train(twin, other, batches(5, seed=3), mask)

    expected = ekgfx.trace(twin, batches(1, seed=2)[0][0]).subnetwork(PLAN).weights
    for key, tensor in pruned.state_dict().items():
        assert torch.allclose(tensor, expected[key], rtol=0, atol=1e-12), key
    if "sgd" in name:  # momenta left behind are another training
        alone = OPTIMIZERS[name](pruned)
        assert alone.state_dict()["state"].keys() != optimizer.state_dict()["state"].keys()


def test_schedulers_other_parameters_and_numbers_stay() -> None:
    net, other = network(), nn.Parameter(torch.ones(8, dtype=torch.float64))
    optimizer = torch.optim.Adam([{"params": net.parameters()}, {"params": [other], "lr": 0.5}])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    other.grad = torch.ones_like(other)
    images, labels = batches(1, seed=1)[0]
    nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()
    kept_as_it_is = optimizer.state[other]["exp_avg"]
    traced = ekgfx.trace(net, images)
    pruned = ekgfx.prune(net, PLAN, traced)
    ekgfx.transfer(optimizer, pruned, PLAN, traced)
    assert optimizer.param_groups[1]["params"][0] is other
    assert optimizer.state[other]["exp_avg"] is kept_as_it_is
    assert all(state["step"].item() == 1 for state in optimizer.state.values())
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 0.05]


def test_factored_moments_of_torchs_adafactor_are_cut_where_they_are_long() -> None:
    net = network()
    optimizer = torch.optim.Adafactor(net.parameters(), lr=0.01)
    train(net, optimizer, batches(2, seed=1))
    rows, columns = (optimizer.state[net.head.weight][key].clone() for key in ("row_var", "col_var"))
    traced = ekgfx.trace(net, batches(1, seed=2)[0][0])
    pruned = ekgfx.prune(net, PLAN, traced)
    ekgfx.transfer(optimizer, pruned, PLAN, traced)
    state = optimizer.state[pruned.head.weight]
    assert torch.equal(state["row_var"], rows)
    assert torch.equal(state["col_var"], columns[:, [1, 2, 5, 7, 8]])
    train(pruned, optimizer, batches(1, seed=3))


def test_a_state_of_an_unknown_shape_is_named_and_nothing_is_changed() -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    train(net, optimizer, batches(1, seed=1))
    optimizer.state[net.head.weight]["row"] = torch.zeros(10)
    traced = ekgfx.trace(net, batches(1, seed=2)[0][0])
    pruned = ekgfx.prune(net, PLAN, traced)
    with pytest.raises(ekgfx.EkgfxError, match=r"'row' of head\.weight has the shape \[10\].*\[3, 10\]"):
        ekgfx.transfer(optimizer, pruned, PLAN, traced)
    assert {*optimizer.state} == {*net.parameters()}
    with pytest.raises(ekgfx.EkgfxError, match=r"stem\.0\.weight .* \[8, 2, 3, 3\], the plan leaves \[4, 2, 3, 3\]"):
        ekgfx.transfer(optimizer, net, PLAN, traced)


AVERAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "timm": lambda net: ModelEmaV3(net, decay=0.9),
    "plain": copy.deepcopy,
}


def updated(average: nn.Module, net: nn.Module) -> None:
    if isinstance(average, AveragedModel):
        average.update_parameters(net)
    elif isinstance(average, ModelEmaV3):
        average.update(net)


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_goes_on_as_that_of_the_masked_network(name: str) -> None:
    net = network()
    average, optimizer = AVERAGES[name](net), OPTIMIZERS["sgd"](net)
    train(net, optimizer, batches(3, seed=1), lambda: updated(average, net))
    images = batches(1, seed=2)[0][0]
    traced = ekgfx.trace(net, images)
    pruned = ekgfx.prune(net, PLAN, traced)
    whole = average if name == "plain" else average.module
    expected = traced.rebound(whole).subnetwork(PLAN)(images)
    mode = whole.training
    moved = ekgfx.transfer(average, pruned, PLAN, traced)
    inner = moved if name == "plain" else moved.module
    assert moved is average or name == "plain"
    assert inner.training == mode and type(inner) is type(pruned)
    assert torch.allclose(inner.eval()(images), expected, rtol=0, atol=1e-12)
    own = [{t.data_ptr() for t in module.state_dict().values()} for module in (inner, pruned)]
    assert not own[0] & own[1]

    before, own = inner.head.weight.clone(), pruned.head.weight
    updated(moved, pruned)
    factor = 1.0 if name == "plain" else 0.9
    assert torch.allclose(inner.head.weight, factor * before + (1 - factor) * own, rtol=0, atol=1e-12)
    with pytest.raises(ekgfx.EkgfxError, match="holds no module with the parameters"):
        ekgfx.transfer(moved, pruned, PLAN, traced)


def test_a_dictionary_of_averages() -> None:
    net = network()
    shadow = {name: parameter.detach() * 2 for name, parameter in net.named_parameters()} | {"decay": torch.ones(())}
    traced = ekgfx.trace(net, batches(1, seed=2)[0][0])
    pruned = ekgfx.prune(net, PLAN, traced)
    ekgfx.transfer(shadow, pruned, PLAN, traced)
    assert all(torch.equal(shadow[name], 2 * parameter) for name, parameter in pruned.named_parameters())
    assert shadow["decay"] == 1
