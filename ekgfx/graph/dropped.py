"""The graph of a model some of whose residual blocks are identities."""

import copy
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from functools import cached_property
from typing import TypeVar

from torch import fx

from ekgfx.errors import PlanError
from ekgfx.graph.axis_graph import AxisGraph
from ekgfx.graph.blocks import Block, find_blocks
from ekgfx.graph.nodes import bind
from ekgfx.graph.propagation import Operation

Graph = TypeVar("Graph", bound=AxisGraph)

Blocks = Mapping[str, Sequence[Block | None]]
"""Name → the block in each graph of a model; None in those that run nothing of it."""


def blocks_of(graph: AxisGraph) -> Blocks:
    """The residual blocks of a model that are blocks in every graph of it that runs them."""
    others = [{block.name: block for block in find_blocks(other)} for other in graph.others]
    found: dict[str, Sequence[Block | None]] = {}
    for block in find_blocks(graph):
        there = [blocks.get(block.name) for blocks in others]
        runs = (_runs(other, block.weights) for other in graph.others)
        if all(twin is not None or not read for twin, read in zip(there, runs, strict=True)):
            found[block.name] = (block, *there)
    return found


def _runs(graph: AxisGraph, weights: Collection[str]) -> bool:
    """Whether a graph reads one of these weights."""
    return any(graph.weights.get(node.name) in weights for node in graph.graph.nodes if node.users)


def without(graph: Graph, blocks: Blocks, names: Collection[str]) -> Graph:
    """The same model where these blocks return what they are given. Axes, and the names of nodes, stay.

    The result's `gone` are the weights that nobody reads any more; neither cost nor sub-networks have them.

    Raises:
        PlanError: a name is no residual block.
    """
    names = dict.fromkeys(names)
    for name in names:
        if name not in blocks:
            near = get_close_matches(name, blocks, 2) or list(blocks)[:2]
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ": it has none"
            raise PlanError(f"{name!r} is no residual block of this {type(graph.model).__name__} that can go{hint}")
    graphs = [
        _without(each, [block for name in names if (block := blocks[name][number]) is not None])
        for number, each in enumerate(graph.graphs)
    ]
    read = set().union(*(_read(each) for each in graphs))
    gone = frozenset().union(*(_read(each) for each in graph.graphs)) - read
    for each in graphs:
        each.gone = gone
        for node in list(each.graph.nodes):
            if each.weights.get(node.name) in gone:
                each.graph.erase_node(node)
        each.weights = {place: name for place, name in each.weights.items() if name not in gone}
    first, *others = graphs
    first.others = tuple(others)
    return first  # type: ignore[return-value]


def _read(graph: AxisGraph) -> frozenset[str]:
    return frozenset(
        graph.weights[node.name] for node in graph.graph.nodes if node.name in graph.weights and node.users
    )


def _without(graph: AxisGraph, blocks: Sequence[Block]) -> AxisGraph:
    """One graph, its weights all there still."""
    other = copy.copy(graph)
    for name in _answers(type(graph)):
        vars(other).pop(name, None)
    other.whole = graph
    done: dict[fx.Node, fx.Node] = {}
    other.graph = _copied(graph.graph, done)
    by_name = {node.name: node for node in graph.graph.nodes}
    stands: dict[fx.Node, fx.Node] = {}  # of blocks one after the other, all but the first stand for its input
    for block in sorted(blocks, key=lambda block: list(by_name).index(block.output)):
        trunk = _argument(by_name[block.join], block.trunk)
        stands[by_name[block.output]] = stands.get(trunk, trunk)
        done[by_name[block.output]].replace_all_uses_with(done[stands[by_name[block.output]]])
    for old in reversed(list(graph.graph.nodes)):
        if old.op == "call_function" and old.users and not done[old].users:
            other.graph.erase_node(done[old])
    left = set(other.graph.nodes)
    other.operations = [
        Operation(done[op.node], bind(done[op.node]), op.call, op.effect)
        for op in graph.operations
        if done[op.node] in left
    ]
    return other


def _answers(kind: type[AxisGraph]) -> list[str]:
    """What such a graph remembers once it was asked for it."""
    known = (item for each in kind.__mro__ for item in vars(each).items())
    return [name for name, value in known if isinstance(value, cached_property)]


def _argument(node: fx.Node, name: str) -> fx.Node:
    argument = bind(node)[name]
    assert isinstance(argument, fx.Node)
    return argument


def _copied(graph: fx.Graph, done: dict[fx.Node, fx.Node]) -> fx.Graph:
    """A copy with the same names. done: old node → new node."""
    other = fx.Graph()
    returned = other.graph_copy(graph, done)
    *_, last = graph.nodes
    done[last] = other.output(returned)
    done[last].meta = {
        **last.meta,
        "updates": {done[n]: b and done[b] for n, b in last.meta.get("updates", {}).items()},
    }
    for old, new in done.items():
        new.name = old.name
    return other
