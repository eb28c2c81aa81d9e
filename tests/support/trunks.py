"""A small trunk and what may hang on it; its cut, and the user's own Python with zeroed weights beside it."""

import copy
import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import ekgfx
from ekgfx.surgery.check import perturb, relative_error
from ekgfx.surgery.masked import mask_tensor


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def conv(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class Trunk(nn.Module):
    """Channels a (6), b (10) and a head; subclasses say what else there is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 6), conv(6, 10), nn.Linear(10, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.features(x).mean((2, 3)))


class Auxiliary(Trunk):
    """A head in the middle, in training only, if it is switched on."""

    def __init__(self, on: bool = True) -> None:
        super().__init__()
        self.on, self.aux = on, nn.Sequential(conv(6, 5), nn.Conv2d(5, 4, 1))

    def forward(self, x: Tensor) -> Any:
        middle = self.a(x)
        y = self.head(self.b(middle).mean((2, 3)))
        return (y, self.aux(middle).mean((2, 3))) if self.training and self.on else y


def ready(model: nn.Module) -> nn.Module:
    perturb(model.double().eval())
    return model


def cut(model: nn.Module, *inputs: Any, **options: Any) -> tuple[nn.Module, nn.Module, ekgfx.TracedModel]:
    """The model with every group cut at random, the model with the same entries zeroed, and what was traced."""
    traced = ekgfx.trace(model, inputs or (images(),), **options)
    rng = random.Random(0)
    plan = ekgfx.Plan({n: tuple(sorted(rng.sample(range(g.size), g.size // 2))) for n, g in traced.groups.items()})
    twin, dims, kept = copy.deepcopy(model), traced.weight_dims(), traced.groups.kept(plan)
    with torch.no_grad():
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            tensor.copy_(mask_tensor(tensor, dims[name], kept))
    return ekgfx.prune(model, plan, traced), twin, traced


def same(
    a: nn.Module, b: nn.Module, *args: Any, training: bool = False, method: str = "forward", **kwargs: Any
) -> None:
    outputs = []
    for model in (a, b):
        model = copy.deepcopy(model).train(training)
        torch.manual_seed(1)
        random.seed(1)
        with torch.no_grad():
            outputs.append(model(*args, **kwargs) if method == "forward" else getattr(model, method)(*args, **kwargs))
    assert pytree.tree_structure(outputs[0]) == pytree.tree_structure(outputs[1])
    assert relative_error(*outputs) < 1e-10


class Optional(Trunk):
    """A second input, a second task, another method, and a loss with a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.extra, self.depth, self.project = nn.Linear(7, 6), nn.Conv2d(10, 2, 1), nn.Linear(10, 3)

    def forward(self, x: Tensor, other: Tensor | None = None, task: str = "class") -> Tensor:
        x = self.a(x)
        if other is not None:
            x = x + self.extra(other)[:, :, None, None]
        x = self.b(x)
        return self.head(x.mean((2, 3))) if task == "class" else self.depth(x)

    def loss(self, x: Tensor, target: Tensor) -> Tensor:
        """Calls the model itself, as losses do."""
        y = self(x)
        return functional.mse_loss(y, target) + self.project(self.features(x).mean((2, 3))).square().mean()
