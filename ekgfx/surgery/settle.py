"""Make a cut module what was predicted, changing as little of it as possible.

Standard layers follow from their weights. Beyond them nothing is changed at first: the cut module is run and traced
again, and the operators that differ from the prediction say which modules' Python does not give it. Only the integers
of those modules are changed, and put back where that makes no difference. A module that no choice of integers makes
right gets a forward that is written for it.
"""

import contextlib
import itertools
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from torch import nn

from ekgfx.axes import counted
from ekgfx.errors import PruneError
from ekgfx.rewriting.forward import Version, rewrite
from ekgfx.rewriting.patched import forward_of, put_forward
from ekgfx.surgery.alternatives import settle_alternatives
from ekgfx.surgery.assignments import assignments, kind_of, take
from ekgfx.surgery.behaviour import as_good, behaviour, shapes_taken
from ekgfx.surgery.comparison import Comparison, Prediction
from ekgfx.surgery.dropped import recorded
from ekgfx.surgery.faults import CONTAINERS, Problem
from ekgfx.surgery.integers import STANDARD, Choice, choices_of, own_configurations
from ekgfx.surgery.uncut import Uncut

log = logging.getLogger("ekgfx")
MOST_TRIALS, MOST_RUNS = 16, 64
"""Choices of integers that are traced, at most, and those that are run before."""
Told = Mapping[tuple[str, str], tuple[int, int]]
"""Module and attribute → a whole number as it was, and as it should be."""


def settle(
    pruned: nn.Module, predicted: Prediction, told: Told = MappingProxyType({}), *, may_replace: bool = True
) -> None:
    """Make the cut module, whose standard layers are right, what was predicted.

    told: module and attribute → a whole number as it was, and as the library would have it for such widths: taken where
    nobody has changed it, and the module stays what was predicted. may_replace: a module's forward may be replaced
    where nothing else helps.

    Raises:
        PruneError: that cannot be done; the message names the module and what to do.
    """
    settling = _Settling(pruned, predicted, may_replace)
    settling.run()
    settling.take(told)


