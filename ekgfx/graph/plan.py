"""A plan: which channels of each group stay. Pure data; applying it is somebody else's business."""

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from ekgfx.errors import PlanError

VERSION = 1
SHOWN = 4
"""Groups that a plan's repr names."""


@dataclass(frozen=True)
class Plan:
    """Kept channel indices per group.

    Attributes:
        kept: group name → ascending indices that stay; a group that is not named keeps all. Given as any series of
            whole numbers (a tensor or an array too), or as a mask of booleans.
        structure: digest of the groups the plan was made for (`Groups.digest`); "" fits any model with such groups.
        rescale: pruned kernels keep the Frobenius norm of the uncut ones (the EKG authors' detail).
        leaf: names of the modules that ran as they are when the plan was made.
        unused: names of the weights that were said to be unused then.
        also: number of further calls that the model was traced with then.
        outputs: places of the outputs that mattered when the plan was made (`trace(outputs=…)`); none where all did.
        dropped: residual blocks (`TracedModel.blocks`) that become identities: their branch goes, with its weights.

    Raises:
        PlanError: indices that are no whole numbers.

    Example:
        >>> plan = ekgfx.Plan({"fuse.0": range(32)})
        >>> print(traced.cost(plan))
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    structure: str = ""
    rescale: bool = False
    leaf: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    also: int = 0
    outputs: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.dropped, str):
            raise PlanError(f"dropped={self.dropped!r}: give the names of residual blocks in a tuple or a list")
        object.__setattr__(self, "dropped", tuple(sorted(set(self.dropped))))
        if not isinstance(self.kept, Mapping):
            raise PlanError(f"a plan is made of {{group: kept channels}}, not of a {type(self.kept).__name__}")
        kept = {name: _indices(name, indices) for name, indices in self.kept.items()}
        object.__setattr__(self, "kept", kept)

    def __repr__(self) -> str:
        """The widths, not the indices: a plan has thousands of those."""
        widths = [f"{name}: {len(kept)}" for name, kept in self.kept.items()]
        more = f", … {len(widths) - SHOWN} more groups" if len(widths) > SHOWN else ""
        gone = f"; without {', '.join(self.dropped)}" if self.dropped else ""
        kept = ", ".join(widths[:SHOWN]) + more if widths else "all"
        return f"Plan({kept} channels kept{gone})"

    def with_kept(self, name: str, indices: Iterable[int]) -> "Plan":
        """The same plan with other indices for one group.

        Args:
            name: the group.
            indices: the channels of it that stay.
        """
        made = copy.copy(self)  # not `replace`: a search makes many, and the other groups' indices are right
        found = _indices(name, indices)
        object.__setattr__(
            made, "kept", {**self.kept, name: found if isinstance(found, FromMask) else tuple(sorted(found))}
        )
        return made

    def then(self, later: "Plan") -> "Plan":
        """This plan and one for the model that it leaves, as one plan of the model before both.

        Pruning by it is pruning by both in turn: `prune(model, first.then(second))` has the weights of
        `prune(prune(model, first), second)`, where nothing was trained in between.

        Args:
            later: the second plan, in the indices of the channels that this one leaves.

        Raises:
            PlanError: the second plan names other channels than the first one leaves, or they differ in `rescale`.
        """
        if self.rescale != later.rescale:
            raise PlanError("one of the plans rescales kernels, the other does not; no single plan does as both do")
        kept = dict(self.kept)
        for name, indices in later.kept.items():
            if _shifted(name, self.kept):
                raise PlanError(
                    f"the groups of {name.partition('#')[0]!r} are numbered anew after the first plan, which leaves "
                    "one channel of one of them; give `save` and `prune` the plans one after the other"
                )
            before = self.kept.get(name)
            if before is not None:
                wrong = [i for i in indices if not 0 <= i < len(before)]
                if wrong:
                    raise PlanError(f"the later plan keeps channel {wrong[0]} of {name!r}; {len(before)} are left")
                indices = tuple(before[i] for i in indices)
            kept[name] = indices
        return replace(self, kept=kept, dropped=(*self.dropped, *later.dropped))

    @classmethod
    def of(cls, pruned: object) -> "Plan":
        """The plan by which `prune` made a module, of all rounds together: in the indices of the original's channels.

        Args:
            pruned: what `prune` returned.

        Raises:
            PlanError: the module was not made by `prune`, or its rounds make no single plan (see `then`).
        """
        made = rounds_of(pruned)
        if not made:
            raise PlanError(
                f"this {type(pruned).__name__} does not say what it was pruned by; `prune` makes one that does"
            )
        return reduce(cls.then, made)

    def alike(self, other: "Plan") -> bool:
        """Whether both leave the same channels and blocks and scale kernels alike, whatever else is said with them."""
        return (self.kept, self.rescale, self.dropped) == (other.kept, other.rescale, other.dropped)

    @property
    def digest(self) -> str:
        """Short hash of everything in the plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The plan as text, which `from_json` reads; the same plan gives the same text."""
        kept = {name: list(indices) for name, indices in sorted(self.kept.items())}
        data = {"version": VERSION, "structure": self.structure, "rescale": self.rescale, "kept": kept}
        for name in ("leaf", "unused", "outputs", "dropped"):
            if getattr(self, name):
                data[name] = list(getattr(self, name))
        if self.also:
            data["also"] = self.also
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan back.

        Args:
            text: what `to_json` gave.

        Raises:
            PlanError: not a plan, a malformed one, or one of a newer format.
        """
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(f"not a plan: {error}") from error
        if not isinstance(data, dict) or type(data.get("version")) is not int or data["version"] < 1:
            raise PlanError("not a plan: no format version")
        if data["version"] > VERSION:
            raise PlanError(
                f"the plan has format version {data['version']}, this ekgfx reads up to {VERSION}: upgrade ekgfx"
            )
        kept, structure, rescale = data.get("kept"), data.get("structure", ""), data.get("rescale", False)
        if not isinstance(kept, dict) or not isinstance(structure, str) or not isinstance(rescale, bool):
            raise PlanError("malformed plan: 'kept', 'structure' or 'rescale' is not of its type")
        for name, indices in kept.items():
            if not isinstance(indices, list) or not all(type(i) is int for i in indices):
                raise PlanError(f"malformed plan: the kept indices of {name!r} are not a list of integers")
        names = {key: data.get(key, []) for key in ("leaf", "unused", "outputs", "dropped")}
        for key, value in names.items():
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                raise PlanError(f"malformed plan: {key}={value!r} is not a list of names")
        also = data.get("also", 0)
        if type(also) is not int or also < 0:
            raise PlanError(f"malformed plan: also={also!r} is not a number of calls")
        options: dict[str, Any] = {key: tuple(value) for key, value in names.items()}
        return cls({name: tuple(indices) for name, indices in kept.items()}, structure, rescale, also=also, **options)


