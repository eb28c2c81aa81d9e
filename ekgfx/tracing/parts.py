"""Which parts of a model can be traced alone, where the whole has no graph: the backbone of a detector, say."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ekgfx.graph.asserted import checks_hold
from ekgfx.graph.quiet import quiet
from ekgfx.graph.untouched import untouched

SMALL = 0.1
"""Share of the parameters under which a part is not worth a word."""
MOST = 8
"""Parts that are tried."""
LONG = 120
"""Characters beyond which nobody types an example."""


@dataclass(frozen=True)
class Part:
    """A sub-module that has a graph of its own: the share of the parameters that it holds, and what it was given."""

    share: float
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def example(self) -> str:
        """Python for inputs like those that it was given; "its own inputs" where that is long."""
        one = len(self.args) == 1 and isinstance(self.args[0], Tensor)
        text = _spelled(self.args[0] if one else self.args)
        return _short(text + (f", {_spelled(self.kwargs)}" if self.kwargs else ""))


def further_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Python for a call as `also` takes it; "its own inputs" where that is long."""
    alone = args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args
    return _short(_spelled((args, kwargs) if args and kwargs else kwargs or alone))


def _short(text: str) -> str:
    return text if len(text) <= LONG and "<" not in text else "its own inputs"


def parts(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Part]:
    """The largest sub-modules that have a graph of their own."""
    total = sum(p.numel() for p in model.parameters())
    calls = _calls(model, args, kwargs)
    found: dict[str, Part] = {}
    tried = 0
    waiting = [name for name, _ in model.named_children()]
    while waiting and tried < MOST:
        name = waiting.pop(0)
        module = model.get_submodule(name)
        share = sum(p.numel() for p in module.parameters()) / max(total, 1)
        if share < SMALL:
            continue
        if name in calls:
            tried += 1
            if _has_graph(module, *calls[name]):
                found[name] = Part(share, *calls[name])
                continue
        waiting += [f"{name}.{child}" for child, _ in module.named_children()]
    return found


def _calls(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What every sub-module was given when the model ran; of several calls, the first."""
    seen: dict[str, tuple[Any, Any]] = {}

    def noting(name: str) -> Callable[..., None]:
        def note(_: nn.Module, given: Any, named: Any) -> None:
            seen.setdefault(name, pytree.tree_map_only(Tensor, torch.clone, (given, named)))

        return note

    with torch.no_grad(), untouched(model):  # which also takes the hooks away
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # TorchScript takes no hooks, and has no graph
            module.register_forward_pre_hook(noting(name), with_kwargs=True)
        model(*args, **kwargs)
    return {name: call for name, call in seen.items() if any(True for _ in _tensors(call))}


def _tensors(call: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor))


def _has_graph(module: nn.Module, args: Any, kwargs: Any) -> bool:
    try:
        with torch.no_grad(), untouched(module), checks_hold([]), quiet():
            torch.export.export(module, args, kwargs, strict=False)
    except Exception:  # noqa: BLE001  torch.export raises many types
        return False
    return True


def _spelled(value: Any) -> str:
    """Python for a value, tensors by their shapes."""
    if isinstance(value, Tensor):
        shape = ", ".join(map(str, value.shape))
        if value.is_floating_point():
            return f"torch.randn({shape})" if shape else "torch.randn(())"
        return f"torch.zeros({shape or '()'}, dtype={value.dtype})"
    if type(value) in (list, tuple):
        inside = ", ".join(map(_spelled, value)) + "," * (type(value) is tuple and len(value) == 1)
        return f"[{inside}]" if type(value) is list else f"({inside})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_spelled(each)}" for key, each in value.items()) + "}"
    return repr(value)
