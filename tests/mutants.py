"""Break the package on purpose, one place at a time, and see whether the tests notice.

    python tests/mutants.py                # all; fails where one survives, or stands nowhere any more
    python tests/mutants.py einsum norms   # those with one of these words in their name
    python tests/mutants.py --list         # only see that each still applies

Each is applied in a copy of the tree, where the tests that should fail are run, in a process that has the libraries.
"""

import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """A text that stands once in the package, what to put in its place, and what to run: arguments of pytest."""

    name: str
    old: str
    new: str
    tests: str


MUTANTS = [
    Mutant(
        "no budget of several leaves the way to the tightest",
        "if turn.taken != mine.taken:",
        "if False:",
        "tests/search/test_frontier.py -x -k alone",
    ),
    Mutant(
        "a weighed budget of several ranks as the tightest does",
        "(budget.weighed and any(budget.met(proposal.plan) for proposal in own))",
        "False",
        "tests/search/test_frontier.py -k savings",
    ),
    Mutant(
        "an interrupted way to a budget is begun anew",
        "own = [step for step in self._begun if step.towards == label]",
        "own = list[Step]()",
        "tests/search/test_frontier.py -k interrupted",
    ),
    Mutant(
        "early stops know the least value of a reward of one's own",
        "objective.loss is not cross_entropy or objective.reward is not None:",
        "objective.loss is not cross_entropy:",
        "tests/search/test_settings.py -k own_reward",
    ),
    Mutant(
        "a cut is not compared operator by operator",
        "found = differences(self.source, self.predicted.counts, again)",
        "found = []",
        "tests/surgery/test_verification.py",
    ),
    Mutant(
        "a cut's shapes are not compared",
        "if shapes[old.name] != actual[new.name]:",
        "if False:",
        "tests/surgery/test_verification.py",
    ),
    Mutant(
        "a cut's cost is not compared",
        "if again.cost() != self.source.cost(self.predicted.plan):",
        "if False:",
        "tests/surgery/test_verification.py",
    ),
    Mutant(
        "a cut's outputs are not compared",
        "if off <= TOLERANCE.get(dtype, 0.05):",
        "if True:",
        "tests/surgery/test_verification.py",
    ),
    Mutant(
        "a cut is not trained",
        "fault = training_error(self.pruned, self.source) if self.trains else None",
        "fault = None",
        "tests/tracing/test_views.py tests/rewriting/test_replaced.py tests/rewriting/test_rewritten.py",
    ),
    Mutant(
        "a forward that is written anew trains as it evaluates, where nobody saw its training",
        "    if leaves_training:",
        "    if False:",
        "tests/rewriting/test_training_alone.py -k users_own",
    ),
    Mutant(
        "parameters that training writes to are outputs",
        "if spec.kind not in (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION):",
        "if spec.kind is not OutputKind.BUFFER_MUTATION:",
        "tests/rewriting/test_training_alone.py -k written_to",
    ),
    Mutant(
        "norms without parameters keep their width",
        "        _bare_norms(root, view, counts)",
        "        pass",
        "tests/graph/test_families.py -k norms_without_parameters",
    ),
    Mutant(
        "attention costs one product",
        "macs=[(*pairs, query[-1]), (*pairs, value[-1])],",
        "macs=[(*pairs, query[-1])],",
        "tests/graph/test_families.py -k attention",
    ),
    Mutant(
        "attention's second product is as wide as the first",
        "macs=[(*pairs, query[-1]), (*pairs, value[-1])],",
        "macs=[(*pairs, query[-1]), (*pairs, query[-1])],",
        "tests/graph/test_families.py -k attention",
    ),
    Mutant(
        "a transposed convolution costs its input channels twice",
        "macs=[(*x, *weight[1:])],",
        "macs=[(*x, *weight)],",
        "tests/graph/test_families.py -k transpos",
    ),
    Mutant(
        "an einsum costs one product of all letters",
        'for pair in _contractions(long, set(output), call["path"])]',
        "for pair in [set().union(*long)]]",
        "tests/graph/test_costs.py -k einsum",
    ),
    Mutant(
        "weights that nothing reads are free",
        'freeze(dim, f"{name} is not used by what was traced")',
        "pass",
        "tests/tracing/test_unseen.py",
    ),
    Mutant(
        "weights that nothing reads hold nothing back",
        'freeze(axis, f"may meet {name}, which is not used by what was traced")',
        "pass",
        "tests/tracing/test_unseen.py",
    ),
    Mutant(
        "an axis that occurs twice is told by its last occurrence",
        "index = torch.where(index[:, None] >= 0, index[:, None], inner).flatten()",
        "index = torch.where(inner >= 0, inner, index[:, None]).flatten()",
        "tests/graph/test_axes.py",
    ),
    Mutant(
        "Otsu's high class may hold one value",
        "low = np.arange(1, len(kept) - 1)",
        "low = np.arange(1, len(kept))",
        "tests/search/test_candidates.py",
    ),
    Mutant(
        "a candidate that only rounding puts behind is left",
        "last = race.ranking.behind(sorted(done)[accept - 1])",
        "last = sorted(done)[accept - 1]",
        "tests/search/test_race.py",
    ),
    Mutant(
        "INT8 ranges are chosen by the error, whatever the answers",
        """return self.loss, float("inf") if self.judged.error is None else self.judged.error""",
        """return (float("inf") if self.judged.error is None else self.judged.error), self.loss""",
        "tests/export/test_int8.py -k ranges_are_chosen",
    ),
    Mutant(
        "an INT8 scope that loses answers is taken for its speed",
        "good = [made for made in found if made.loss <= min(other.loss for other in found) + ENOUGH]",
        "good = found",
        "tests/export/test_int8.py -k for_its_speed",
    ),
    Mutant(
        "INT8 is judged by the images that it is calibrated on",
        "return single[::2], single[1::2], found.notes",
        "return single[::2], single[::2], found.notes",
        "tests/export/test_int8.py -k share_no_image",
    ),
    Mutant(
        "groups that are tied to an ignored one shrink",
        "held |= {*tie.members} if held & {*tie.members} else set()",
        "pass",
        "tests/surgery/test_ties.py -k ignored",
    ),
    Mutant(
        "tied groups keep the same number of channels, whatever their sizes",
        "steps = {name: self.groups[name].size // step for name in names}",
        "steps = dict.fromkeys(names, 1)",
        "tests/surgery/test_ties.py -k configuration_ties",
    ),
    Mutant(
        "repeated layers without a configuration have widths of their own",
        "return tied(traced.groups, [*widths, *role_widths(traced)], {})",
        "return tied(traced.groups, widths, {})",
        "tests/surgery/test_ties.py -k without_a_configuration",
    ),
    Mutant(
        "averages are those of the images, not corrected",
        'return corrected(old, full, cut, getattr(self.norms[name], "eps", 0.0))',
        "return cut",
        "tests/surgery/test_calibrate.py -k by_hand",
    ),
    Mutant(
        "a norm that is called twice is corrected by its first call",
        "full = calls.pop(0) if calls else cut",
        "full = calls[0] if calls else cut",
        "tests/surgery/test_calibrate.py -k call_by_call",
    ),
    Mutant(
        "a short batch counts as much as a full one in corrected averages",
        "share = samples / self.seen[name]",
        "share = 0.5 if name in self._sums else 1.0",
        "tests/surgery/test_calibrate.py -k in_the_correction",
    ),
    Mutant(
        "values are dropped before their last reader",
        "last = {used.name: node.name for node in nodes for used in (node, *node.all_input_nodes)}",
        "last = {node.name: node.name for node in nodes}",
        "tests/graph/test_liveness.py",
    ),
    Mutant(
        "what is wanted to the end is dropped",
        "        if name not in stay:\n            droppable",
        "        if True:\n            droppable",
        "tests/graph/test_liveness.py",
    ),
]