ROUNDS = "_ekgfx_plans"
"""Attribute of a pruned module: the plans that it was made by, oldest first, as JSON (so that nobody who unpickles the
module needs ekgfx)."""


def rounds_of(model: object) -> tuple[Plan, ...]:
    """The plans by which `prune` made a module, oldest first; none for any other."""
    return tuple(map(Plan.from_json, getattr(model, ROUNDS, ())))


def remember(pruned: object, rounds: Iterable[Plan]) -> None:
    """Let a pruned module say what it was made by."""
    setattr(pruned, ROUNDS, tuple(plan.to_json() for plan in rounds))


def as_plan(value: Any) -> Plan:
    """A plan, the plan of a search's result, or {group: kept channels} as one. Raises PlanError for anything else."""
    value = getattr(value, "plan", value)
    if isinstance(value, Plan):
        return value
    if isinstance(value, Mapping):
        return Plan(value)
    raise PlanError(f"a {type(value).__name__} is no plan; give an ekgfx.Plan, such as the search's result.plan")


class FromMask(tuple[int, ...]):
    """Kept channels that were given as a mask: one truth value for every channel, `length` of them."""

    length: int

    def __new__(cls, indices: Iterable[int], length: int) -> "FromMask":
        made = super().__new__(cls, indices)
        made.length = length
        return made

    def __getnewargs__(self) -> tuple[tuple[int, ...], int]:
        return tuple(self), self.length


def _indices(name: str, indices: Any) -> tuple[int, ...]:
    """Kept channels as a tuple of Python's whole numbers."""
    if isinstance(indices, FromMask) or (type(indices) is tuple and set(map(type, indices)) <= {int}):
        return indices
    listed = indices.tolist() if hasattr(indices, "tolist") else indices  # of a tensor or an array
    if not isinstance(name, str) or isinstance(listed, str) or not isinstance(listed, Iterable):
        raise PlanError(f"the plan keeps {str(indices)[:80]!r} of {name!r}; name a group, and give its kept channels")
    found = [value.item() if hasattr(value, "item") else value for value in listed]
    if found and all(type(value) is bool for value in found):
        return FromMask((i for i, stays in enumerate(found) if stays), len(found))
    wrong = [value for value in found if type(value) is not int]
    if wrong:
        raise PlanError(f"the plan keeps {str(wrong[0])[:80]!r} of {name!r}; kept channels are whole numbers")
    return tuple(found)


def _shifted(name: str, before: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a group of this name may be another one than before: those of one parameter are numbered (`qkv#0`), and
    one that is left with a single channel is no group any more."""
    base = name.partition("#")[0]
    return any(other.partition("#")[0] == base and len(kept) == 1 for other, kept in before.items())
