"""A model of a library, built again from other values of its configuration: without memory, or with weights."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ekgfx.axes import Expr, Prod, Sum, axes, resolve
from ekgfx.graph.ties import factors
from ekgfx.surgery.configurations import build, configuration

Field = tuple[str | int, ...]
"""The way from a configuration to one of its numbers: attributes, and positions in lists."""
How = Callable[[], contextlib.AbstractContextManager[Any]]
"""What lets a model be built without memory for its parameters while it is open."""
Dimension = tuple[str, int]
"""A parameter, and which of its dimensions."""


def built_anew(model: nn.Module, config: Any, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A model of the same class, built from a configuration, with the weights of this one, or others."""
    with torch.random.fork_rng(), quiet():
        made = build(model, config)
    sample = next(model.parameters())
    made.to(device=sample.device, dtype=sample.dtype)
    saved = model.state_dict()
    made.load_state_dict({name: tensor for name, tensor in (state or saved).items() if name in saved})
    return made.train(model.training)


def saved_by(model: nn.Module) -> frozenset[str]:
    """The names of the tensors that a library saves of a model: of its state those that it does not compute anew, as
    transformers' models say by `_keys_to_ignore_on_save`."""
    left_out = getattr(model, "_keys_to_ignore_on_save", None) or ()
    return frozenset(model.state_dict().keys() - set(left_out))


def name_of(number: Field) -> str:
    """A number of a configuration as people write it."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in number).lstrip(".")


def get(config: Any, number: Field) -> int:
    """The number."""
    for step in number:
        config = config[step] if isinstance(step, int) else getattr(config, step)
    return int(config)


def put(config: Any, place: Field, number: int) -> None:
    """Set the number in place; a list or tuple that holds it is replaced."""
    *way, last = place
    if isinstance(last, int):
        held = list(_at(config, way))
        held[last] = number
        return setattr(_at(config, way[:-1]), str(way[-1]), type(_at(config, way))(held))
    return setattr(_at(config, way), last, number)


def _at(config: Any, way: Sequence[str | int]) -> Any:
    for step in way:
        config = getattr(config, str(step))
    return config


@dataclass(frozen=True)
class Built:
    """A model without memory: shapes of what it saves, the numbers that its modules hold, and how it was built."""

    shapes: Mapping[str, tuple[int, ...]]
    whole: Mapping[tuple[str, str], int]
    real: Mapping[tuple[str, str], float]
    how: How


class Trial:
    """Builds a model with other numbers in its configuration."""

    def __init__(self, model: nn.Module, built: Built) -> None:
        self.model, self.built = model, built
        self.known: dict[tuple[tuple[Field, int], ...], Built | None] = {}

    def of(self, numbers: Mapping[Field, int]) -> Built | None:
        key = tuple(sorted(numbers.items(), key=str))
        if key not in self.known:
            config = copy.deepcopy(configuration(self.model))
            try:
                for number, value in numbers.items():
                    put(config, number, value)
            except Exception:  # noqa: BLE001  whatever the configuration's own checks raise
                self.known[key] = None
            else:
                self.known[key] = shell(self.model, config, (self.built.how,))
        return self.known[key]

    def times(self, number: Field, old: int) -> int:
        """How many times a number is tried with: so many that the model has the same tensors, if any does."""
        fitting = (by for by in (2, 3, 5) if (made := self.of({number: by * old})) and self._alike(made))
        return next(fitting, 2)

    def _alike(self, made: Built) -> bool:
        return made.shapes.keys() == self.built.shapes.keys()

    def grown(self, numbers: Mapping[Field, int]) -> dict[Dimension, Fraction]:
        """The dimensions that change, and by what factor."""
        made = self.of(numbers)
        if made is None or not self._alike(made):
            return {}
        pairs = ((name, zip(self.built.shapes[name], made.shapes[name], strict=False)) for name in made.shapes)
        changed = ((name, d, old, new) for name, both in pairs for d, (old, new) in enumerate(both) if old != new)
        return {(name, d): Fraction(new, old) for name, d, old, new in changed if old}

    def whole(self, numbers: Mapping[Field, int]) -> dict[tuple[str, str], int] | None:
        """The whole numbers of modules that change, as they are then; None where the model cannot be built so."""
        made = self.of(numbers)
        if made is None:
            return None
        return {place: new for place, old in self.built.whole.items() if (new := made.whole.get(place, old)) != old}

    def splits(self, numbers: Mapping[Field, int]) -> bool:
        """Whether whole numbers of modules change, other than those of a norm's groups, whose width is in no scale."""
        changed = self.whole(numbers) or {}
        return bool(changed) and not any(
            attribute == "num_groups" and isinstance(self.model.get_submodule(name), nn.GroupNorm)
            for name, attribute in changed
        )

    def others(self, numbers: Mapping[Field, int]) -> str:
        """A number of a module that changes and is not a whole one; "" where none does."""
        made = self.of(numbers)
        real = {} if made is None else made.real
        return next(
            (".".join(place).strip(".") for place, old in self.built.real.items() if real.get(place) != old), ""
        )


