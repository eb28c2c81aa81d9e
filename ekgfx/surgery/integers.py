"""After the tensors of a module have been cut, make its integers agree with them again.

Three kinds of integers: those of standard layers follow from their weights; those that a layer hands to its operator
(`groups`, `num_groups`, `normalized_shape`) follow from the operator's expressions; and those of any other module, or
of the configuration that it holds (head counts, split sizes …), can only be found by their old value. Many an integer
has such a value by chance, so these are choices: whoever makes them sees what they change.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ekgfx.axes import Axis, Prod, Sum, count, counted
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.nodes import callers


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
    if module.proj_size:  # what comes back is the projection
        module.proj_size, module.hidden_size = module.weight_hr_l0.shape


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

Attributes = Mapping[str, Mapping[str, Any]]


AttributePath = tuple[tuple[str, Any], ...]
"""The way from a module to an integer: ("attribute", name), ("key", key) or ("position", index) of what is there."""


@dataclass(frozen=True)
class Choice:
    """An integer whose old value is that of a size that has changed: what the module holds at `place`.

    governor: the module whose operators it is used in, as far as one can tell: the one that holds the module, where
    only that one's operators ask for such a size (`self.block.width`). values: what it may be now, changed ones first
    and the old one last. likely: an operator of the governor asks for the size, or reads it whole.
    """

    module: str
    governor: str
    place: AttributePath
    values: tuple[int, ...]
    likely: bool

    @property
    def old(self) -> int:
        return self.values[-1]

    @property
    def options(self) -> tuple[int, ...]:
        """Its values in the order in which they are tried."""
        return self.values if self.likely else (self.old, *self.values[:-1])

    @property
    def configured(self) -> bool:
        """Whether it is in a configuration that the module holds."""
        return len(self.place) > 1 and self.place[1][0] != "position"

    def now(self, root: nn.Module) -> int:
        """The value that it has."""
        value: Any = root.get_submodule(self.module)
        for step in self.place:
            value = _get(value, step)
        return int(value)

    def take(self, root: nn.Module, value: int) -> None:
        """Set the integer to one of the values."""
        _put(root.get_submodule(self.module), self.place, value)


def correct(root: nn.Module, graph: AxisGraph, counts: Mapping[Axis, int]) -> None:
    """Correct the integers of the standard layers of a cut module in place."""
    changes = _of_all(_recomputed, graph, counts)
    for name, module in root.named_modules():
        if isinstance(module, STANDARD):
            for change in changes.get(name, ()):
                if change.argument in vars(module):
                    setattr(module, change.argument, tuple(change.new) if isinstance(change.new, list) else change.new)
            next(follow for layer, follow in LAYERS if isinstance(module, layer))(module)
    for view in graph.graphs:
        _bare_norms(root, view, counts)


def _of_all(
    find: Callable[[AxisGraph, Mapping[Axis, int]], dict[str, list["_Change"]]],
    graph: AxisGraph,
    counts: Mapping[Axis, int],
) -> dict[str, list["_Change"]]:
    """What `find` finds in all graphs of a model, by module."""
    found: dict[str, list[_Change]] = {}
    for view in graph.graphs:
        for name, changes in find(view, counts).items():
            found.setdefault(name, []).extend(changes)
    return found


def choices_of(root: nn.Module, graph: AxisGraph, counts: Mapping[Axis, int], before: Attributes) -> list[Choice]:
    """The integers of a cut module's other modules that may have to change, with their values `before` the cut."""
    changes, wholes, frames = (_of_all(find, graph, counts) for find in (_recomputed, _wholes, _frames))
    owners = {operation.module for view in graph.graphs for operation in view.operations}
    found = []
    for name, module in root.named_modules():
        if isinstance(module, STANDARD):
            continue
        governor, holder = _governor(name, owners), name.rpartition(".")[0]
        known = [changes.get(governor, []), wholes.get(governor, []), frames.get(governor, []), frames.get(name, [])]
        sure = _renamed(known[0])
        likely = _renamed(known[1]) | sure
        outer = {old: values for old, values in _renamed(changes.get(holder, [])).items() if old not in likely}
        renamed: dict[int, dict[int, None]] = {old: dict.fromkeys(values) for old, values in (sure | outer).items()}
        for some in known[1:]:
            for old, values in _renamed(some).items():
                renamed.setdefault(old, {}).update(dict.fromkeys(values))
        for place, old in _integers({**vars(module), **before.get(name, {})}):
            if old in renamed and _reaches(module, place):
                values = (*(value for value in renamed[old] if value != old), old)
                reader = holder if old in outer else governor
                found.append(Choice(name, reader, place, values, old in likely or old in outer))
    return found


