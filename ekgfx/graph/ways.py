"""The ways in which a model is run: in evaluation or training mode, by `forward` or by another of its methods."""

import contextlib
import functools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ekgfx.graph.opaque import evaluation_mode
from ekgfx.graph.untouched import untouched


@dataclass(frozen=True)
class Way:
    """A way to run a model. number: which of the further example inputs it is given, from 1 on; 0: the first ones."""

    method: str = "forward"
    training: bool = False
    number: int = 0

    def __str__(self) -> str:
        mode = "training mode" if self.training else "evaluation mode"
        if self.method != "forward":
            return f"{self.method}() in {mode}"
        return f"{mode} on also[{self.number - 1}]" if self.number else mode

    @contextlib.contextmanager
    def entered(self, model: nn.Module) -> Iterator[None]:
        """While this is open, calling the model runs it in this way; its modes and all random states come back after.

        Random numbers are those of one seed. In training mode every call begins with it, so that Python's own take one
        path.
        """
        mode = _training_mode(model) if self.training else evaluation_mode(model)
        with seeded(model), mode, _as_forward(model, self):
            yield


@contextlib.contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def seeded(model: nn.Module) -> Iterator[None]:
    """While this is open, random numbers are those of seed 0; the states of PyTorch's, NumPy's and Python's generators
    come back after."""
    devices = {t.device for t in model.parameters() if t.device.type == "cuda"}
    python, arrays = random.getstate(), [numpy.random.get_state() for numpy in _numpy()]
    with torch.random.fork_rng(devices=list(devices)):
        _seed()
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            for numpy, state in zip(_numpy(), arrays, strict=False):
                numpy.random.set_state(state)


def _seed() -> None:
    random.seed(0)
    for numpy in _numpy():
        numpy.random.seed(0)


def _numpy() -> list[Any]:
    return [sys.modules["numpy"]] if "numpy" in sys.modules else []


@contextlib.contextmanager
def _as_forward(model: nn.Module, way: Way) -> Iterator[None]:
    """The way's method in the place of the model's forward, for the outermost call: a method may call the model."""
    if way.method == "forward" and not way.training:
        yield
        return
    own, method = vars(model).get("forward"), getattr(model, way.method)

    @functools.wraps(method)
    def outermost(*args: Any, **kwargs: Any) -> Any:
        if way.training:
            _seed()
        back()
        try:
            return method(*args, **kwargs)
        finally:
            model.forward = outermost

    def back() -> None:
        vars(model).pop("forward", None)
        if own is not None:
            model.forward = own

    model.forward = outermost
    try:
        yield
    finally:
        back()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """As `untouched`, for runs that may also write to parameters, as some do in training mode: a parameter is copied
    when it is first written to, which few forwards do."""
    written = _FirstWrites([parameter for parameter in model.parameters() if parameter.device.type != "meta"])
    with untouched(model):
        try:
            with written:
                yield
        finally:
            with torch.no_grad():
                for tensor, value in written.before.values():
                    tensor.data.copy_(value)


class _FirstWrites(TorchDispatchMode):
    """Keeps what parameters held before an operator wrote to them."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr(): p for p in parameters}
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for argument, value in zip(func._schema.arguments, args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                    place = value.untyped_storage().data_ptr()
                    if place in self.parameters and place not in self.before:
                        parameter = self.parameters[place]
                        self.before[place] = (parameter, parameter.detach().clone())
        return func(*args, **kwargs)
