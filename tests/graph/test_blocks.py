"""Residual blocks that can go: found by hand, and exact without their branch."""

import copy
import random

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ekgfx
from benchmarks.common import listed
from benchmarks.parts.coverage_timm import export
from ekgfx.errors import PlanError
from ekgfx.graph.plan import Plan
from ekgfx.surgery.check import perturb, relative_error


class Plain(nn.Module):
    """relu(x + branch(x)) of what comes out of a ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(width, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.act = nn.Conv2d(6, width, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.b(F.relu(self.norm(self.a(x))))
        out += x
        return self.act(out)


class Convolutions(nn.Module):
    """stem → two blocks → a block that halves, which has no identity → one block → head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 3), Plain(4), Plain(4)
        self.down, self.short, self.three = nn.Conv2d(4, 8, 2, 2), nn.Conv2d(4, 8, 2, 2), Plain(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(F.relu(self.stem(x))))
        x = F.relu(self.down(x) + self.short(x))
        return self.head(self.three(x).mean((2, 3)))


class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


class Layer(nn.Module):
    """Two blocks in one module, with a scale and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.scale1 = nn.LayerNorm(width), Attention(width, 2), Scale(width)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 10), nn.GELU(), nn.Linear(10, width))
        self.bias, self.dropout = nn.Parameter(torch.ones(width)), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.scale1(self.attn(self.norm1(x))))
        return x + self.dropout(self.mlp(self.norm2(x)) + self.bias)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(6, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.layers, self.norm, self.head = nn.ModuleList([Layer(8), Layer(8)]), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Parallel(nn.Module):
    """x + left(x) + right(x), all in the model's own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right, self.head = (nn.Linear(*s) for s in ((3, 6), (6, 6), (6, 6), (6, 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.left(x).relu() + self.right(x).relu())


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Apart(nn.Module):
    """The sum is a module of its own, and the activation is not the same the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.sum, self.head = nn.Linear(3, 6), nn.Linear(6, 6), Sum(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        return self.head(F.silu(self.sum(self.inner(x), x)))


IMAGES, SERIES, FLAT = (3, 8, 8), (5, 6), (3,)
CASES = [
    (Convolutions, IMAGES, ["one", "two", "three"]),
    (Tokens, SERIES, ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp"]),
    (Parallel, FLAT, ["left", "right"]),
    (Apart, FLAT, ["inner"]),
]


def made(kind: type[nn.Module], shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, ekgfx.TracedModel]:
    torch.manual_seed(0)
    model = kind().double().eval()
    perturb(model)
    x = torch.randn(3, *shape, dtype=torch.float64)
    return model, x, ekgfx.trace(model, x[:2])


@pytest.mark.parametrize(("kind", "shape", "names"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_blocks_by_hand(kind, shape, names):
    _, _, traced = made(kind, shape)
    assert list(traced.blocks) == names


def without_by_hand(model: nn.Module, name: str) -> None:
    """Lets the branch of a block add nothing, in the user's own Python."""
    nothing = lambda module, args, out: torch.zeros_like(out)  # noqa: E731
    if isinstance(model, Convolutions):
        model.get_submodule(f"{name}.b").register_forward_hook(nothing)
    elif name.endswith("mlp"):
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.mlp.register_forward_hook(lambda module, args, out: -layer.bias.expand_as(out))
    else:
        model.get_submodule(name).register_forward_hook(nothing)


