"""Weights that no traced call of the model reads: which dimensions of the graphs may meet them.

A head that only a `loss()` method calls, a projection of an optional input, prototypes of a criterion: what the cut
network feeds them with is not known. So every dimension that is as long as one of theirs stays. What the layers of an
unseen `Sequential` hand to each other does not count.
"""

import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd

from ekgfx.axes import Axis, Dims, Expr, axes, freeze
from ekgfx.errors import TraceError

if TYPE_CHECKING:
    from ekgfx.graph.axis_graph import AxisGraph

APART = "_ekgfx_apart"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_STANDARD = frozenset(vars(nn.Module()))
_LOOK_UP = {"getattr", "__getattr__", "_modules", "_parameters", "get_submodule", "get_parameter"}
"""By these code finds an attribute whose name it puts together."""


def unread(graphs: Iterable["AxisGraph"]) -> list[str]:
    """The weights that none of the graphs of a model reads, by qualified name."""
    graphs = list(graphs)
    read = set().union(*map(_read, graphs))
    return [name for name in graphs[0].weights.values() if name not in read]


def _read(graph: "AxisGraph") -> dict[str, None]:
    """The weights of which something is made. `0 * weight.sum()` makes nothing of them: so code touches what it did not
    use, for distributed training waits for every gradient."""
    touched: set[fx.Node] = set()  # of these only products with 0 are made
    for node in reversed(graph.graph.nodes):
        if node.users and all(user in touched or _is_zero(user) for user in node.users):
            touched.add(node)
    nodes = (node for node in graph.graph.nodes if node.name in graph.weights and node.users)
    return dict.fromkeys(graph.weights[node.name] for node in nodes if node not in touched)


def _is_zero(node: fx.Node) -> bool:
    """Whether a node is a product with the number 0."""
    products = (torch.ops.aten.mul.Tensor, torch.ops.aten.mul.Scalar)
    return node.target in products and any(type(value) in (int, float) and value == 0 for value in node.args)


def settle(graph: "AxisGraph") -> tuple[dict[str, list[str]], list[str], int]:
    """Freeze what is not known of weights that a graph does not read, once the rules have spoken.

    Only what the first graph reads has a worth and a cost that a search can see. What no graph reads may meet any
    dimension of its length.

    Returns:
        way → weights that the graph of this way reads and the first one does not; weights that no graph reads (but for
        those that are unused); how many parameters could be pruned if these held nothing back.
    """
    dims, here, never = graph.weight_dims(), _read(graph), unread(graph.graphs)
    for name in never:
        for dim in dims[name]:
            freeze(dim, f"{name} is not used by what was traced")
    only: dict[str, list[str]] = {}
    seen = {axis for name in here for dim in dims[name] for axis in axes(dim)}
    for other in graph.others:
        for name in (name for name in _read(other) if name not in here):
            if not any(name in names for names in only.values()):
                only.setdefault(str(other.way), []).append(name)
            for axis in (axis for dim in dims[name] for axis in axes(dim) if axis not in seen):
                axis.frozen = axis.frozen or f"only {other.way} uses {name}: its worth and cost are not seen"
    unseen = [name for name in never if name not in graph.unused and _is_state(graph.model, name)]
    graph.dead = dead(graph.model, unseen)
    unseen = [name for name in unseen if name not in graph.dead]
    could_be = graph.prunable_parameters() if unseen else 0
    for axis, name in may_meet(graph.model, unseen, _by_length(graph.graphs, never), dims).items() if unseen else ():
        freeze(axis, f"may meet {name}, which is not used by what was traced")
    return only, unseen, could_be


def dead(model: nn.Module, unseen: Collection[str]) -> list[str]:
    """Those unseen weights that no code of the model's own classes names, outside of what builds the modules: nothing
    that comes with the model can feed them. (A method that is called elsewhere would name its head.)"""
    names, pieces = set[str](), set[str]()
    for kind in {type(module) for module in model.modules()}:
        if not kind.__module__.startswith("torch."):
            for found, into in zip(_named_by(kind), (names, pieces), strict=True):
                into |= found

    def named(owner: nn.Module, attribute: str) -> bool:
        return (
            attribute in names
            or any(piece in attribute for piece in pieces)
            or any(attribute in _texts(value) for key, value in vars(owner).items() if key not in _STANDARD)
        )

    return [n for part, held in parts(model, unseen).items() if not _is_reached(model, part, named) for n in held]


