"""Residual blocks that a plan drops: the module around the branch runs on without it, and the branch's weights go.

That module keeps its class. Its forward is written anew from the recorded calls, without those of the branch; what is
the block alone returns what it is given. Modules of which nothing is left become `nn.Identity`, single weights None.
"""

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, fx, nn

from ekgfx.axes import Axis
from ekgfx.errors import PruneError
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.blocks import Block
from ekgfx.graph.nodes import bind
from ekgfx.graph.plan import Plan
from ekgfx.rewriting.calls import Calls, hollow
from ekgfx.rewriting.forward import Version, rewrite
from ekgfx.rewriting.missing import Missing, without
from ekgfx.rewriting.patched import put_forward
from ekgfx.rewriting.terms import Recorded
from ekgfx.surgery.recorded import TracedWidths, aligned, record, same_operators
from ekgfx.tracing.traced import TracedModel

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
REASON = "the plan drops "
"""How the reason of a forward begins that was written for a block that is gone."""


def recorded(source: TracedModel, counts: Mapping[Axis, int], twin: nn.Module | None) -> list[Version]:
    """The calls of the model that `source` is, without the blocks that are gone from it, and what the cut makes of
    their sizes; as the trace saw them, with further example inputs, and as they are where the model's Python knows that
    nobody exports it. twin: as in `record`.

    Raises PruneError where that cannot be recorded, or what is left would read what is gone.
    """
    versions: list[Version] = []
    for number, graph in enumerate(source.graphs):
        if graph.way.training or graph.way.method != source.way.method:
            continue
        found = record(source, graph, twin)
        every = [found]
        if found.evaluation.asked:
            with contextlib.suppress(PruneError):  # what it does otherwise may have no graph
                if not same_operators(found, record(source, graph, twin, exported=False, most="")):  # sizes take long
                    every.append(record(source, graph, twin, exported=False))
        entire = source.entire.graphs[number]
        versions += [(_left(source, graph, each), TracedWidths(source.entire, entire, counts, each)) for each in every]
    return versions


def _left(source: TracedModel, graph: AxisGraph, found: Recorded) -> Recorded:
    """What was recorded, without the blocks that are gone. graph: that of `source` which was recorded."""
    if not source.dropped:
        return found
    blocks = {name: source.entire.blocks[name] for name in source.dropped}
    ways = [each.way for each in source.graphs]
    first, training = ways.index(graph.way), replace(graph.way, training=True)
    number = ways.index(training) if training in ways else first
    thin = [
        None if calls is None else without(calls, _missing(calls, source.graphs[i], [b[i] for b in blocks.values()]))
        for calls, i in ((found.evaluation, first), (found.training, number))
    ]
    assert thin[0] is not None
    return replace(found, evaluation=thin[0], training=thin[1])


def _missing(calls: Calls, graph: AxisGraph, blocks: Collection[Block | None]) -> Missing:
    """What of the recorded calls is missing in a graph without blocks."""
    assert graph.whole is not None
    known = aligned(graph.whole, calls)
    nodes = {operation.name: node for node, operation in known.items()}
    left = {operation.name for operation in graph.operations}
    stands, modules = {}, {}
    for block in blocks:
        if block is None:
            continue
        if block.join not in nodes or block.output not in nodes:
            raise PruneError(f"block {block.name}: its sum is not among the calls of {block.module or 'the model'}")
        join, output = nodes[block.join], nodes[block.output]
        if join is not output:
            stands[output] = bind(output)["self"]
        stands[join] = bind(join)[block.trunk]
        modules[join] = modules[output] = block.module
    gone = {node for node, operation in known.items() if operation.name not in left} - stands.keys()
    return Missing(stands, modules, gone, {*known} - gone - stands.keys())


def drop(pruned: nn.Module, source: TracedModel, counts: Mapping[Axis, int], twin: nn.Module | None) -> None:
    """Let the blocks that are gone from `source` be gone from a module that holds their weights still.

    Raises:
        PruneError: the forward of a module around them cannot be written.
    """
    versions = recorded(source, counts, twin)
    modules: dict[str, list[str]] = {}
    for name in sorted(source.dropped):
        for block in source.entire.blocks[name]:
            if block is not None and name not in modules.setdefault(block.module, []):
                modules[block.module].append(name)
    for path, names in modules.items():
        if not versions[0][0].evaluation.of(path):
            continue  # it went with the branch of another block
        try:
            put_forward(pruned.get_submodule(path), rewrite(path, versions, (), f"{REASON}{', '.join(names)}"))
        except PruneError as error:
            raise PruneError(f"{', '.join(names)} cannot be dropped: {error}") from error
    _strip(pruned, source, stay=modules)


def check_droppable(traced: TracedModel, names: Collection[str]) -> None:
    """PruneError where the forward of a module cannot be written without these blocks."""
    drop(hollow(traced.model), traced.left_by(Plan(dropped=tuple(names))), {}, None)


def _strip(pruned: nn.Module, source: TracedModel, stay: Collection[str]) -> None:
    """Take the weights that are gone out of a module, and the modules in which nothing is left, but for those of the
    names in `stay`."""
    modules = dict(pruned.named_modules(remove_duplicate=False))
    dead = {id(_tensor(modules, name)) for name in source.gone}
    read = {graph.weights[node.name] for graph in source.graphs for node in graph.graph.nodes if _read(graph, node)}
    alive = {id(_tensor(modules, name)) for name in read} | {id(p) for p in pruned.parameters()} - dead
    runs = {operation.module for graph in source.graphs for operation in graph.operations}
    emptied: list[str] = []
    for path, module in modules.items():
        held = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        empty = bool(held & dead) and not held & alive and not any(_within(run, path) or run == path for run in runs)
        held_by = any(_within(path, outer) for outer in stay) and not any(_within(inner, path) for inner in stay)
        inside = any(_within(path, outer) for outer in emptied)
        if empty and held_by and path not in stay and not inside and not isinstance(module, CONTAINERS):
            parent, _, child = path.rpartition(".")
            modules[parent]._modules[child] = nn.Identity()
            emptied.append(path)
    for module in modules.values():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) in dead:
                    tensors[name] = None


def _within(path: str, outer: str) -> bool:
    """Whether a module is in another one."""
    return path != outer and (not outer or path.startswith(f"{outer}."))


def _read(graph: AxisGraph, node: fx.Node) -> bool:
    return node.name in graph.weights and bool(node.users)


def _tensor(modules: Mapping[str, nn.Module], name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(modules[path], leaf)
    return tensor
