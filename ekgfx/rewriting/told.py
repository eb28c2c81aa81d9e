"""What Python is told that asks, on its way, whether it is traced: so that a model is recorded as it runs.

Some leave out a mask that hides nothing, but not where they are compiled or exported, or given tensors without values;
others look at values, which only a run has.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ekgfx.graph.axis_graph import Example
from ekgfx.graph.ways import Way, undisturbed

ASKED = ("is_exporting", "is_compiling")
"""The questions, in `torch.compiler`."""


@contextlib.contextmanager
def told(
    exported: bool,
    asked: list[None],
    decisions: Sequence[bool] = (),
    deciding: Callable[[bool], None] = lambda decision: None,
) -> Iterator[None]:
    """While this is open, code outside of PyTorch that asks whether it is exported is told so, or that it is not.

    asked: grows with every question. decisions: where it is told that it is not, what was decided by values in a run,
    in order; deciding: is called with each as it is taken.
    """
    own = {name: getattr(torch.compiler, name) for name in ASKED}

    def answering(name: str) -> Any:
        def answer() -> bool:
            if name != "is_exporting" and (exported or by_pytorch()):
                return bool(own[name]())
            asked.append(None)
            return exported

        return answer

    with contextlib.ExitStack() as stack:
        if not exported:
            stack.enter_context(_no_fakes(asked))
            stack.enter_context(_Decided(decisions, deciding))
        for name in ASKED:
            setattr(torch.compiler, name, answering(name))
            stack.callback(setattr, torch.compiler, name, own[name])
        yield


def decisions_of(model: nn.Module, way: Way, example: Example) -> list[bool]:
    """What a run of the model decides by values (`if mask.all():`, `0 in ids`), in order; as far as it comes."""
    args, kwargs = example
    deciding = _Deciding()
    with contextlib.suppress(Exception), torch.no_grad(), way.entered(model), undisturbed(model), deciding:
        model(*args, **kwargs)
    return deciding.found


def _decides(func: Any, args: Any) -> bool:
    """Whether a function of a tensor gives a truth value."""
    return func in (Tensor.__bool__, Tensor.__contains__) or (func is Tensor.item and args[0].dtype == torch.bool)


class _Deciding(TorchFunctionMode):
    """Notes what is decided by values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _decides(func, args):
            self.found.append(bool(result))
        return result


class _Decided(TorchFunctionMode):
    """Decides as was decided in a run; from the beginning once that is used up: the exporter may run a model again."""

    def __init__(self, decisions: Sequence[bool], deciding: Callable[[bool], None]) -> None:
        super().__init__()
        self.decisions, self.deciding, self.next = decisions, deciding, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.decisions or not _decides(func, args):
            return func(*args, **(kwargs or {}))
        self.next += 1
        decision = self.decisions[(self.next - 1) % len(self.decisions)]
        self.deciding(decision)
        return decision


@contextlib.contextmanager
def _no_fakes(asked: list[None]) -> Iterator[None]:
    """While this is open, code outside of PyTorch that looks for the class of tensors without values finds another."""
    home, name = vars(torch._subclasses), "FakeTensor"
    own = home.pop(name)

    def look_up(attribute: str) -> Any:
        if attribute != name:
            raise AttributeError(f"module {torch._subclasses.__name__!r} has no attribute {attribute!r}")
        if by_pytorch():
            return own
        asked.append(None)
        return _NoTensor

    home["__getattr__"] = look_up
    try:
        yield
    finally:
        del home["__getattr__"]
        home[name] = own


class _NoTensor:
    """Has no instances."""


def by_pytorch(depth: int = 2) -> bool:
    """Whether the code that called the caller is PyTorch's own, or what ekgfx hooks into it."""
    return str(sys._getframe(depth).f_globals.get("__name__", "")).partition(".")[0] in ("torch", "ekgfx")