def _is_reached(model: nn.Module, part: str, named: Callable[[nn.Module, str], bool]) -> bool:
    """Whether code may reach a part: it names it, or a container that holds it under a name or number of its own."""
    while part:
        path, _, attribute = part.rpartition(".")
        owner = model.get_submodule(path)
        if not attribute.isdigit() and named(owner, attribute):
            return True
        if not isinstance(owner, _CONTAINERS):
            return False
        part = path
    return True


def _texts(value: Any) -> Collection[Any]:
    """The texts that an attribute of a module holds, by which its code may look others up."""
    if isinstance(value, str):
        return (value,)
    if isinstance(value, dict):
        value = [*value, *value.values()]
    return [each for each in value if isinstance(each, str)] if isinstance(value, list | tuple | set) else ()


def _named_by(kind: type) -> tuple[set[str], set[str]]:
    """Names and texts in the methods of a class, but for its constructor; and those texts that may be pieces of a name
    that is put together there (`getattr(self, f"head_{number}")`)."""
    waiting: list[types.CodeType] = []
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, member in vars(base).items():
            function = getattr(member, "__func__", getattr(member, "fget", member))
            if name != "__init__" and isinstance(function, types.FunctionType):
                waiting.append(function.__code__)
    found, pieces = set[str](), set[str]()
    while waiting:
        code = waiting.pop()
        texts = {text for text in code.co_consts if isinstance(text, str) and text}
        found |= {*code.co_names, *texts}
        if not _LOOK_UP.isdisjoint(code.co_names):
            pieces |= {text for text in texts if text.isidentifier()}
        waiting += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
    return found, pieces


def _is_state(model: nn.Module, name: str) -> bool:
    """Whether a weight is more than a counter, or a cache that the model fills itself."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    return bool(getattr(module, leaf).ndim) and leaf not in module._non_persistent_buffers_set


def _by_length(graphs: Iterable["AxisGraph"], but: Collection[str]) -> dict[int, list[Expr]]:
    """All dimensions of the graphs, but for some weights', by their length."""
    found: dict[int, dict[int, Expr]] = {}
    for graph in graphs:
        for place, outputs in graph.tensors.items():
            for dims in [] if graph.weights.get(place) in but else outputs:
                for dim in dims:
                    found.setdefault(dim.size, {})[id(dim)] = dim
    return {length: list(same.values()) for length, same in found.items()}


def parts(model: nn.Module, unseen: Collection[str]) -> dict[str, list[str]]:
    """Unseen weights by the outermost module of which nothing else was seen either, or by their own name."""
    weights = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    found: dict[str, list[str]] = {}
    for name in unseen:
        steps = name.split(".")
        ancestors = (".".join(steps[:end]) for end in range(1, len(steps)))
        whole = (
            a for a in ancestors if all(w in unseen for w in weights if w.startswith(f"{a}.") and _counts(model, w))
        )
        found.setdefault(next(whole, name), []).append(name)
    return found


