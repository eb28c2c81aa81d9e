"""One call of a module as the body of a forward: its operators, its conditions, and what it is for."""

import operator
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from ekgfx.rewriting.calls import ModuleCall
from ekgfx.rewriting.head import Head
from ekgfx.rewriting.lost import lost
from ekgfx.rewriting.marks import Held, Values
from ekgfx.rewriting.spelling import access, attribute, plain, released, variable, written
from ekgfx.rewriting.steps import Step, signs, steps_of
from ekgfx.rewriting.terms import InexpressibleError, Recorded, Terms, Widths


class Writer:
    """Writes one call of a module."""

    def __init__(
        self,
        module: nn.Module,
        path: str,
        recorded: Recorded,
        widths: Widths,
        inline: set[str],
        call: ModuleCall,
        trained: ModuleCall | None,
        objects: dict[str, Any],
        by_size: bool,
    ) -> None:
        self.module, self.path, self.recorded, self.widths, self.inline = module, path, recorded, widths, inline
        self.call, self.trained = call, trained
        self.calls = recorded.evaluation
        self.objects, self.by_size = objects, by_size
        self.fixed = False
        plain = [
            (f"{place}.{name}".lstrip("."), value)
            for place, inner in module.named_modules()
            for name, value in vars(inner).items()
            if isinstance(value, Tensor)
        ]
        weights = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        tensors = [*weights, *plain]
        self.own = {id(tensor): name for name, tensor in reversed(tensors)}
        self.modules = {id(m): name for name, m in reversed([*module.named_modules(remove_duplicate=False)])}
        self.head = Head(module, path, call)
        self.conditions = self.head.conditions()
        self.decided_by_size: dict[str, str] = {}
        self.relations: list[Any] = []  # the same as sympy has them
        self.sizes: dict[str, int] = {}  # those of the example, where it is for no others
        self.notes: dict[str, None] = {}
        self.lines = self._lines()
        self._note_decisions()
        if self.leaves_training:
            self.notes["its training has no graph and stays its own"] = None

    @property
    def leaves_training(self) -> bool:
        """Whether the module, or one whose operators stand here, does something else in training that nobody saw."""
        return bool(self.recorded.others & self.written_here)

    @property
    def written_here(self) -> set[str]:
        """The module, and those in it whose operators stand here."""
        within = f"{self.path}." if self.path else ""
        return {self.path, *(name for name in self.inline if name.startswith(within))}

    def values(self) -> str:
        """What a call must be like, for people."""
        return ", ".join(filter(None, (self.head.values(), *self.decided_by_size.values())))

    def shapes(self) -> dict[str, int]:
        """The sizes of what a call is given, as far as they are numbers."""
        return self.head.shapes(self.widths.length)

    def holds(self, sizes: Mapping[str, int]) -> None:
        """From now on it is for these sizes alone."""
        said = {size: f"{size} == {number}" for size, number in sizes.items()}
        self.conditions |= said
        self.decided_by_size |= said
        self.sizes |= sizes

    def excludes(self, other: "Writer") -> bool:
        """Whether no call is like both."""
        differ = any(other.conditions.get(name, text) != text for name, text in self.conditions.items())
        return differ or self._fails(other) or other._fails(self)

    def _fails(self, other: "Writer") -> bool:
        """Whether the sizes that this one is for decide that the other one is not."""
        numbers = {expr: self.sizes[text] for expr, text in other.terms.known.items() if text in self.sizes}
        return any(relation.subs(numbers) == False for relation in other.relations)  # noqa: E712  sympy's own

    @property
    def alike(self) -> Any:
        """What is equal where two calls are written alike."""
        return self.conditions, self.lines

    def _lines(self) -> list[str]:
        steps = self._steps(self.call)
        others = self._steps(self.trained) if self.trained is not None else None
        lines: list[str] = []
        if others is not None and not self._alike(steps, others):
            lines.append("if self.training:")
            assert self.trained is not None and self.recorded.training is not None
            self.calls = self.recorded.training
            lines += [f"    {line}" for line in self._body(self.trained, others, None)]
            self.calls = self.recorded.evaluation
            others = None
        return lines + self._body(self.call, steps, others)

    def _note_decisions(self) -> None:
        """What of its own Python, and of what is run in its place, is fixed as it was in the example."""
        fixed = {
            line: None
            for calls in (self.recorded.evaluation, self.recorded.training)
            for path, lines in (calls.decided.items() if calls is not None else ())
            if path in self.written_here
            for line in lines
        }
        if fixed:
            self.notes[f"it decides as in the example, where {'; '.join(fixed)}"] = None

    def _decided_by_size(self, call: ModuleCall) -> dict[str, str]:
        """What of the sizes that it is given decides the way through its own Python: relation → condition."""
        found = {}
        for inner in call.all():
            for branch in inner.branches if inner.path in self.written_here else ():
                holding = branch.relation if branch.holds else ~branch.relation
                relation, condition = self.terms.relation(branch.relation), self.terms.relation(holding)
                if relation and condition:
                    found[relation] = condition
                    self.relations.append(holding)
        if found:
            self.notes[f"it goes the example's way, where {' and '.join(found.values())}"] = None
        return found

    # -- the body ---------------------------------------------------------------------------------------------------

    def _steps(self, call: ModuleCall) -> list[Step]:
        return steps_of(call, self.recorded.model, self.modules, self.inline, self.widths)

    def _alike(self, steps: list[Step], others: list[Step]) -> bool:
        """Whether two ways through a module run the same operators on the same values, up to numbers, and call the same
        modules."""
        assert self.trained is not None and self.recorded.training is not None
        return signs(self.call, steps, self.recorded.evaluation) == signs(self.trained, others, self.recorded.training)

    def _body(self, call: ModuleCall, steps: list[Step], others: list[Step] | None) -> list[str]:
        taken = [parameter.name for parameter in self.head.parameters]
        terms = Terms(self.path, self.recorded, self.widths, self.calls, self.own, self.objects, taken, self.by_size)
        self.terms = terms
        unread = lost(call, steps, self.widths)
        lines: list[str] = []
        for leaf, path in zip(call.given.leaves, call.given.paths, strict=True):
            terms.name_all(leaf, self.head.accessor(path) if isinstance(leaf, fx.Node | Held) else "")
        terms.settle(self.module)
        if call is self.call:
            self.decided_by_size = self._decided_by_size(call)
            self.conditions |= self.decided_by_size
        for i, (kind, place, what) in enumerate(steps):
            twin = others[i] if others is not None else None
            if (what if kind == "op" else place) in unread:
                continue
            if kind == "is":
                if isinstance(place, fx.Node) and isinstance(what, fx.Node) and _is_tensor(place):
                    terms.name(place, terms.load(what))
            elif kind == "call":
                lines += self._called(place, what, what if twin is None else twin[2])
            elif what.target is operator.getitem:
                lines.append(self._assign(what, f"{terms.load(what.args[0])}[{what.args[1]}]"))
            else:
                lines.append(self._assign(what, self._operator(what, twin[2] if twin else None)))
        assert call.returned is not None
        lines.append(f"return {self._built(call.returned, unread)}")
        self.fixed |= terms.fixed
        return released(lines, terms.names.values(), terms.taken)

    def _assign(self, node: fx.Node, text: str, name: str = "") -> str:
        if not node.users:
            return text
        name = self.terms.fresh(name or re.sub(r"(_\d+)+$", "", node.name))
        self.terms.name(node, name)
        return f"{name} = {text}"

    def _called(self, name: str, call: ModuleCall, trained: ModuleCall) -> list[str]:
        """A call of a submodule, and what it returns taken apart. trained: the same call in training."""
        assert call.results is not None
        pairs = zip(call.passed.leaves, trained.passed.leaves, strict=True)
        args, kwargs = pytree.tree_unflatten([self.terms.passed(*pair) for pair in pairs], call.passed.spec)
        given = [written(a) for a in args] + [f"{k}={written(v)}" for k, v in kwargs.items()]
        text = f"{attribute(name)}({', '.join(given)})"
        leaves, paths = call.results.leaves, call.results.paths
        if len(leaves) == 1 and not paths[0] and not isinstance(leaves[0], Held):
            return [self._assign(leaves[0], text, variable(name)) if isinstance(leaves[0], fx.Node) else text]
        several = self.terms.fresh(variable(name))
        for leaf, path in zip(leaves, paths, strict=True):
            self.terms.name_all(leaf, several + "".join(map(access, path)))
        return [f"{several} = {text}"]

    def _operator(self, node: fx.Node, twin: fx.Node | None) -> str:
        target = node.target
        if not isinstance(target, OpOverload):
            raise InexpressibleError(f"{self.path or 'the model'} runs {getattr(target, '__name__', target)}")
        schema = target._schema.arguments
        here, there = list(node.args), list(node.args if twin is None else twin.args)
        for given, longer in ((here, there), (there, here)):  # arguments at their default are left out of a graph
            given += [argument.default_value for argument in schema[len(given) : len(longer)]]
        texts = [
            self.terms.argument(node, argument.name, value, other)
            for argument, value, other in zip(schema, here, there, strict=False)
        ]
        defaults = {argument.name: argument.default_value for argument in schema}
        named = dict(node.kwargs) if twin is None else {n: defaults[n] for n in twin.kwargs} | dict(node.kwargs)
        for name, value in named.items():
            if name == "pin_memory" and not value:
                continue
            other = value if twin is None else twin.kwargs.get(name, defaults[name])
            texts.append(f"{name}={self.terms.argument(node, name, value, other)}")
        if any(".shape[" in text for text in texts):
            return f"sized(torch.ops.{target}, {', '.join(texts)})"
        return f"torch.ops.{target}({', '.join(texts)})"

    def _built(self, values: Values, unread: Collection[fx.Node]) -> str:
        texts = ["None" if isinstance(v, fx.Node) and v in unread else self.terms.value(v) for v in values.leaves]
        for leaf, path in zip(values.leaves, values.paths, strict=True):
            if isinstance(leaf, fx.Node) and leaf in unread:
                self.notes[f"it returns None as result{''.join(map(access, path))}, which nothing here reads"] = None
        if plain(values.spec):
            return written(pytree.tree_unflatten(texts, values.spec))
        return f"pytree.tree_unflatten([{', '.join(texts)}], {self.terms.object_named('spec', values.spec)})"


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
