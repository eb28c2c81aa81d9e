"""How other tools cut half of any network, as their documentation does it; for `coverage.py torch-pruning` and
`torch-kirigami`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Subject:
    """A network, the arguments of a call, and what ekgfx traced of both."""

    model: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    traced: Any

    def outputs(self, network: Any) -> list[Any]:
        """The tensors that come out, in floating point."""
        return mattering(network(*self.args, **self.kwargs))

    def last_layers(self) -> list[Any]:
        """The layers of the model that give its outputs, and must stay as wide as they are."""
        names = {
            place.parameter.rpartition(".")[0]
            for place in self.traced.groups.frozen
            if "output of the model" in place.reason
        }
        return [module for name, module in self.model.named_modules() if name in names]


def mattering(output: Any) -> list[Any]:
    """The tensors of an output in floating point; of transformers' the logits, and neither caches nor hidden states."""
    import torch
    from torch.utils._pytree import tree_leaves

    output = getattr(output, "logits", output)
    return [t for t in tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()]


NAMES = (
    ("qkv",),
    ("query", "key", "value"),
    ("q_proj", "k_proj", "v_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
)


def projections(model: Any) -> Iterator[tuple[Any, tuple[Any, ...], tuple[int, ...]]]:
    """Attention as it is usually named: the module, its projections, and the number of heads of each."""
    for module in model.modules():
        heads = next(
            (getattr(module, n) for n in ("num_heads", "num_attention_heads", "heads") if hasattr(module, n)), None
        )
        if heads is None and hasattr(module, "q_proj"):
            heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
        if not isinstance(heads, int):
            continue
        pairs = getattr(getattr(module, "config", None), "num_key_value_heads", None) or heads
        for names in NAMES:
            if all(hasattr(getattr(module, name, None), "weight") for name in names):
                found = tuple(getattr(module, name) for name in names)
                yield module, found, (heads, pairs, pairs)[: len(found)]


def by_torch_pruning(given: Subject) -> Callable[[], Any]:
    """Torch-Pruning as its timm, transformers and Llama examples do it: magnitude, half of every layer's channels, of
    attention the same of each head, whose widths the modules are told afterwards."""
    import torch_pruning

    attention = list(projections(given.model))
    pruner = torch_pruning.pruner.MetaPruner(
        given.model,
        given.args if given.args else dict(given.kwargs),
        torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=given.last_layers(),
        num_heads={layer: n for _, layers, heads in attention for layer, n in zip(layers, heads, strict=True)},
        output_transform=mattering,
    )

    def apply() -> None:
        pruner.step()
        for module, layers, heads in attention:
            width = layers[0].out_features // (1 if len(layers) > 1 else 3)
            told = {"head_dim": width // heads[0], "attention_head_size": width // heads[0]}
            told |= dict.fromkeys(("attn_dim", "all_head_size"), width)
            for name, value in told.items():
                if isinstance(vars(module).get(name), int):
                    setattr(module, name, value)

    return apply


def by_kirigami(given: Subject) -> Callable[[], Any]:
    """torch-kirigami: every second output of every layer but those that give the outputs. Where it finds no plan for
    all of them, they come one after another, and those are left out with which it finds none.

    (Its own search for candidates, and its `Greedy`, check every channel for itself: 25 and 75 s for ResNet-18.)
    """
    from torch_kirigami import DependencyGraph
    from torch_kirigami.errors import KirigamiError
    from torch_kirigami.pruning import Pruner

    for module in given.model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    graph = DependencyGraph.build(given.model, args=given.args, kwargs=dict(given.kwargs))
    pruner = Pruner(given.model, graph=graph)
    last = {id(layer.weight) for layer in given.last_layers() if hasattr(layer, "weight")}
    wide = {n: w for n, w in given.model.named_parameters() if w.ndim > 1 and len(w) > 1 and id(w) not in last}
    outputs = {name: graph.parameter(name).axis(0).select(range(0, len(weight), 2)) for name, weight in wide.items()}
    try:
        plan = pruner.plan_remove(list(outputs.values()))
    except KirigamiError:
        plan, chosen = None, []
        for output in outputs.values():
            try:
                plan, chosen = pruner.plan_remove([*chosen, output]), [*chosen, output]
            except KirigamiError:
                continue
    return lambda: pruner.apply(plan) if plan is not None else None