def _counts(model: nn.Module, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    return bool(getattr(model.get_submodule(module), leaf).ndim)


def released(model: nn.Module, patterns: Sequence[str], unseen: Collection[str]) -> list[str]:
    """The unseen weights that `patterns` name, by weight or module, by name or glob (`*` also matches dots).

    Raises:
        TraceError: a pattern names nothing, or something that the model does use.
    """
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    found: dict[str, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        meant = [name for name in names if any(fnmatchcase(part, pattern) for part in _prefixes(name))]
        if not meant:
            near = get_close_matches(pattern, {part for name in names for part in _prefixes(name)}, 3)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise TraceError(f"unused {pattern!r} names no parameter and no module of {type(model).__name__}{hint}")
        read = next((name for name in meant if name not in unseen and _counts(model, name)), None)
        if read is not None:
            raise TraceError(f"unused {pattern!r} names {read}, which {type(model).__name__} does use: leave it out")
        found |= dict.fromkeys(name for name in meant if name in unseen)
    return list(found)


def _prefixes(name: str) -> list[str]:
    steps = name.split(".")
    return [".".join(steps[: end + 1]) for end in range(len(steps))]


def may_meet(
    model: nn.Module, unseen: Collection[str], lengths: Mapping[int, Sequence[Expr]], weights: Mapping[str, Dims]
) -> dict[Axis, str]:
    """Free axis of the graphs → the unseen weight that it may meet.

    lengths: all dimensions of the graphs by their length. weights: the dimensions of the weights. Where nothing is as
    long as what a layer reads, that may be flattened or concatenated: then those dimensions stay that divide that
    length, or that two of make it up.
    """
    apart = {a for name, d in kept_apart(model) if d < len(weights.get(name, ())) for a in axes(weights[name][d])}
    widths = {name: _widths(model, name, unseen) for name in unseen}
    made = {n for _, outward in widths.values() for n in outward}
    found: dict[Axis, str] = {}
    for name, (inward, outward) in widths.items():
        for n in {*inward, *outward}:
            lengthy = lengths.get(n, ())
            if not lengthy and n in inward and n not in made:
                lengthy = [dim for m in lengths if m > 1 and (n % m == 0 or n - m in lengths) for dim in lengths[m]]
            for axis in {axis for dim in lengthy for axis in axes(dim)} - apart:
                if not axis.frozen and axis.size > 1:
                    found.setdefault(axis, name)
    return found


def keep_apart(pruned: nn.Module, places: Iterable[tuple[str, int]]) -> None:
    """Note on a cut module which dimensions of its weights could not meet unseen ones, as they had other lengths: now
    that they are cut, they may happen to have the same."""
    vars(pruned)[APART] = tuple(sorted({*places, *vars(pruned).get(APART, ())}))


def kept_apart(model: nn.Module) -> Collection[tuple[str, int]]:
    """The dimensions (weight, number) that `keep_apart` noted."""
    return vars(model).get(APART, ())


def _widths(model: nn.Module, name: str, unseen: Collection[str]) -> tuple[set[int], set[int]]:
    """Lengths of what a weight may read, and of what it may be added to or read by, as seen from outside."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    tensor = getattr(module, leaf)
    if isinstance(module, _ConvNd):
        inward, outward = {module.in_channels}, {module.out_channels}
    elif isinstance(module, nn.Linear):
        inward, outward = {module.in_features}, {module.out_features}
    elif not tensor.is_floating_point():
        return set(), set()  # tables of positions, counters
    else:
        inward, outward = set(), {n for n in tensor.shape if n > 1}
    first, last = _ends(model, path, unseen)
    if not inward and not (first or last):
        return set(), set()
    return inward if first else set(), outward if last or not inward else set()


def _ends(model: nn.Module, path: str, unseen: Collection[str]) -> tuple[bool, bool]:
    """Whether a module is the first, and the last, with weights in every Sequential around it of which nothing was
    seen."""
    first = last = True
    steps = path.split(".") if path else []
    for end in range(1, len(steps)):
        outer = ".".join(steps[:end])
        module = model.get_submodule(outer)
        weights = [n for n, t in (*module.named_parameters(), *module.named_buffers()) if t.ndim]
        if isinstance(module, nn.Sequential) and all(f"{outer}.{n}" in unseen for n in weights):
            children = [child for child, inner in module.named_children() if any(True for _ in inner.parameters())]
            first &= children[:1] == [steps[end]]
            last &= children[-1:] == [steps[end]]
    return first, last


def notes(
    model: nn.Module,
    only: Mapping[str, Sequence[str]],
    unseen: Collection[str],
    dead: Collection[str],
    prunable: int,
    could_be: int,
) -> list[str]:
    """What to say of weights that the first graph does not read: those that `only` a further way uses, those that were
    not seen at all, for which `could_be` - `prunable` parameters stay, and those that no code names."""
    found = []
    if dead:
        found.append(
            f"nothing uses {_listed(parts(model, dead))}, as far as the code of the model says: they stay as they are, "
            "and nothing is kept whole for them"
        )
    for way, names in only.items():
        found.append(f"only {way} uses {_listed(parts(model, names))}: cut where the rest of the model is, no further")
    if unseen:
        left = could_be - prunable
        cost = f"{left:,} of {could_be:,} parameters stay whole" if left else "nothing else has to stay whole"
        found.append(
            f"nothing that was traced uses {_listed(parts(model, unseen))}: since it may meet them, {cost}; pass a "
            "call that runs it (also=[…]), or name it as unused (unused=[…], --unused) if nothing does"
        )
    return found


def _listed(names: Iterable[str], most: int = 5) -> str:
    first, rest = [*names][:most], [*names][most:]
    return ", ".join(first) + (f" and {len(rest)} more" if rest else "")
