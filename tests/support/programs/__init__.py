"""Random programs out of the operators of the rule table, for the fuzzer.

A program is plain numbers: (input kind, steps, ending). A step is (operator, which value it reads, three numbers that
the operator shapes itself by); one that does not fit the value it reads is left out. Every step is a module of its own,
with the integers that a cut may have to change in `sizes`, as users' modules keep theirs.
"""

from tests.support.programs import layers, shapes, statistics  # noqa: F401  (importing registers their operators)
from tests.support.programs.base import Spec
from tests.support.programs.program import Program, example, specs

__all__ = ["Program", "Spec", "example", "specs"]
