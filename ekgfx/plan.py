"""A plan: which channels of each group stay. Pure data; applying it is somebody else's business."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ekgfx.errors import PlanError

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """Kept channel indices per group.

    Attributes:
        kept: group name → ascending indices that stay; a group that is not named keeps all.
        structure: digest of the groups the plan was made for (`Groups.digest`); "" fits any model with such groups.
        rescale: pruned kernels keep the Frobenius norm of the uncut ones (the EKG authors' detail).
        leaf: names of the modules that ran as they are when the plan was made.
        unused: names of the weights that were said to be unused then.
        also: number of further calls that the model was traced with then.
    """

    kept: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    structure: str = ""
    rescale: bool = False
    leaf: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    also: int = 0

    def with_kept(self, name: str, indices: Iterable[int]) -> "Plan":
        """The same plan with other indices for one group."""
        return replace(self, kept={**self.kept, name: tuple(sorted(indices))})

    @property
    def digest(self) -> str:
        """Short hash of everything in the plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        kept = {name: list(indices) for name, indices in sorted(self.kept.items())}
        data = {"version": VERSION, "structure": self.structure, "rescale": self.rescale, "kept": kept}
        for name in ("leaf", "unused"):
            if getattr(self, name):
                data[name] = list(getattr(self, name))
        if self.also:
            data["also"] = self.also
        return json.dumps(data, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Read a plan back.

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
        leaf, unused, also = data.get("leaf", []), data.get("unused", []), data.get("also", 0)
        for key, names in (("leaf", leaf), ("unused", unused)):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise PlanError(f"malformed plan: {key}={names!r} is not a list of names")
        if type(also) is not int or also < 0:
            raise PlanError(f"malformed plan: also={also!r} is not a number of calls")
        kept = {name: tuple(indices) for name, indices in kept.items()}
        return cls(kept, structure, rescale, tuple(leaf), tuple(unused), also)
