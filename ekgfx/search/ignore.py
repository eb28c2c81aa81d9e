"""Which groups the user wants left alone: glob patterns over names of groups, parameters and modules."""

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ekgfx.errors import PlanError
from ekgfx.graph.groups import ChannelGroup, Groups
from ekgfx.tracing.traced import TracedModel


def names_of(group: ChannelGroup) -> set[str]:
    """Everything a pattern may say to mean this group: its name, its parameters, and the modules that hold them."""
    return {group.name, *enclosing(place.parameter for place in group.places)}


def enclosing(parameters: Iterable[str]) -> set[str]:
    """The names of parameters, and of all modules that they are in."""
    parts = [name.split(".") for name in parameters]
    return {".".join(each[:end]) for each in parts for end in range(1, len(each) + 1)}


Ignored = str | nn.Module | type[nn.Module]
"""A glob pattern, a module of the model, or a class of modules."""


def as_patterns(traced: TracedModel, ignore: Ignored | Sequence[Ignored]) -> tuple[str, ...]:
    """The patterns, with modules and classes as the names of those modules of theirs that hold what can be pruned.

    Raises PlanError for a module that is not the model's, or a class of which it has none.
    """
    prunable = set().union(*map(names_of, traced.groups.values()))
    found: list[str] = []
    for each in (ignore,) if isinstance(ignore, str | nn.Module | type) else ignore:
        if isinstance(each, str):
            found.append(each)
            continue
        if not isinstance(each, nn.Module | type):
            raise PlanError(f"ignore takes names, modules and classes of modules, not a {type(each).__name__}")
        named = traced.model.named_modules(remove_duplicate=False)
        names = [name for name, m in named if m is each or (isinstance(each, type) and isinstance(m, each))]
        if not names:
            kind = (each if isinstance(each, type) else type(each)).__name__
            raise PlanError(f"ignore: this {kind} is no module of the traced {type(traced.model).__name__}")
        found += [name for name in names if name in prunable] or names
    return tuple(found)


def ignored_groups(groups: Groups, patterns: Sequence[str]) -> frozenset[str]:
    """Names of the groups that some pattern matches, by group, parameter or module name (`*` also matches dots);
    `=NAME` is the group of that name alone.

    Raises PlanError for a pattern that matches nothing, with the nearest names.
    """
    known = {group.name: names_of(group) for group in groups.values()}
    ignored: set[str] = set()
    for pattern in patterns:
        matched = {name for name, names in known.items() if _means(pattern, name, names)}
        if not matched:
            raise PlanError(
                f"ignore {pattern!r} matches no prunable group, parameter or module{_nearest(pattern, known)}"
            )
        ignored |= matched
    return frozenset(ignored)


def _means(pattern: str, group: str, names: set[str]) -> bool:
    if pattern.startswith("="):
        return pattern[1:] == group
    return any(fnmatchcase(name, pattern) for name in names)


def _nearest(pattern: str, known: dict[str, set[str]]) -> str:
    every = sorted(set().union(*known.values()))
    close = difflib.get_close_matches(pattern, every, n=3)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else "; `ekgfx groups MODEL` lists them"
