"""Prune any PyTorch model to a budget, keep its accuracy, prove the speed-up."""

from ekgfx.errors import EkgfxError
from ekgfx.plan import Plan
from ekgfx.rules import rule
from ekgfx.trace import TracedModel, trace

__all__ = ["EkgfxError", "Plan", "TracedModel", "rule", "trace"]
