"""How each peer cuts a network to a budget, as its own documentation does it; for `benchmarks/peers.py referee`.

A peer that is not installed fails in the referee's table by its import error.
"""

import argparse
import copy
import importlib
import io
import sys
from collections.abc import Callable
from typing import Any, Protocol

import onnx
import torch
import torch_pruning
from timm.layers import Conv2dSame
from torch import Tensor, nn


class Contest(Protocol):
    """What a peer is given."""

    @property
    def asked(self) -> argparse.Namespace: ...
    @property
    def seen(self) -> list[tuple[Tensor, Tensor]]: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def example(self) -> Tensor: ...
    def least(self, cut: Callable[[float], Any], steps: int = ...) -> Any: ...


def smallest(cut: Callable[[float], Any], fits: Callable[[Any], bool], steps: int) -> Any:
    """What the smallest ratio that fits makes, by bisection."""
    low, high, best = 0.0, 1.0, None
    for _ in range(steps):
        middle = (low + high) / 2
        if fits(made := cut(middle)):
            high, best = middle, made
        else:
            low = middle
    return cut(high) if best is None else best


def gradients(model: nn.Module, contest: Contest) -> None:
    """Adds up the gradients of the mean cross-entropy over the images, in evaluation mode."""
    model.eval()
    count = sum(len(labels) for _, labels in contest.seen)
    for images, labels in contest.seen:
        (nn.functional.cross_entropy(model(images), labels, reduction="sum") / count).backward()


def by_torch_pruning(importance: Callable[[], Any], *, overall: bool) -> Callable[[Contest], nn.Module]:
    """Torch-Pruning as its ResNet example does it: the classifier ignored, one ratio for all layers or one for all of
    their channels together."""

    def cut(contest: Contest) -> nn.Module:
        def at(ratio: float) -> nn.Module:
            model = copy.deepcopy(contest.model)
            criterion = importance()
            pruner = torch_pruning.pruner.MetaPruner(
                model,
                contest.example,
                criterion,
                global_pruning=overall,
                pruning_ratio=ratio,
                ignored_layers=[layer for layer in model.modules() if isinstance(layer, nn.Linear)],
            )
            if isinstance(criterion, torch_pruning.importance.GroupTaylorImportance):
                gradients(model, contest)
            pruner.step()
            model.zero_grad()
            return model

        result: nn.Module = contest.least(at)
        return result

    return cut


def traceable(model: nn.Module) -> list[str]:
    """Writes TensorFlow's padding out, which symbolic tracing cannot follow; what was replaced.

    Such a convolution pads an even image at the bottom and the right alone.
    """
    found = [name for name, module in model.named_modules() if isinstance(module, Conv2dSame)]
    for name in found:
        old = model.get_submodule(name)
        assert isinstance(old, Conv2dSame) and old.kernel_size == (3, 3) and old.stride == (2, 2)
        new = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=2, bias=False)
        new.weight = old.weight
        model.set_submodule(name, nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), new))
    return found


def as_it_was(model: nn.Module, replaced: list[str]) -> None:
    """Puts those convolutions back, with the weights that they have now."""
    for name in replaced:
        cut = model.get_submodule(name)[1]  # type: ignore[index]
        new = Conv2dSame(cut.weight.shape[1], cut.weight.shape[0], 3, stride=2, bias=False)
        new.weight = cut.weight
        model.set_submodule(name, new)


def by_kirigami(metric: str) -> Callable[[Contest], nn.Module]:
    """torch-kirigami as its ImageNet workflow does it: of the channels inside each residual block the same share, those
    with the least sum of squared weights, or of |weight · gradient|, of their own convolution.

    (Its `Greedy` over all channels checks every removal for itself, and had not ended after nine minutes of one cut of
    ResNet-56.)
    """

    def cut(contest: Contest) -> nn.Module:
        from torch_kirigami import DependencyGraph
        from torch_kirigami.pruning import Pruner

        def at(ratio: float) -> nn.Module:
            model = copy.deepcopy(contest.model).eval()
            replaced = traceable(model)
            if metric == "taylor":
                gradients(model, contest)
            graph = DependencyGraph.build(model, args=(contest.example,))
            pruner = Pruner(model, graph=graph)
            removed = []
            for name, weight in model.named_parameters():
                if weight.ndim == 4 and name.startswith("layer") and name.split(".")[2] in inner(model, name):
                    values = (weight * weight.grad).abs() if metric == "taylor" else weight.detach().square()
                    order = values.detach().flatten(1).sum(1).argsort()
                    lowest = order[: min(int(ratio * len(order)), len(order) - 1)].tolist()
                    if lowest:
                        removed.append(graph.parameter(name).axis(0).select(sorted(lowest)))
            if removed:
                model, _ = pruner.apply(pruner.plan_remove(removed))
            model.zero_grad()
            as_it_was(model, replaced)
            return model

        result: nn.Module = contest.least(at)
        return result

    return cut