def numbers_in(config: Any, seen: frozenset[int] = frozenset()) -> Iterator[tuple[Field, int]]:
    """Every whole number in a configuration, in its lists, and in configurations that it holds."""
    for name, value in sorted(vars(config).items()):
        if name.startswith("_"):
            continue
        if type(value) is int and value > 1:
            yield (name,), value
        elif type(value) in (list, tuple):
            yield from (((name, i), v) for i, v in enumerate(value) if type(v) is int and v > 1)
        elif hasattr(value, "to_dict") and hasattr(value, "__dict__") and id(value) not in seen:
            yield from (((name, *rest), v) for rest, v in numbers_in(value, seen | {id(config), id(value)}))


def runs(expr: Expr) -> Iterator[Expr]:
    """A dimension, and the neighbouring factors of it and of its terms that a number may stand for."""
    for term in (expr, *terms(expr)):
        made = factors(term)
        yield term
        yield from (Prod(tuple(made[i:j])) for i in range(len(made)) for j in range(i + 1, len(made) + 1))


def segments(expr: Expr, fields: Mapping[Field, int], fixed: Collection[Field] = ()) -> list[tuple[Field, Expr]] | None:
    """Which part of a dimension each of the numbers that it grows with stands for; None where that is not clear.

    fixed: numbers that say more than widths: of several that say one width together, another one stands for it."""
    if len(fields) < 2:
        return [(number, term) for number in fields for term in terms(expr)] or None
    found: list[tuple[Field, Expr]] = []
    for term in terms(expr):
        made, left = factors(term), dict(fields)
        free = [part for part in made if any(not axis.frozen for axis in axes(part))]
        if len(made) == 1 or (len(free) == 1 and free[0].size not in fields.values()):
            # a number times another one: the width is the larger
            found.append((max(fields, key=lambda number: (number not in fixed, fields[number])), (free or made)[0]))
            continue
        while made:
            products = {n: prod(part.size for part in made[:n]) for n in range(1, len(made) + 1)}
            fitting = [(n, number) for n, size in products.items() for number, old in left.items() if size == old]
            if len(fitting) != 1:
                return None
            ((length, number),) = fitting
            found.append((number, Prod(tuple(made[:length])) if length > 1 else made[0]))
            made = made[length:]
            del left[number]
    return found


def terms(expr: Expr) -> Sequence[Expr]:
    expr = resolve(expr)
    return expr.terms if isinstance(expr, Sum) else (expr,)


def shell(model: nn.Module, config: Any, ways: Sequence[How] | None = None) -> Built | None:
    """A model like this one built from a configuration; None where that cannot be. ways: of doing without memory, of
    which the first that works is taken."""
    built = ((how, _built(model, config, how)) for how in ways or (all_without_memory, parameters_without_memory))
    how, made = next(((how, made) for how, made in built if made is not None), (all_without_memory, None))
    if made is None:
        return None
    held = {(name, key): value for name, module in made.named_modules() for key, value in vars(module).items()}
    return Built(
        {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()},
        {place: value for place, value in held.items() if type(value) is int},
        {place: value for place, value in held.items() if type(value) is float},
        how,
    )


def _built(model: nn.Module, config: Any, how: How) -> nn.Module | None:
    try:
        with how(), quiet(), torch.random.fork_rng():
            getattr(config, "validate", int)()  # as transformers' are looked at when they are saved
            return build(model, config)
    except Exception:  # noqa: BLE001  whatever the library raises of a configuration that it does not take
        return None


def all_without_memory() -> contextlib.AbstractContextManager[Any]:
    """While this is open, all tensors are made on the meta device."""
    return torch.device("meta")


@contextlib.contextmanager
def parameters_without_memory() -> Iterator[None]:
    """While this is open, modules hold their parameters on the meta device, and all else as it is: where a class reads
    values while it is built, as the rates of its dropped paths from `torch.linspace`, all of it cannot be there."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter if parameter is None else nn.Parameter(parameter.to("meta"), False))

    nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what a library says of odd configurations from users."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
