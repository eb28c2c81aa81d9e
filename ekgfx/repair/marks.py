"""Where a network that is computed node by node can be gone on from: copies of its values, in memory of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

MOST = 250_000_000
"""Elements of all copies. Where there is no room for another one, the network is gone on from the last one before."""


class Marks:
    """Node number → what later nodes read of those before it, batch by batch."""

    def __init__(self) -> None:
        self.kept: dict[int, list[dict[str, Any]]] = {}

    def keep(self, at: int, values: Sequence[Mapping[str, Any]]) -> None:
        """Copies the values before a node, if there is room for them."""
        batches = [*(batch for kept in self.kept.values() for batch in kept), *values]
        if sum(v.numel() for batch in batches for v in batch.values() if isinstance(v, Tensor)) <= MOST:
            self.kept[at] = [copied(batch) for batch in values]

    def drop(self, at: int) -> None:
        """Forgets the values before a node."""
        self.kept.pop(at, None)

    def before(self, at: int) -> int:
        """The last node, not after this one, whose values are kept; 0, the first one, where there is none."""
        return max((mark for mark in self.kept if mark <= at), default=0)

    def after(self, at: int) -> list[int]:
        """The nodes behind this one whose values are kept, in order."""
        return sorted(mark for mark in self.kept if mark > at)

    def values(self, at: int, batch: int) -> dict[str, Any]:
        """What is kept of a batch before a node; nothing is needed before the first."""
        return copied(self.kept[at][batch]) if at in self.kept else {}

    def renew(self, at: int, batch: int, values: Mapping[str, Any]) -> None:
        """Takes other values of a batch before a node."""
        self.kept[at][batch] = copied(values)


def copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values in memory that nothing overwrites."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
