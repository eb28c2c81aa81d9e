"""Recorded calls without some of what was recorded: a residual block returns what it was given.

Every node that is left reads what now stands for a missing one; a call of which nothing is left is not made; one in
which a sum stood that is no more (a module that only adds) is run in its caller.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from ekgfx.errors import PruneError
from ekgfx.rewriting.calls import Calls, ModuleCall
from ekgfx.rewriting.marks import Held, Values


@dataclass(frozen=True)
class Missing:
    """stands: operator → the value that stands for its result from now on; modules: the same → the module that runs on
    without it; gone: operators that nothing wants any more; kept: those that are wanted as ever. Operators that are in
    none of them follow from what they read."""

    stands: Mapping[fx.Node, fx.Node]
    modules: Mapping[fx.Node, str]
    gone: Collection[fx.Node]
    kept: Collection[fx.Node]


def without(calls: Calls, missing: Missing) -> Calls:
    """The calls without what is missing; their graph is changed.

    Raises:
        PruneError: something is left that reads what is missing.
    """
    return replace(calls, root=_Thinning(missing).call(calls.root))


class _Thinning:
    def __init__(self, missing: Missing) -> None:
        self.missing = missing
        self.stands: dict[Any, Any] = {}
        self.dead: set[Any] = set()

    def call(self, call: ModuleCall) -> ModuleCall:
        """The call, thinned; its arguments and results are those of before, as far as they are there."""
        steps = self.steps(call)
        returned = self.values(call.returned)
        if returned is not None and any(self.is_dead(leaf) for leaf in returned.flat):
            raise PruneError(f"{call.path or 'the model'} returns what went with a block")
        return ModuleCall(call.path, self.values(call.passed), call.given, returned, call.results, steps)  # type: ignore[arg-type]

    def steps(self, call: ModuleCall) -> list[fx.Node | ModuleCall]:
        left: list[fx.Node | ModuleCall] = []
        for step in call.steps:
            if isinstance(step, ModuleCall):
                left += self.called(step)
            elif step in self.missing.stands:
                self.put(step, self.missing.stands[step])
            elif step in self.missing.gone or (step not in self.missing.kept and self.reads_dead(step)):
                self.dead.add(step)
            else:
                for source in step.all_input_nodes:
                    if source in self.stands:
                        step.replace_input_with(source, self.now(source))
                if self.reads_dead(step):
                    raise PruneError(f"{step.name} in {call.path or 'the model'} reads what went with a block")
                left.append(step)
        return left

    def called(self, call: ModuleCall) -> list[fx.Node | ModuleCall]:
        """What is left of a call, for its caller."""
        inside = [node for _, node in call.operators()]
        passed = self.values(call.passed)
        assert passed is not None
        around = {self.missing.modules[node] for node in inside if node in self.missing.modules}
        if any(call.path != module and f"{call.path}.".startswith(f"{module}." * bool(module)) for module in around):
            return self.inlined(call)
        kept = any(node in self.missing.kept or node in self.missing.stands for node in inside)
        if not kept and (any(node in self.missing.gone for node in inside) or any(map(self.is_dead, passed.flat))):
            self.bury(call)
            return []
        return [self.call(call)]

    def inlined(self, call: ModuleCall) -> list[fx.Node | ModuleCall]:
        self.alias(call.given, call.passed)
        steps = self.steps(call)
        self.alias(call.results, call.returned)
        return steps

    def alias(self, new: Values | None, old: Values | None) -> None:
        """The values of a call's inside are those of its outside."""
        assert new is not None and old is not None
        for to, source in zip(new.flat, old.flat, strict=True):
            if isinstance(to, fx.Node) and isinstance(source, fx.Node):
                if self.is_dead(source):
                    self.dead.add(to)
                else:
                    self.put(to, source)

    def bury(self, call: ModuleCall) -> None:
        for values in (call.given, call.returned, call.results):
            self.dead.update(leaf for leaf in (values.flat if values else ()) if isinstance(leaf, fx.Node))
        for step in call.steps:
            if isinstance(step, ModuleCall):
                self.bury(step)
            else:
                self.dead.add(step)

    def put(self, node: fx.Node, value: fx.Node) -> None:
        self.stands[node] = self.now(value)

    def now(self, node: Any) -> Any:
        while node in self.stands:
            node = self.stands[node]
        return node

    def is_dead(self, leaf: Any) -> bool:
        return isinstance(leaf, fx.Node) and self.now(leaf) in self.dead

    def reads_dead(self, node: fx.Node) -> bool:
        return any(map(self.is_dead, node.all_input_nodes))

    def values(self, values: Values | None) -> Values | None:
        """Nested values with what now stands for some of them."""
        if values is None:
            return None
        return Values(tuple(map(self.leaf, values.leaves)), values.spec)

    def leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, Held):
            return replace(leaf, nodes=tuple(map(self.leaf, leaf.nodes)))
        return self.now(leaf) if isinstance(leaf, fx.Node) else leaf