@pytest.mark.parametrize(("kind", "shape", "names"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_the_graph_without_a_branch_is_what_the_users_python_says(kind, shape, names):
    model, x, traced = made(kind, shape)
    for some in (*([name] for name in names), names):
        other = copy.deepcopy(model)
        for name in some:
            without_by_hand(other, name)
        with torch.no_grad():
            assert relative_error(traced.subnetwork(Plan(dropped=some))(x), other(x)) < 1e-12
            assert relative_error(traced.subnetwork(Plan())(x), model(x)) < 1e-12


def test_what_goes_costs_nothing():
    _, _, traced = made(Convolutions, IMAGES)
    cost, less = traced.cost(), traced.cost(Plan(dropped=("two",)))
    assert cost.macs - less.macs == 36 * (4 * 6 + 6 * 4) * 9
    assert cost.params - less.params == 4 * 6 * 9 + 2 * 6 + 6 * 4 * 9 + 4
    narrow = Plan({"one.a": (0, 2)}, dropped=("two",))
    assert less.macs - traced.cost(narrow).macs == 36 * (4 * 4 + 4 * 4) * 9
    assert traced.layer_macs(narrow)["two.a"] == 0


def test_an_unknown_block_is_refused():
    _, _, traced = made(Convolutions, IMAGES)
    with pytest.raises(
        PlanError, match=r"'tow' is no residual block of this Convolutions that can go; did you mean 'two'"
    ):
        traced.cost(Plan(dropped=("tow",)))


def narrowed(traced: ekgfx.TracedModel, names: list[str]) -> Plan:
    """A plan that drops blocks and keeps two thirds of every group, of those in the branches too."""
    kept = {name: range(0, group.size, 2) for name, group in traced.groups.items()}
    return Plan(kept, dropped=tuple(names))


@pytest.mark.parametrize(
    ("case", "widths", "inplace"),
    [(0, False, False), (1, False, True), (1, True, False), (2, False, False), (3, False, False)],
)
def test_a_module_without_its_branches_is_exact(case, widths, inplace):
    kind, shape, names = CASES[case]
    model, x, traced = made(kind, shape)
    kinds = {name: type(module) for name, module in model.named_modules()}
    some = names[: len(names) // 2] if widths else names
    plan = narrowed(traced, some) if widths else Plan(dropped=some)
    with torch.no_grad():
        wanted = traced.subnetwork(plan)(x)
    cost, blocks = traced.cost(plan), [traced.blocks[name][0] for name in some]
    pruned = ekgfx.prune(model, plan, traced, inplace=inplace)
    with torch.no_grad():
        assert relative_error(pruned(x), wanted) < 1e-12
    assert (pruned is model) == inplace
    assert sum(parameter.numel() for parameter in pruned.parameters()) == cost.params
    for block in blocks:
        assert isinstance(pruned.get_submodule(block.module), kinds[block.module])
        assert not pruned.state_dict().keys() & {*block.weights}
    assert all(replacement.sizes == "any" for replacement in ekgfx.replaced(pruned))
    pruned.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in pruned.parameters())


@pytest.fixture(scope="module")
def shallow():
    """The convolutions without one block, and with half of the other's channels."""
    model, x, traced = made(Convolutions, IMAGES)
    plan = Plan({"one.a": (0, 2, 3)}, structure=traced.groups.digest, dropped=("two",))
    return model, x, traced, plan, ekgfx.prune(model, plan, traced)


def test_it_is_saved_and_loaded(shallow, tmp_path):
    _, x, _, plan, pruned = shallow
    assert Plan.of(pruned).dropped == ("two",)
    assert Plan.from_json(plan.to_json()) == plan
    ekgfx.save(pruned, tmp_path / "out")
    again = ekgfx.load(tmp_path / "out", model=lambda: Convolutions().double(), example_inputs=x[:2])
    assert torch.equal(again(x), pruned(x))
    assert torch.equal(copy.deepcopy(pruned)(x), pruned(x))


def test_it_is_exported(shallow, tmp_path):
    _, x, _, _, pruned = shallow
    single = copy.deepcopy(pruned).float()
    file = ekgfx.export.to_onnx(single, (x[:2].float(),), tmp_path / "net.onnx")
    assert ekgfx.export.check_parity(single, file or tmp_path / "net.onnx", (x.float(),))


def test_the_operators_behind_a_block_are_repaired(shallow):
    model, x, traced, plan, pruned = shallow
    images = torch.randn(80, *IMAGES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fixed = copy.deepcopy(pruned)
    told = ekgfx.repair(fixed, traced, plan, images)
    assert {layer.name for layer in told.layers}.isdisjoint({"two.a", "two.b"})
    assert {"down", "short"} <= {layer.name for layer in told.layers}
    assert told.kept
    with torch.no_grad():
        before, after = ((model(x) - other(x)).square().mean() for other in (pruned, fixed))
    assert after < 0.7 * before


def test_what_the_training_gathered_goes_with_the_block(shallow):
    model, x, _, plan, _ = shallow
    trained = copy.deepcopy(model)
    optimizer = torch.optim.Adam(trained.parameters())
    trained(x).sum().backward()
    optimizer.step()
    again = ekgfx.trace(trained.eval(), x[:2])
    cut = ekgfx.prune(trained, plan, again)
    ekgfx.transfer(optimizer, cut, plan, again)
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in held} == {id(parameter) for parameter in cut.parameters()}
    assert optimizer.state.keys() == {*cut.parameters()}


def test_rounds_add_up(shallow):
    _, x, _, _, pruned = shallow
    again = ekgfx.trace(pruned, x[:2])
    assert list(again.blocks) == ["one", "three"]
    twice = ekgfx.prune(pruned, Plan(dropped=("three",)), again)
    assert Plan.of(twice).dropped == ("three", "two")
    with torch.no_grad():
        assert relative_error(twice(x), again.subnetwork(Plan(dropped=("three",)))(x)) < 1e-12


def one_of_each_module() -> list[str]:
    """A model of every module of timm."""
    found: dict[str, str] = {}
    for name in listed():
        found.setdefault(timm.models.model_entrypoint(name).__module__, name)
    return list(found.values())


@pytest.mark.sweep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", one_of_each_module())
def test_blocks_of_a_model_of_every_module_of_timm_go_exactly(name):
    """A third of the blocks, with half of every group."""
    torch.manual_seed(0)
    model = timm.create_model(name).double().eval()
    perturb(model)
    x, _, _ = export(model)
    traced = ekgfx.trace(model, x)
    if not traced.blocks:
        pytest.skip("it has no residual block")
    rng = random.Random(0)
    kept = {n: sorted(rng.sample(range(g.size), max(1, g.size // 2))) for n, g in traced.groups.items()}
    plan = Plan(kept, dropped=tuple(rng.sample([*traced.blocks], -(-len(traced.blocks) // 3))))
    pruned = ekgfx.prune(model, plan, traced, graphs="allow")
    assert type(pruned).__name__ == type(model).__name__
    assert sum(parameter.numel() for parameter in pruned.parameters()) == traced.cost(plan).params
    batch = torch.cat([x, torch.randn_like(x[:1])])
    with torch.no_grad():
        assert relative_error(pruned(batch), traced.subnetwork(plan)(batch)) < 1e-10
