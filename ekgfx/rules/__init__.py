"""What each operator says about axes; `rule` teaches a new one."""

from ekgfx.rules import (  # noqa: F401  (importing a family registers its rules)
    attention,
    constants,
    convolution,
    fourier,
    layers,
    normalization,
    pieces,
    pointwise,
    recurrent,
    reduction,
    shape,
    spatial,
)
from ekgfx.rules.registry import Call, Effect, Rule, known, lookup, rule, unknown

__all__ = ["Call", "Effect", "Rule", "known", "lookup", "rule", "unknown"]
