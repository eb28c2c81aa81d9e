"""How long the value of a node is wanted."""

from collections.abc import Collection, Iterable

from torch import fx


def last_reads(nodes: Iterable[fx.Node], stay: Collection[str] = ()) -> dict[str, list[str]]:
    """Node → names of the nodes whose values can be dropped once it is computed: none of `nodes` reads them later.

    Args:
        nodes: what is computed, in that order. What they read of other nodes can be dropped as well.
        stay: names of nodes whose values are wanted to the end.
    """
    last = {used.name: node.name for node in nodes for used in (node, *node.all_input_nodes)}
    droppable: dict[str, list[str]] = {}
    for name, reader in last.items():
        if name not in stay:
            droppable.setdefault(reader, []).append(name)
    return droppable