def guess(root: nn.Module, graph: AxisGraph, counts: Mapping[Axis, int], before: Attributes) -> None:
    """Set every integer that likely is a width to its first new value, where nothing will be compared."""
    choices = [choice for choice in choices_of(root, graph, counts, before) if choice.likely]
    if any(choice.configured for choice in choices):
        own_configurations(root)
    for choice in choices:
        choice.take(root, choice.values[0])


def own_configurations(root: nn.Module) -> None:
    """Give the modules of `root` copies of the configurations that they hold, shared as they were: others may hold them
    too."""
    copies: dict[int, Any] = {}
    for module in root.modules():
        for name, value in vars(module).items():
            if _configures(value):
                if id(value) not in copies:
                    copies[id(value)] = (copy.copy(value), value)
                vars(module)[name] = copies[id(value)][0]


def _configures(value: Any) -> bool:
    """Whether an attribute is an object or a dict that holds settings."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and any(type(v) is int for v in value.values())
    plain = hasattr(value, "__dict__") and not isinstance(value, nn.Module | Tensor | type) and not callable(value)
    return plain and any(type(v) is int for v in vars(value).values())


def _integers(attributes: Mapping[str, Any]) -> Iterator[tuple[AttributePath, int]]:
    """Every integer among a module's attributes, in their tuples and lists, and in the configurations among them."""
    for name, value in attributes.items():
        if name.startswith("_") and isinstance(value, dict):
            continue  # of nn.Module's own
        yield from _within(value, (("attribute", name),))
        if _configures(value):
            members = value.items() if isinstance(value, dict) else vars(value).items()
            kind = "key" if isinstance(value, dict) else "attribute"
            for member, held in members:
                yield from _within(held, (("attribute", name), (kind, member)))


def _within(value: Any, place: AttributePath) -> Iterator[tuple[AttributePath, int]]:
    if type(value) is int:
        yield place, value
    elif type(value) in (tuple, list) and value and all(type(v) is int for v in value):
        yield from (((*place, ("position", i)), v) for i, v in enumerate(value))


def _reaches(module: nn.Module, place: AttributePath) -> bool:
    value: Any = module
    try:
        for step in place:
            value = _get(value, step)
    except (AttributeError, LookupError, TypeError):
        return False
    return type(value) is int


def _get(value: Any, step: tuple[str, Any]) -> Any:
    kind, key = step
    return getattr(value, key) if kind == "attribute" else value[key]


def _put(holder: Any, place: AttributePath, value: int) -> None:
    (kind, key), *rest = place
    if rest and rest[0][0] == "position":  # a tuple cannot be changed: another one takes its place
        old = _get(holder, (kind, key))
        changed = [value if i == rest[0][1] else v for i, v in enumerate(old)]
        new: Any = type(old)(changed)
    elif rest:
        return _put(_get(holder, (kind, key)), tuple(rest), value)
    else:
        new = value
    if kind == "key":
        holder[key] = new
    else:
        object.__setattr__(holder, key, new) if not isinstance(holder, nn.Module) else setattr(holder, key, new)


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


def _frames(graph: AxisGraph, counts: Mapping[Axis, int]) -> dict[str, list[_Change]]:
    """Module → sizes, before and after, of all that is read or computed while its forward runs: an assertion may know
    them that no operator asks for."""
    found: dict[str, dict[tuple[int, int], _Change]] = {}
    for operation in graph.operations:
        sizes = [_sizes(graph, node, counts) for node in (*operation.node.all_input_nodes, operation.node)]
        for name in callers(operation.node):
            known = found.setdefault(name, {})
            for old, new in (pair for pairs in sizes for pair in pairs if pair[0] != pair[1]):
                known.setdefault((old, new), _Change("", old, new))
    return {name: list(known.values()) for name, known in found.items()}


def _sizes(graph: AxisGraph, node: Any, counts: Mapping[Axis, int]) -> list[tuple[int, int]]:
    return [(count(dim, {}), count(dim, counts)) for dims in graph.tensors.get(node.name, ()) for dim in dims]