def place(mutant: Mutant) -> Path:
    """The one file of the package that holds the text."""
    files = [file for folder in ("ekgfx", "export") for file in sorted((ROOT / folder).rglob("*.py"))]
    texts = {file: file.read_text(encoding="utf-8").count(mutant.old) for file in files}
    if sum(texts.values()) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.old!r} stands {sum(texts.values())} times in the package, not once")
    return next(file.relative_to(ROOT) for file, found in texts.items() if found)


def passes(tests: str, tree: Path) -> bool:
    """Whether these tests pass. Raises SystemExit where they could not be run."""
    with tempfile.NamedTemporaryFile("r") as said:
        process = multiprocessing.get_context("fork").Process(target=run, args=(tests, tree, said.name))
        process.start()
        process.join()
        if process.exitcode not in (0, 1):
            raise SystemExit(f"{tests}: did not run\n{said.read()}")
    return process.exitcode == 0


def run(tests: str, tree: Path, said: str) -> None:
    """Ends the process as pytest ends."""
    import pytest

    os.chdir(tree)
    sys.dont_write_bytecode = True  # a mutant of the same length, written in the same second, would not be seen
    file = os.open(said, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *shlex.split(tests)])))


def survives(mutant: Mutant, tree: Path) -> bool:
    """Whether the tests pass nevertheless."""
    file = tree / place(mutant)
    before = file.read_text(encoding="utf-8")
    file.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        return passes(mutant.tests, tree)
    finally:
        file.write_text(before, encoding="utf-8")


def main(words: list[str]) -> int:
    for mutant in MUTANTS:
        place(mutant)
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if words == ["--list"]:
        print("\n".join(f"{place(mutant)}: {mutant.name}" for mutant in MUTANTS))
        return 0
    import onnxruntime  # noqa: F401  once for all: they take longer than most of the tests
    import timm  # noqa: F401

    left = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "runs"))
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            if not passes(tests, tree):
                raise SystemExit(f"{tests} fails without any mutant: mend that first")
        for mutant in chosen:
            alive = survives(mutant, tree)
            left += alive
            print(f"{'SURVIVED' if alive else 'killed  '}  {place(mutant)}: {mutant.name}", flush=True)
    print(f"{left} of {len(chosen)} survived")
    return min(left, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
