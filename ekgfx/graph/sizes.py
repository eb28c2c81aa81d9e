"""Whether a graph holds for inputs of other sizes than the example's.

The export writes the example's sizes into the graph as numbers. The rules say which of them follow from expressions;
what they cannot know is seen by running the model beside the graph.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ekgfx.axes import Axis, Dims, axes, identify
from ekgfx.base.containers import tensors_by_place
from ekgfx.errors import PlanError
from ekgfx.graph import opaque as leaf
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.nodes import op_name
from ekgfx.graph.untouched import untouched

GIVEN_SIZES = frozenset(
    (
        *(
            "zeros",
            "ones",
            "empty",
            "full",
            "new_zeros",
            "new_ones",
            "new_empty",
            "new_full",
            "arange",
            "linspace",
            "eye",
        ),
        *("rand", "randn", "randint", "randperm", "normal", "expand", "repeat", "tile", "repeat_interleave"),
    )
)
"""Operators that make dimensions of sizes that the program gives as numbers."""


def assume(graph: AxisGraph) -> bool:
    """Take all sizes for the inputs' that may be (see `unmet`); whether there were any."""
    found = unmet(graph)
    for axis, known in found.items():
        identify(axis, known)
    graph.sizes_assumed = graph.sizes_assumed or bool(found)
    return bool(found)


def unmet(graph: AxisGraph) -> dict[Axis, Axis]:
    """Dimensions that may be one of the inputs', with that one, by their size alone: the program gave it as a number,
    and they met nothing else (the rows of a table, a tensor of zeros, copies), or nothing but an input. Of equal ones
    the batch goes before, then the first."""
    others = [*graph.weights, *graph.constants, *graph.inputs]
    known = {axis for name in others for dim in graph.dims[name] for axis in axes(dim)} | {graph.batch}
    inputs = [axis for name in graph.inputs for dim in graph.dims[name] for axis in axes(dim)]
    by_size = {axis.size: axis for axis in (*reversed(inputs), graph.batch) if axis.size > 1}
    return {
        axis: by_size[axis.size]
        for operation in graph.operations
        for dims in operation.effect.outputs
        for dim in dims
        for axis in axes(dim)
        if axis.frozen and axis.size in by_size and axis not in known
        if axis.example or op_name(operation.target).split(".")[1:2][0] in GIVEN_SIZES
    }


def settle(graph: AxisGraph, network: Callable[[], Callable[..., Any]]) -> None:
    """Find out by the example twice over whether what may be the batch's size is, where there is any such."""
    if graph.batch not in unmet(graph).values():
        return
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: twice(t, graph.batch.size), graph.example)
    try:
        check_shapes(graph, args, kwargs, network)
    except Exception:  # noqa: BLE001  the user's forward may raise anything; it is said where such a batch comes
        return


def twice(tensor: Tensor, batch: int) -> Tensor:
    """A tensor of a batch with its samples twice; others as they are."""
    return torch.cat([tensor, tensor]) if tensor.ndim and len(tensor) == batch else tensor


def batch_ends_at(graph: AxisGraph) -> str | None:
    """The first operator that reads the batch and has an output without it, by name and module."""

    def has(dims: Dims) -> bool:
        return any(axis.batch for dim in dims for axis in axes(dim))

    for operation in graph.operations:
        read = [d for n in operation.node.all_input_nodes for d in graph.tensors.get(n.name, ())]
        if any(map(has, read)) and not any(map(has, operation.effect.outputs)):
            return op_name(operation.target) + (f" in {operation.module}" if operation.module else "")
    return None


ROUNDING = 1e-2
"""Relative to the largest value: what a graph may differ by from its model, in single precision and below."""