def by_osscar(contest: Contest) -> nn.Module:
    """OSSCAR as torch-kirigami's workflow does it: of the channels between two convolutions with nothing but norms and
    activations between them the same share; which ones, and the second's weights, by least squares to the unpruned
    network's values, layer after layer, on all of the images.

    Its share is that of a number of parameters; here it is the least one that is within the budget.
    """
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Pruner

    if not contest.asked.workflows:
        raise ImportError("OSSCAR is in torch-kirigami's source distribution alone: give --workflows")
    sys.path.append(contest.asked.workflows)
    osscar = importlib.import_module("osscar_pruning")
    dense = copy.deepcopy(contest.model).eval()
    replaced = traceable(dense)
    example = (contest.example,)
    pairs, _ = osscar.discover_reconstruction_pairs(DependencyGraph.build(dense, args=example))
    full = {first: len(dense.get_submodule(first).weight) for first in pairs}

    def slim(ratio: float) -> nn.Module:
        model = copy.deepcopy(dense)
        graph = DependencyGraph.build(model, args=example)
        pruner = Pruner(model, graph=graph)
        removed = []
        for first, width in full.items():
            count = min(int(ratio * width), width - 1)
            if count:
                removed.append(graph.parameter(f"{first}.weight").axis(0).select(range(count)))
        if removed:
            model, _ = pruner.apply(pruner.plan_remove(removed))
        as_it_was(model, replaced)
        return model

    shape = contest.least(slim)
    traceable(shape)  # the names are of a network without TensorFlow's padding
    widths = {first: len(shape.get_submodule(first).weight) for first in pairs}
    model, teacher = copy.deepcopy(dense), dense.requires_grad_(False)
    for first, second in pairs.items():
        if widths[first] == full[first]:
            continue
        moments = osscar.collect_reconstruction(model, teacher, second, contest.seen, "cpu", 0, 4096)
        system = moments.system(teacher.get_submodule(second).weight.detach().flatten(1).T, 0.01)
        solution = osscar.solve_osscar(*system, full[first], widths[first], prune_batch=8, swap_steps=5)
        graph = DependencyGraph.build(model, args=example)
        osscar.apply_reconstruction(Pruner(model, graph=graph), first, second, solution)
    as_it_was(model, replaced)
    return model


def inner(model: nn.Module, name: str) -> set[str]:
    """The convolutions of a residual block whose outputs stay inside it."""
    block = model.get_submodule(".".join(name.split(".")[:2]))
    return {"conv1", "conv2"} if hasattr(block, "conv3") else {"conv1"}


def by_onnxsim(method: str) -> Callable[[Contest], onnx.ModelProto]:
    """onnxsim on the exported file: whole channels by their weights' norm, or by Wanda's with the images."""

    def cut(contest: Contest) -> onnx.ModelProto:
        from onnxsim import pruning, simplify

        file = io.BytesIO()
        torch.onnx.export(contest.model, (contest.example[:1],), file, dynamo=False, opset_version=17)
        network, _ = simplify(onnx.load_from_string(file.getvalue()))
        name = network.graph.input[0].name
        images = [{name: image[None].numpy()} for batch, _ in contest.seen for image in batch][:64]

        def at(ratio: float) -> onnx.ModelProto:
            if method == "wanda":
                made = pruning.apply_structured_wanda_pruning(network, calibration_data=images, sparsity=ratio)
            else:
                made = pruning.apply_structured_pruning(network, sparsity=ratio)
            return made

        return contest.least(at)

    return cut


magnitude = torch_pruning.importance.GroupMagnitudeImportance
taylor = torch_pruning.importance.GroupTaylorImportance

CUTS: dict[str, Callable[[Any], nn.Module | onnx.ModelProto]] = {
    "Torch-Pruning, L2, uniform": by_torch_pruning(magnitude, overall=False),
    "Torch-Pruning, L2, global": by_torch_pruning(magnitude, overall=True),
    "Torch-Pruning, Taylor, uniform": by_torch_pruning(taylor, overall=False),
    "Torch-Pruning, Taylor, global": by_torch_pruning(taylor, overall=True),
    "torch-kirigami, L2, uniform": by_kirigami("magnitude"),
    "torch-kirigami, Taylor, uniform": by_kirigami("taylor"),
    "torch-kirigami, OSSCAR": by_osscar,
    "onnxsim, L2": by_onnxsim("magnitude"),
    "onnxsim, Wanda": by_onnxsim("wanda"),
}