class _Settling:
    def __init__(self, pruned: nn.Module, predicted: Prediction, may_replace: bool) -> None:
        self.pruned, self.predicted, self.may_replace = pruned, predicted, may_replace
        self.source = predicted.source
        self.own = {name: forward_of(module) for name, module in pruned.named_modules()}
        # As they are now: a module that gets a forward gets a class of its own.
        self.kinds = {name: type(module) for name, module in pruned.named_modules()}
        self.put: dict[str, tuple[frozenset[str], str]] = {}  # path → what its forward was written with
        self.inline: set[str] = set()  # modules whose forward could not be written: their callers run what they run
        self.changed: list[Choice] = []
        self.open = choices_of(pruned, self.source, predicted.counts, predicted.before)
        self.tried: set[str] = set()
        self.cleared: set[str] = set()  # modules that integers of others were settled for
        self.recorded: list[Version] | None = None
        self.comparison, self.uncut = Comparison(pruned, predicted), Uncut(pruned, predicted, self.open)

    def run(self) -> None:
        problems = self.comparison.problems()
        for _ in range(4 * len(list(self.pruned.modules())) + 4):
            if not problems:
                break
            for problem in problems:
                if problem.module is None:
                    raise self._error(problem)
            left = self._by_attributes(problems)
            if left is None:
                for problem in problems:
                    self._replace(problem)
                left = self.comparison.problems()
            problems = left
        if problems:
            raise self._error(problems[0])
        self._put_back()
        settle_alternatives(self.pruned, self.source, self.open)
        self._limit()

    def take(self, told: Told) -> None:
        """Sets the numbers that nobody has changed, or none of them where the module then does otherwise."""
        modules = dict(self.pruned.named_modules())
        stale = {
            place: numbers
            for place, numbers in told.items()
            if place[0] in modules and vars(modules[place[0]]).get(place[1]) == numbers[0]
        }
        for (path, name), (_, new) in stale.items():
            object.__setattr__(modules[path], name, new)
        if stale and self.comparison.problems():
            for (path, name), (old, _) in stale.items():
                object.__setattr__(modules[path], name, old)
            shown = ", ".join(".".join(filter(None, place)) for place in stale)
            log.info("these numbers stay as they were, though the configuration asks for others: %s", shown)

    def _error(self, problem: Problem) -> PruneError:
        text = f"the pruned {type(self.pruned).__name__} is not what was predicted: {problem.text}"
        if self.recorded is not None and problem.module in self.recorded[0][0].others:
            text += (
                "; in training it does something else, which has no graph and so stays its own Python: keep the widths "
                "that it cannot express (ignore=), or let it read them from a tensor or an attribute"
            )
        return PruneError(text)

    # -- integers ---------------------------------------------------------------------------------------------------

    def _by_attributes(self, problems: list[Problem]) -> list[Problem] | None:
        """Settle the integers of the modules in question, all of a class that hold the same ones alike; what is left to
        do then, None where no integer helps."""
        for problem in problems:
            path = problem.module or ""
            if path in self.tried or path in self.put:
                continue
            alike = self._alike(path)
            self.tried |= alike
            mine = [c for c in self.open if (c.governor in alike or c.module in alike) and c not in self.changed]
            left = self._helped(mine, alike, problems)
            if left is not None:
                return left
        return self._by_others({problem.module or "" for problem in problems}, problems)

    def _alike(self, path: str) -> set[str]:
        """The modules of one class whose integers, and those of what they govern, had the same values and may get the
        same: blocks of one width, say. Others of the class are settled when it is their turn."""

        def held(name: str) -> set[tuple]:
            return {(c.module[len(name) :], c.place, c.values) for c in self.open if name in (c.governor, c.module)}

        kind, own = type(self.pruned.get_submodule(path)), held(path)
        return {n for n, m in self.pruned.named_modules() if type(m) is kind and held(n) == own}

    def _by_others(self, blamed: set[str], problems: list[Problem]) -> list[Problem] | None:
        """What shows in one module may come from others that run before it: padding that is too wide, say. So all
        likely integers are settled anew, modules of one class alike, or each for itself where they are few. Where none
        helped another module of the class, which has got a forward since, that is not tried again."""
        kinds = {self.kinds[name] for name in self.put.keys() & self.cleared}
        if all(name in self.put.keys() | self.cleared or self.kinds[name] in kinds for name in blamed):
            return None
        self.cleared |= blamed
        likely = [choice for choice in self.open if choice.likely]
        left = self._helped(likely, self.cleared, problems)
        return self._helped(likely, self.cleared, problems, apart=True) if left is None else left

    def _helped(
        self, choices: list[Choice], blamed: Collection[str], problems: list[Problem], apart: bool = False
    ) -> list[Problem] | None:
        """Settle these integers so that nothing is left to blame on those modules; what is left elsewhere, None where
        no way does that. problems: what there was before, for a run that ends sooner than it did shows nothing."""
        if not choices:
            return None
        if any(choice.configured for choice in choices):
            own_configurations(self.pruned)
        before = {choice: choice.now(self.pruned) for choice in choices}
        failed: list[dict[Choice, int]] = []  # values with which a run went wrong, of what it could have read by then
        most, traces = MOST_TRIALS if self.uncut.wanted is None else MOST_RUNS, 0
        for trial in itertools.islice(self._ways(choices, apart), most):
            if any(values.items() <= trial.items() for values in failed):
                continue
            take(self.pruned, trial)
            begun = self.uncut.wrong_after(blamed)
            if begun is not None:
                failed.append({choice: value for choice, value in trial.items() if self._read_in(choice, begun)})
                continue
            if traces == MOST_TRIALS:
                break
            left, traces = self.comparison.problems(), traces + 1
            if not any(p.module is None or p.module in blamed or p.hides(blamed, problems[0]) for p in left):
                self.changed += [choice for choice in choices if choice not in self.changed]
                return left
        take(self.pruned, before)
        return None

    def _read_in(self, choice: Choice, begun: Collection[str]) -> bool:
        """Whether modules that have begun may have read an integer: the one that has it, what governs that, the Python
        of what holds it, or any with the same configuration."""
        holder = choice.module.rpartition(".")[0]
        holders = () if self.kinds[holder].forward in CONTAINERS else (holder,)
        return choice.configured or any(path in begun for path in (choice.module, choice.governor, *holders))

    def _ways(self, choices: list[Choice], apart: bool) -> Iterator[dict[Choice, int]]:
        """The ways to settle integers: the likeliest, then those in which only integers change that the uncut model
        reads: what it does not read may have the size of a width by chance."""
        ways = assignments(self.pruned, choices, apart)
        yield next(ways)
        read = [choice for choice in choices if self.uncut.reads(choice)]
        if len(read) == len(choices):
            yield from ways
        else:
            others = {choice: choice.old for choice in choices if choice not in read}
            yield from ({**others, **way} for way in assignments(self.pruned, read, apart))

    def _put_back(self) -> None:
        """Every integer gets back its old value where the model computes the same with it."""
        if not self.changed:
            return
        wanted = behaviour(self.pruned, self.source.example)
        kinds: dict[tuple, list[Choice]] = {}
        for choice in self.changed:
            kinds.setdefault(kind_of(self.pruned, choice), []).append(choice)
        for members in kinds.values():
            now = {choice: choice.now(self.pruned) for choice in members}
            take(self.pruned, {choice: choice.old for choice in members})
            if not as_good(behaviour(self.pruned, self.source.example), wanted):
                take(self.pruned, now)

    # -- forwards ---------------------------------------------------------------------------------------------------

    def _replace(self, problem: Problem) -> None:
        """Give a module a forward that does what is predicted, or, where that cannot be written, the one around it."""
        path = problem.module
        assert path is not None
        while True:
            module = self.pruned.get_submodule(path)
            if path not in self.put.keys() | self.inline and not isinstance(module, STANDARD):
                if not self.may_replace:
                    raise PruneError(_forbidden(path, module, problem.text))
                try:
                    self._put(path, problem.text)
                    return
                except PruneError as error:
                    problem = Problem(problem.module, f"{problem.text}; {error}")
            self.inline.add(path)
            put_forward(module, self.own.get(path))
            if not path:
                return self._replace_earlier(problem)
            path = path.rpartition(".")[0]

    def _replace_earlier(self, problem: Problem) -> None:
        """What shows in one module may come from another that runs before it, and makes what it makes by a number: as
        many zeros as before the cut, say."""
        for operation in self.source.operations:
            sizes, path = operation.effect.sizes.values(), operation.module
            follows = any(counted(size, {}) != counted(size, self.predicted.counts) for size in sizes)
            if follows and path not in self.put.keys() | self.inline:
                if not isinstance(self.pruned.get_submodule(path), STANDARD):
                    with contextlib.suppress(PruneError):
                        return self._put(path, problem.text)
                self.inline.add(path)
        raise self._error(problem)

    def _put(self, path: str, reason: str) -> None:
        if self.recorded is None:
            self.recorded = recorded(self.source, self.predicted.counts, self.predicted.twin)
        inline = frozenset(self.inline)
        forward = rewrite(path, self.recorded, inline, reason, by_size=True)
        put_forward(self.pruned.get_submodule(path), forward)
        self.put[path] = (inline, reason)
        module = self.pruned.get_submodule(path)
        if isinstance(module, nn.MultiheadAttention):
            module._qkv_same_embed_dim = False  # or a TransformerEncoderLayer computes in its place what it would

    def _limit(self) -> None:
        """Forwards say what sizes they take. What a number has made of one, only a run on other sizes shows; where one
        was taken for a size of the inputs by chance, it stays a number."""
        if not self.put or self.source.model is self.pruned:
            return
        wrong = self._wrong()
        if not wrong:
            return
        known = {path: forward_of(self.pruned.get_submodule(path)) for path in self.put}
        for path, (inline, reason) in self.put.items():
            if known[path] is not None:
                put_forward(self.pruned.get_submodule(path), rewrite(path, self.recorded or [], inline, reason, False))
        as_numbers = self._wrong()
        by_size = len(as_numbers) >= len(wrong)
        if not by_size:
            wrong = as_numbers
        else:
            for path, forward in known.items():
                put_forward(self.pruned.get_submodule(path), forward)
        for path, (inline, reason) in self.put.items() if wrong else ():
            module = self.pruned.get_submodule(path)
            forward = forward_of(module)
            if forward is not None and (0 in wrong or forward.sizes != "example"):
                exact = rewrite(path, self.recorded or [], inline, reason, by_size, exactly=True)
                put_forward(module, replace(exact, sizes="example" if 0 in wrong else "batch"))

    def _wrong(self) -> list[int]:
        """On which of the other sizes the cut model gives other shapes than the uncut one, or fails without having
        refused them."""
        refused = NotImplementedError.__name__
        pairs = zip(
            *(shapes_taken(each, self.source.example) for each in (self.source.model, self.pruned)), strict=True
        )
        return [
            i
            for i, (wanted, found) in enumerate(pairs)
            if not isinstance(wanted, str) and found not in (wanted, refused)
        ]


def _forbidden(path: str, module: nn.Module, text: str) -> str:
    return (
        f"{path or 'the model'} ({type(module).__name__}) cannot express the cut, and graphs='forbid' lets nothing "
        f"stand in place of its forward: {text}; keep its widths (ignore=), name it as leaf=, or let it read the width "
        "from an attribute or with -1 instead of computing it from another tensor"
    )