def check_shapes(
    graph: AxisGraph, args: tuple[Any, ...], kwargs: dict[str, Any], network: Callable[[], Callable[..., Any]]
) -> None:
    """The first time that inputs come whose shapes are not the example's, compare the whole graph with the model.

    A number in the graph may be one of the example's sizes, though its rule does not know: the graph would then give
    other values, or those of too few samples. Where numbers that nothing tells apart from the example's sizes are in
    fact those of the inputs, they are so from now on. Batch sizes are looked at once, other sizes each time that they
    are new.

    Args:
        network: makes the whole graph as a function.

    Raises:
        PlanError: the graph computes something else than the model.
    """
    shapes = [tuple(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    example = [tuple(t.shape) for t in pytree.tree_leaves(graph.example) if isinstance(t, Tensor)]
    if shapes == example or len(shapes) != len(example):
        return
    same = graph.batch.size and all(a[1:] == b[1:] for a, b in zip(shapes, example, strict=True))
    known = "another batch" if same else str([shape[1:] if graph.batch.size else shape for shape in shapes])
    if known in graph.checked_shapes:
        return
    graph.checked_shapes.add(known)
    if same:
        args, kwargs = _few(graph, args, kwargs)
    problem = _problem(graph, args, kwargs, network())
    if problem is not None and assume(graph):
        problem = _problem(graph, args, kwargs, network()) and problem
    if problem is None:
        return
    graph.checked_shapes.discard(known)
    lost = batch_ends_at(graph) if same else None
    compared = _said([tuple(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)])
    what = f"batches of another size, such as {compared}" if same else compared
    raise PlanError(
        f"the graph of {type(graph.model).__name__}, traced on inputs of {_said(example)}, does not hold for "
        f"{what}: {problem}{f'; the batch ends at {lost}' if lost else ''}; trace it with an example of "
        "the size that all batches have, or let its forward take sizes from the shapes of its tensors"
    )


def _few(graph: AxisGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Of a large batch twice as many samples as the example has: they tell as much, and a model that wants whole clips
    or pairs takes them, too. Where it is not clear what a sample is, all of them."""
    given, spec = pytree.tree_flatten((args, kwargs))
    example = iter([t for t in pytree.tree_leaves(graph.example) if isinstance(t, Tensor)])
    own = [next(example) if isinstance(t, Tensor) else t for t in given]
    grown = [isinstance(a, Tensor) and a.shape != b.shape for a, b in zip(given, own, strict=True)]
    sizes = {(len(a), len(b)) for a, b, more in zip(given, own, grown, strict=True) if more}
    few = 2 * graph.batch.size
    if len(sizes) != 1 or sizes.pop()[1] != graph.batch.size:
        return args, kwargs
    return pytree.tree_unflatten([a[:few] if more else a for a, more in zip(given, grown, strict=True)], spec)


def _problem(
    graph: AxisGraph, args: tuple[Any, ...], kwargs: dict[str, Any], network: Callable[..., Any]
) -> str | None:
    """What the whole graph computes otherwise than its model in evaluation mode, None where nothing."""
    # The model's own Python may ask for the memory format that it was traced with (`x.view(-1, 400)`).
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.new_empty(t.shape).copy_(t), (args, kwargs))
    device = next(graph.model.parameters(), torch.empty(0)).device
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), untouched(graph.model), leaf.evaluation_mode(graph.model):
        expected = graph.model(*args, **kwargs)
        try:
            problem = _difference(network(*args, **kwargs), expected)
        except (RuntimeError, IndexError) as error:  # a number of the example, somewhere in the graph
            return str(error).partition("\n")[0]
        if problem is not None and "shape" not in problem and _difference(graph.model(*args, **kwargs), expected):
            return None  # the model itself draws values at random
        return problem


def _said(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join("×".join(map(str, shape)) or "a number" for shape in shapes)


def _difference(found: Any, expected: Any) -> str | None:
    """What two outputs differ in, beyond rounding."""
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=False))
    numbers = [len(tensors_by_place(output)) for output in (found, expected)]
    if numbers[0] != numbers[1]:  # a list with an entry for each sample
        return "it returns {} tensors, the model {}".format(*numbers)
    for a, b in pairs:
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape:
                return f"its output has the shape {tuple(a.shape)}, the model's has {tuple(b.shape)}"
            if a.is_floating_point() and a.numel():
                difference, size = (a - b).abs().nan_to_num(), b.abs().nan_to_num(0, 0, 0).max()
                if difference.max() > ROUNDING * size and size > 0:
                    return f"its values differ by {difference.max().item():.1e}, of {size.item():.1e}"
    return None
