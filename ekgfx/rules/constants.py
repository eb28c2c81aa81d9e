"""Operators that make tensors out of nothing."""

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


@rule(
    "aten.arange.default",
    "aten.arange.start",
    "aten.arange.start_step",
    "aten.linspace.default",
    "aten.eye.default",
    "aten.eye.m",
    "aten.rand.default",
    "aten.randn.default",
    "aten.hann_window.default",
    "aten.scalar_tensor.default",
    "aten.tensor.default",
)
def table(call: Call) -> Effect:
    """Positions have a meaning of their own: frozen."""
    return Effect(call.constants(call.shape, "constant table"))
