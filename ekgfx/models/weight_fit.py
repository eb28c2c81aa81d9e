"""Which tensors of a file are a model's: by their names, whatever stands before these, and by their shapes."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ekgfx.base.units import several


@dataclass(frozen=True)
class Fit:
    """How the tensors at one place of a file fit a model.

    place: of the state dict in the file. prefix: what its names begin with and the model's do not. state: the tensors
    by the model's names. missing, unknown, reshaped: what does not fit. left: names that do not begin with the prefix.
    """

    place: str
    prefix: str
    state: Mapping[str, Tensor]
    missing: Sequence[str]
    unknown: Sequence[str]
    reshaped: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    left: Sequence[str]

    @property
    def exact(self) -> bool:
        return not (self.missing or self.unknown or self.reshaped)

    @property
    def fitting(self) -> int:
        """Number of tensors that are of the model's names and shapes."""
        return len(self.state) - len(self.reshaped)

    @property
    def averaged(self) -> bool:
        """Whether they are a moving average of weights, as far as the names say."""
        return _AVERAGED.search(f"{self.place}.{self.prefix}".lower()) is not None

    def __str__(self) -> str:
        place = f"{self.place!r}" if self.place else "the file's top"
        return place + (f", names after {self.prefix!r}" if self.prefix else "")


_AVERAGED = re.compile(r"(^|[._-])(ema|swa|averaged?|shadow)([._-]|$)")
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)(?=\.)")
"""What torch.compile, activation checkpointing, FSDP and Lightning Fabric put into the names of what they wrap."""
_COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
"""Ends of names that no output depends on: BatchNorm's counters, an average's, those of the profiler thop."""


def plain(name: str) -> str:
    """A name without what wrappers that do not change a module put into it."""
    return _WRAPPERS.sub("", name).removeprefix(".")


def fits_of(model: nn.Module, place: str, found: Mapping[str, Tensor]) -> list[Fit]:
    """How tensors fit the model: under the prefix that most of their names have before the model's, and as they are."""
    names = {plain(name): name for name in model.state_dict()}
    heads = {name.partition(".")[0] for name in names}
    if len(heads) == 1:  # a model that is wrapped itself, in DataParallel or in the user's own class
        (head,) = heads
        inner = {name.partition(".")[2]: own for name, own in names.items() if "." in name}
        if not any(plain(name).partition(".")[0] == head for name in found):
            names = inner
    prefixes = Counter(
        name[: len(name) - len(end)] for name in map(plain, found) for end in _ends(name) if end in names
    )
    chosen = [prefix for prefix, count in prefixes.items() if count == max(prefixes.values())] or [""]
    return [_fit(model, place, prefix, names, found) for prefix in chosen]


def _ends(name: str) -> Iterator[str]:
    """ "a.b.c" → "a.b.c", "b.c", "c" """
    while name:
        yield name
        name = name.partition(".")[2]


def _fit(model: nn.Module, place: str, prefix: str, names: Mapping[str, str], found: Mapping[str, Tensor]) -> Fit:
    own, state, unknown, left = model.state_dict(), {}, [], []
    computed = {plain(name) for name, _ in model.named_buffers()}  # also those that a state dict leaves out
    for name, tensor in found.items():
        bare = plain(name)
        if not bare.startswith(prefix):
            left.append(name)
        elif (end := bare[len(prefix) :]) in names:
            state[names[end]] = tensor
        elif end not in computed and not bare.endswith(_COUNTERS):
            unknown.append(name)
    missing = [name for name in names.values() if name not in state and not name.endswith(_COUNTERS)]
    shapes = {name: (tuple(state[name].shape), tuple(own[name].shape)) for name in own if name in state}
    reshaped = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    return Fit(place, prefix, state, missing, unknown, reshaped, left)


def differences(model: nn.Module, fit: Fit) -> str:
    """What does not fit, how much does, and what to do about it."""
    reshaped = [f"{name} is {theirs}, the model's {ours}" for name, (theirs, ours) in fit.reshaped.items()]
    kinds = {"missing": fit.missing, "unknown": fit.unknown, "of another shape": reshaped}
    listed = [
        f"{len(found)} {kind}: {', '.join(found[:3])}{' …' if len(found) > 3 else ''}"
        for kind, found in kinds.items()
        if found
    ]
    where = f" under {fit}" if fit.place or fit.prefix else ""
    listed.append(f"{fit.fitting} of the model's {len(model.state_dict())} tensors fit{where}")
    return "; ".join([*listed, _advice(fit)])


def _advice(fit: Fit) -> str:
    outputs = {(theirs[:1], ours[:1]) for theirs, ours in fit.reshaped.values() if theirs[1:] == ours[1:]}
    modules = {name.rpartition(".")[0] for name in fit.reshaped}
    if len(outputs) == len(modules) == 1 and not fit.missing and not fit.unknown:
        ((theirs, ours),) = outputs
        return f"the file is of {theirs[0]} outputs, the model of {ours[0]}: --classes {theirs[0]} makes it fit"
    if not fit.fitting:
        return "it is of another network, or names its modules otherwise: give the MODEL that it was saved from"
    return (
        "give the MODEL that it was saved from, or, to go on with those that fit, load them in a factory of your own "
        "with load_state_dict(…, strict=False)"
    )


def told(fit: Fit, as_well: Sequence[Fit], others: Sequence[str]) -> str:
    """What was taken from a file that holds more than the model's own names, and what was not."""
    words = []
    if fit.place or fit.prefix or as_well:
        words.append(f"took {fit}")
    words += [f"{other} fits too{' (--ema)' if other.averaged and not fit.averaged else ''}" for other in as_well[:3]]
    if fit.left:
        more = " …" if len(fit.left) > 3 else ""
        words.append(f"left {several(len(fit.left), 'other')} out: {', '.join(fit.left[:3])}{more}")
    if others:
        words.append(f"objects of {', '.join(others[:3])}{' …' if len(others) > 3 else ''} were not read")
    return "; ".join(words)
