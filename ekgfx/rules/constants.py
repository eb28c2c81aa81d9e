"""Operators that make tensors out of nothing."""

from ekgfx.axes import Axis, Prod, Sum
from ekgfx.rules.registry import Call, Effect, rule


@rule(
    "aten.zeros.default",
    "aten.ones.default",
    "aten.empty.memory_format",
    "aten.full.default",
    "aten.new_zeros.default",
    "aten.new_ones.default",
    "aten.new_full.default",
    "aten.new_empty.default",
)
def uniform(call: Call) -> Effect:
    """All positions are alike: the dimensions are free, their sizes follow from what the tensor meets."""
    out = tuple(call.fresh(n) for n in call.shape)
    return Effect(out, sizes={"size": out})


def _table(call: Call, size: int) -> Axis:
    """A dimension whose positions have a meaning of their own: frozen, but there may be one for every sample."""
    return call.open(size, "constant table")


@rule("aten.arange.default", "aten.arange.start", "aten.arange.start_step")
def arange(call: Call) -> Effect:
    """Counted from `start` in steps: where there is one for every sample, the end follows."""
    axis, start, step = _table(call, call.shape[0]), call.args.get("start", 0), call.args.get("step", 1)
    if not all(type(number) is int for number in (start, step, call["end"])) or start < 0 or step < 1:
        return Effect((axis,))
    end = Sum((call.constant(start), Prod((axis, call.constant(step)))))
    return Effect((axis,), sizes={"end": end})


@rule("aten.linspace.default", "aten.hann_window.default", "aten.randperm.default", "aten.eye.default")
def counted(call: Call) -> Effect:
    """As many as the argument says, in every dimension."""
    axis = _table(call, call.shape[0])
    name = next(name for name in ("steps", "window_length", "n") if name in call.args)
    return Effect((axis,) * len(call.shape), sizes={name: axis})


@rule("aten.eye.m")
def eye(call: Call) -> Effect:
    n, m = (_table(call, size) for size in call.shape)
    return Effect((n, m), sizes={"n": n, "m": m})


@rule(
    "aten.rand.default",
    "aten.randn.default",
    "aten.randint.default",
    "aten.randint.low",
    "aten.normal.float_float",
)
def noise(call: Call) -> Effect:
    """Positions are alike in distribution only: frozen, so that a cut draws what was drawn before."""
    out = tuple(_table(call, n) for n in call.shape)
    return Effect(out, sizes={"size": out})


@rule("aten.scalar_tensor.default", "aten.tensor.default")
def number(call: Call) -> Effect:
    return Effect(call.constants(call.shape, "constant table"))
