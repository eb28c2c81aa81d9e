"""After the tensors of a module have been cut, make its integers agree with them again.

Three kinds of integers: those of standard layers follow from their weights; those that a layer hands to its operator
(`groups`, `num_groups`, `normalized_shape`) follow from the operator's expressions; and those of any other module that
owns an operator with a recomputed argument (head counts, split sizes …) are found by their old value.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ekgfx.axes import Axis, Prod, Sum, count, counted
from ekgfx.graph import AxisGraph


def _conv(module: Any) -> None:
    module.out_channels = module.weight.shape[0]
    module.in_channels = module.weight.shape[1] * module.groups


def _conv_transposed(module: Any) -> None:
    module.in_channels = module.weight.shape[0]
    module.out_channels = module.weight.shape[1] * module.groups


def _linear(module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def _norm(module: Any) -> None:
    known = module.weight if module.weight is not None else module.running_mean
    if known is not None:
        module.num_features = len(known)


def _group_norm(module: Any) -> None:
    if module.weight is not None:
        module.num_channels = len(module.weight)


def _shape_norm(module: Any) -> None:
    if module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def _embedding(module: Any) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _prelu(module: Any) -> None:
    module.num_parameters = len(module.weight)


def _recurrent(module: Any) -> None:
    module.input_size, module.hidden_size = module.weight_ih_l0.shape[1], module.weight_hh_l0.shape[1]


def _cell(module: Any) -> None:
    module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]


LAYERS: tuple[tuple[type[nn.Module], Callable[[Any], None]], ...] = (
    (_ConvTransposeNd, _conv_transposed),
    (_ConvNd, _conv),
    (nn.Linear, _linear),
    (_NormBase, _norm),
    (nn.GroupNorm, _group_norm),
    (nn.LayerNorm, _shape_norm),
    (nn.RMSNorm, _shape_norm),
    (nn.Embedding, _embedding),
    (nn.PReLU, _prelu),
    (nn.RNNBase, _recurrent),
    (nn.RNNCellBase, _cell),
)


STANDARD = tuple(layer for layer, _ in LAYERS)


@dataclass(frozen=True)
class Choice:
    """An integer attribute (or an element of a tuple of them) whose old value stands for several new ones."""

    module: str
    attribute: str
    position: int | None
    values: tuple[int, ...]

    def take(self, root: nn.Module, value: int) -> None:
        """Set the attribute to one of the values."""
        _assign(root.get_submodule(self.module), self.attribute, self.position, value)


def correct(root: nn.Module, graph: AxisGraph, counts: Mapping[Axis, int]) -> list[Choice]:
    """Correct the integers of a cut module in place.

    Returns the choices that the old values leave open; each is set to its first value, a changed one.
    """
    changes: dict[str, list[_Change]] = {}
    wholes: dict[str, list[_Change]] = {}
    for view in graph.graphs:
        for found_in, into in ((_recomputed(view, counts), changes), (_wholes(view, counts), wholes)):
            for name, found_there in found_in.items():
                into.setdefault(name, []).extend(found_there)
    for name, module in root.named_modules():
        if isinstance(module, STANDARD):
            for change in changes.get(name, ()):
                if change.argument in vars(module):
                    setattr(module, change.argument, tuple(change.new) if isinstance(change.new, list) else change.new)
            next(follow for layer, follow in LAYERS if isinstance(module, layer))(module)
    for view in graph.graphs:
        _bare_norms(root, view, counts)
    owners = {operation.module for view in graph.graphs for operation in view.operations}
    found: list[Choice] = []
    for name, module in root.named_modules():
        if not isinstance(module, STANDARD):
            governor = _governor(name, owners)
            guesses = {old: (*new, old) for old, new in _renamed(wholes.get(governor, [])).items()}
            found += _by_old_value(name, module, guesses | _renamed(changes.get(governor, [])))
    return found


def _bare_norms(root: nn.Module, graph: AxisGraph, counts: Mapping[Axis, int]) -> None:
    """A norm without parameters or statistics is as wide as what it reads."""
    for operation in graph.operations:
        if str(operation.target) in ("aten.instance_norm.default", "aten.group_norm.default"):
            module, read = root.get_submodule(operation.module), graph.dims[operation.args["input"].name]
            name = "num_features" if isinstance(module, _NormBase) else "num_channels"
            if isinstance(module, _NormBase | nn.GroupNorm) and module.weight is None:
                setattr(module, name, count(read[1], counts))


def _governor(name: str, owners: set[str]) -> str:
    """The module whose operators a module's integers are used in: itself, or its nearest ancestor that runs any."""
    while name and name not in owners:
        name = name.rpartition(".")[0]
    return name


@dataclass(frozen=True)
class _Change:
    argument: str
    old: Any
    new: Any


def _recomputed(graph: AxisGraph, counts: Mapping[Axis, int]) -> dict[str, list[_Change]]:
    """Owning module → every integer argument of its operators that follows from expressions, before and after."""
    found: dict[str, list[_Change]] = {}
    for operation in graph.operations:
        for argument, expr in operation.effect.sizes.items():
            change = _Change(argument, counted(expr, {}), counted(expr, counts))
            found.setdefault(operation.module, []).append(change)
    return found


def _wholes(graph: AxisGraph, counts: Mapping[Axis, int]) -> dict[str, list[_Change]]:
    """Owning module → sizes, before and after, of what its operators with recomputed arguments read: a module may
    know the whole, and compute the part that it takes from it, as in `x.split(self.width // 2)`."""
    found: dict[str, list[_Change]] = {}
    for operation in graph.operations:
        if any(counted(expr, {}) != counted(expr, counts) for expr in operation.effect.sizes.values()):
            for node in operation.node.all_input_nodes:
                for dim in graph.dims.get(node.name, ()):
                    if isinstance(dim, Axis | Sum | Prod):
                        change = _Change(node.name, count(dim, {}), count(dim, counts))
                        found.setdefault(operation.module, []).append(change)
    return found


def _renamed(changes: list[_Change]) -> dict[int, tuple[int, ...]]:
    """Old value → the values it stands for now, changed ones first; values that never change are left out."""
    now: dict[int, dict[int, None]] = {}
    for change in changes:
        several = isinstance(change.old, list)
        for old, new in zip(change.old, change.new, strict=True) if several else [(change.old, change.new)]:
            now.setdefault(old, {})[new] = None
    return {old: tuple(sorted(new, key=lambda n: n == old)) for old, new in now.items() if set(new) != {old}}


def _by_old_value(name: str, module: nn.Module, renamed: Mapping[int, tuple[int, ...]]) -> Iterator[Choice]:
    for attribute, value in list(vars(module).items()):
        if type(value) is int:
            elements: list[tuple[int | None, int]] = [(None, value)]
        elif type(value) in (tuple, list) and all(type(v) is int for v in value):
            elements = list(enumerate(value))
        else:
            continue
        for position, old in elements:
            if old in renamed:
                _assign(module, attribute, position, renamed[old][0])
                if len(renamed[old]) > 1:
                    yield Choice(name, attribute, position, renamed[old])


def _assign(module: nn.Module, attribute: str, position: int | None, value: int) -> None:
    if position is not None:
        sequence = list(getattr(module, attribute))
        sequence[position] = value
        setattr(module, attribute, type(getattr(module, attribute))(sequence))
    else:
        setattr(module, attribute, value)
