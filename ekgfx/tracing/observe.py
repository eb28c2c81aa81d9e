"""What a model calls when it runs, so that two ways of running it can be compared without tracing both."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ekgfx.graph.ways import Way, undisturbed

# Functions that have a switch between training and evaluation; what they make of their tensors' dimensions is the same.
SWITCHED = {
    "batch_norm",
    "instance_norm",
    "rrelu",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    "multi_head_attention_forward",
    "scaled_dot_product_attention",
}


@dataclass(eq=False)
class Observation:
    """One run. calls: every function of PyTorch that it called and what it was given, but for dropout and the counting
    of batches. output: what it returned. error: what it raised, if it did."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    output: Any = None
    error: Exception | None = None

    def same(self, other: "Observation") -> bool:
        """Whether both called the same, and returned tensors of the same shapes in the same containers."""
        return self.calls == other.calls and _shapes(self.output) == _shapes(other.output)


def observe(model: nn.Module, way: Way, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Observation:
    """Run the model once in the given way. Nothing of it is changed afterwards."""
    seen = Observation()
    weights = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    try:
        with way.entered(model), undisturbed(model), torch.no_grad(), _Recorder(seen.calls, weights):
            seen.output = pytree.tree_map_only(Tensor, torch.clone, model(*args, **kwargs))
    except Exception as error:  # noqa: BLE001  the user's forward may raise anything
        seen.error = error
    return seen


class _Recorder(TorchFunctionMode):
    def __init__(self, calls: list[tuple[Any, ...]], weights: dict[int, str]) -> None:
        super().__init__()
        self.calls, self.weights = calls, weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        counting = tensors and all(t.ndim == 0 and id(t) in self.weights for t in tensors)  # num_batches_tracked
        if "dropout" not in name and name != "__get__" and not counting:
            self.calls.append((func, *map(self._described, tensors if name in SWITCHED else leaves)))
        return func(*args, **kwargs)

    def _described(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return tuple(leaf.shape), leaf.dtype, self.weights.get(id(leaf))
        plain = isinstance(leaf, int | float | complex | str | slice | torch.dtype | type(None))
        return leaf if plain else type(leaf)


def _shapes(output: Any) -> Any:
    leaves, spec = pytree.tree_flatten(output)
    return spec, [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves]
