"""What a rule says of a call, or why it does not hold there."""

import logging
import traceback
from functools import cache

from ekgfx.errors import RuleError
from ekgfx.rules.registry import Call, Effect, Rule, ours

log = logging.getLogger("ekgfx")


def applied(call: Call, rule: Rule) -> Effect | str:
    """The effect of an operator, or why its rule does not hold here.

    A slip in a rule that comes with ekgfx is no matter of its user, who wants the rest of the model pruned. A slip in
    a rule of the user's own is one that its author reads, and can mend.

    Raises:
        RuleError: a rule that does not come with ekgfx failed by anything but a RuleError of its own.
    """
    try:
        return _agreeing(call, rule(call))
    except RuleError as error:
        failure = f"the rule does not hold here, {error}"
    except Exception as error:
        place = _line(rule, error)
        if not ours(rule):
            raise RuleError(f"the rule of {call.label} failed at {place}: {_said(error)}") from error
        failure = f"the rule failed at {place}, {_said(error)}"
    _tell(call.label, failure)
    return failure


def _agreeing(call: Call, effect: Effect) -> Effect:
    """The effect, if its outputs have the traced shapes.

    Outputs that nothing reads don't count: torch 2.11 traces an LSTM's final states with a wrong shape.

    Raises:
        RuleError: they don't.
    """
    outs = effect.outputs
    if len(outs) != len(call.shapes):
        raise RuleError(f"it says {len(outs)} outputs, the operator has {len(call.shapes)}")
    for i, (dims, shape) in enumerate(zip(outs, call.shapes, strict=True)):
        said = tuple(dim.size for dim in dims)
        if i in call.read and said != shape:
            raise RuleError(f"it says an output of shape {said}, the operator's has {shape}")
    return effect


def _line(rule: Rule, error: Exception) -> str:
    """The rule's own line, as file:line, at which an exception arose."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename == getattr(getattr(rule, "__code__", None), "co_filename", None)]
    return "{0.filename}:{0.lineno}".format((own or frames)[-1])


@cache
def _tell(label: str, failure: str) -> None:
    """Says once in a process that a rule failed."""
    log.warning("%s: %s; what touches it stays whole", label, failure)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
