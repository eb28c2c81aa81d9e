"""Tables that a model holds as plain tensors (positions, say): weights in all but name, if forward only reads them."""

import dis
import types
from collections.abc import Iterator

from torch import Tensor, nn


def is_table(model: nn.Module, name: str, value: Tensor) -> bool:
    """Whether a constant of an exported graph is a plain attribute of a module that no forward sets anew.

    One that a forward sets is a cache: after a cut it is made again for the widths that are left, and need not be what
    was kept of the old one.
    """
    path, _, attribute = name.rpartition(".")
    module = dict(model.named_modules()).get(path)
    if module is None or vars(module).get(attribute) is not value:
        return False
    return not any(attribute in set(_assigned(kind)) for kind in {type(each) for each in model.modules()})


def _assigned(kind: type) -> Iterator[str]:
    """Names of the attributes that a class's forward, or a method that it calls by name, assigns."""
    members = {name: member for base in reversed(kind.__mro__) for name, member in vars(base).items()}
    waiting, seen = ["forward"], {"__init__"}
    while waiting:
        name = waiting.pop()
        member = members.get(name)
        if name not in seen and isinstance(member, types.FunctionType):
            seen.add(name)
            for code in _codes(member.__code__):
                waiting += code.co_names
                yield from (str(each.argval) for each in dis.get_instructions(code) if each.opname == "STORE_ATTR")


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)
