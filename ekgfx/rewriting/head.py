"""The first lines of a forward that is written anew: its parameters, and what it refuses to be called with."""

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ekgfx.rewriting.calls import ModuleCall
from ekgfx.rewriting.marks import Held
from ekgfx.rewriting.spelling import access


@dataclass(frozen=True)
class Head:
    """The parameters of a module's own forward, and one recorded call of it. path: the module's name in the model."""

    module: nn.Module
    path: str
    call: ModuleCall

    @property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward)

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """All but `self`."""
        return list(self._signature.parameters.values())[1:]

    @property
    def line(self) -> str:
        """`def forward(…):`."""
        return f"def forward({', '.join(['self', *self._texts()])}):"

    @property
    def passed_on(self) -> str:
        """Its parameters, as arguments of its own forward."""
        forms = {"VAR_POSITIONAL": "*{0}", "VAR_KEYWORD": "**{0}", "KEYWORD_ONLY": "{0}={0}"}
        return ", ".join(forms.get(p.kind.name, "{0}").format(p.name) for p in self.parameters)

    def accessor(self, path: tuple[Any, ...]) -> str:
        """How the forward reads what its caller passed at this place of (args, kwargs)."""
        parameters = self.parameters
        first, key, *rest = path
        if first.idx == 0:
            positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
            if key.idx < len(positional):
                text = positional[key.idx].name
            else:
                rest_name = next(p.name for p in parameters if p.kind is p.VAR_POSITIONAL)
                text = f"{rest_name}[{key.idx - len(positional)}]"
        elif any(p.name == key.key and p.kind is not p.VAR_KEYWORD for p in parameters):
            text = key.key
        else:
            text = f"{next(p.name for p in parameters if p.kind is p.VAR_KEYWORD)}[{key.key!r}]"
        return text + "".join(map(access, rest))

    def _texts(self) -> list[str]:
        parameters = self.parameters
        texts, starred = [], False
        for i, p in enumerate(parameters):
            if p.kind is p.VAR_POSITIONAL:
                texts.append(f"*{p.name}")
                starred = True
            elif p.kind is p.VAR_KEYWORD:
                texts.append(f"**{p.name}")
            else:
                if p.kind is p.KEYWORD_ONLY and not starred:
                    texts.append("*")
                    starred = True
                texts.append(p.name if p.default is p.empty else f"{p.name}=None")  # the defaults are set afterwards
                following = parameters[i + 1 :]
                if p.kind is p.POSITIONAL_ONLY and (not following or following[0].kind is not p.POSITIONAL_ONLY):
                    texts.append("/")
        return texts

    def _constants(self) -> dict[str, Any]:
        """What is passed besides tensors and integers: the forward is written for these values."""
        found = {}
        given = self.call.given
        for leaf, path in zip(given.leaves, given.paths, strict=True):
            if not isinstance(leaf, fx.Node | int | Held) or isinstance(leaf, bool):
                found[re.sub(r"^(\w+)\[('\w+')\]$", r"\1.get(\2)", self.accessor(path))] = leaf
        args, kwargs = pytree.tree_unflatten(given.leaves, given.spec)
        bound = self._signature.bind(self.module, *args, **kwargs).arguments
        for p in self.parameters:
            if p.name not in bound and p.default is not p.empty and not isinstance(p.default, Tensor):
                found[p.name] = p.default
        return found

    def conditions(self) -> dict[str, str]:
        """What a call must be like for this one to stand for it: what is passed → the condition as Python."""
        found = {}
        for name, value in self._constants().items():
            if value is None or isinstance(value, bool):
                found[name] = f"{name} is {value}"
            elif isinstance(value, str | int | float):
                found[name] = f"{name} == {value!r}"
        return found | self.given(self._tensors())

    def given(self, names: Iterable[str]) -> dict[str, str]:
        """Of these parameters, those that were given tensors, with the condition for it as Python."""
        return {name: f"isinstance({name}, torch.Tensor)" for name in names if name in self._held()}

    def left_out(self) -> list[str]:
        """What is None in this call."""
        return [name for name, value in self._constants().items() if value is None]

    def values(self) -> str:
        """The same, for people."""
        values = [f"{name}={value!r}" for name, value in self._constants().items()]
        return ", ".join([*values, *(f"a tensor as {name}" for name in self._tensors())])

    def _tensors(self) -> list[str]:
        """Parameters that may be left out, or None, and were given tensors."""
        optional = {p.name for p in self.parameters if p.default is None or _may_be_none(p.annotation)}
        return [name for name in self._held() if name in optional]

    def shapes(self, length: Callable[[fx.Node, int, int], int]) -> dict[str, int]:
        """The sizes of the tensors that this call was given, as far as they are numbers: what is free is none. length:
        what the cut makes of one."""
        given = zip(self.call.given.leaves, self.call.given.paths, strict=True)
        tensors = {self.accessor(p): v for v, p in given if isinstance(v, fx.Node) and _is_tensor(v)}
        return {
            f"{name}.shape[{d}]": length(node, d, size)
            for name, node in tensors.items()
            for d, size in enumerate(node.meta["val"].shape)
            if isinstance(size, int)
        }

    def _held(self) -> list[str]:
        """Where this call was given tensors."""
        given = zip(self.call.given.leaves, self.call.given.paths, strict=True)
        return [self.accessor(path) for leaf, path in given if isinstance(leaf, fx.Node) and _is_tensor(leaf)]


def _may_be_none(annotation: Any) -> bool:
    """Whether a parameter is said to take None."""
    said = annotation if isinstance(annotation, str) else str(annotation)
    return "None" in said or "Optional[" in said


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)
