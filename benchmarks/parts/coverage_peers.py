"""The networks of the coverage sweeps cut by another tool: does the result run, and is it right? Resumable.

    python benchmarks/coverage.py torch-pruning --output benchmarks/results/coverage-torch-pruning.jsonl
    python benchmarks/coverage.py torch-kirigami --output benchmarks/results/coverage-torch-kirigami.jsonl
    python benchmarks/coverage.py torch-pruning --output benchmarks/results/coverage-torch-pruning.jsonl --table

One model of each timm module, the architectures of transformers, the networks of the other libraries. Each tool cuts
half of what it finds, as its documentation says (`parts/coverage_peers_cuts.py`). Torch-Pruning is told which layers
give the outputs, and the number of heads where the attention is named as usual; torch-kirigami gets activations that do
not write in place, as its messages ask for. "Runs": the result has fewer parameters, and its outputs the shapes of the
original's. "Right": its outputs equal, to 1e-6 (1e-4 in float32), those of the original with zeros in place of what was
cut, where norms over channels take their statistics over what is kept. What was cut is read off the result, whose
parameters are made to hold their own positions before the tool cuts them. "Not decided": a norm without weights does
not say what it keeps, and weights that are standardized have statistics of their own. "In time": 30 CPU seconds of one
thread, 60 for torch-kirigami. Seconds: until the tool knows which layers are coupled.
"""

import argparse
import copy
import importlib.metadata
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from common import Lines, Row, listed
from parts import coverage_transformers
from parts.coverage_int8 import one_per_module
from parts.coverage_networks import NETWORKS
from parts.coverage_peers_cuts import Subject, by_kirigami, by_torch_pruning
from parts.coverage_tables import begun, spread, sweep, sweep_options, works
from parts.coverage_timm import export

TEXT = __doc__ or ""
STATUSES = {
    "right": "runs, and is right",
    "runs": "runs; not decided",
    "wrong": "runs, and computes something else",
    "nothing cut": "nothing cut",
    "does not run": "the cut network does not run",
    "error": "fails, or no result in time",
}


def subject(name: str) -> Subject:
    """A network by the name that its sweep gives it, with what ekgfx traced, and its weights drawn."""
    import timm

    import ekgfx
    from ekgfx.surgery.check import perturb

    if timm.is_model(name):
        model = timm.create_model(name).eval().double()
        x, program, _ = export(model)
        perturb(model)
        return Subject(model, (x,), {}, ekgfx.TracedModel(model, program, ((x,), {})))
    kind, _, short = name.partition(":")
    if kind in NETWORKS:
        network = NETWORKS[kind][short]()
        model = network.model.eval().double() if network.double else network.model.eval().float()
        inputs = network.inputs(2, False)
        perturb(model)
        return Subject(model, inputs, {}, ekgfx.trace(model, inputs, leaf=network.leaf))
    model, kwargs, _ = coverage_transformers.build(name)
    coverage_transformers.perturb(model)
    asked = coverage_transformers.asked_for(name, model, kwargs)
    return Subject(model, (), kwargs, ekgfx.trace(model, kwargs, **asked))


def names() -> list[str]:
    """All networks: the small ones of transformers, then those of the other libraries and timm's in turn."""
    libraries = ([f"{library}:{short}" for short in networks] for library, networks in NETWORKS.items())
    return [*coverage_transformers.listed(), *spread([one_per_module(listed()), spread(libraries)])]


def too_long(*_: Any) -> None:
    raise TimeoutError("no result in time")


@dataclass(frozen=True)
class Peer:
    """One tool as a part of the program. cut: builds its graph, and gives what cuts the network then. limit: the CPU
    seconds that it may take."""

    package: str
    cut: Callable[[Subject], Callable[[], Any]]
    limit: int
    __doc__: str = ""

    def measure(self, name: str) -> Row:
        """The row of one network."""
        import torch

        begun()
        given = subject(name)
        row: Row = {"model": name, "version": importlib.metadata.version(self.package)}
        twin = replace(given, model=copy.deepcopy(given.model))

        def cut() -> None:
            apply = self.cut(twin)
            row["seconds"] = round(time.process_time() - start, 2)
            with torch.no_grad():
                for tensor in twin.model.state_dict().values():
                    tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
            apply()

        start = time.process_time()
        signal.signal(signal.SIGPROF, too_long)
        signal.setitimer(signal.ITIMER_PROF, self.limit)
        fault = works(cut)
        signal.setitimer(signal.ITIMER_PROF, 0)
        return row | ({"status": "error", "message": fault} if fault else judged(given, twin.model))

    def main(self, asked: argparse.Namespace) -> None:
        found = Lines(asked.output)
        if asked.table:
            print(table(self.package, list(found)))
        else:
            asked_for = asked.models or names()
            if any(library(name) == "transformers" for name in asked_for):
                import transformers  # noqa: F401  the processes that are forked have it
            sweep(self.measure, asked_for, found)

    def options(self, parser: argparse.ArgumentParser) -> None:
        sweep_options(parser, "a timm name, KIND:ARCHITECTURE or LIBRARY:NETWORK (default: all of them)")


def judged(given: Subject, twin: Any) -> Row:
    """Whether a network runs, whose parameters hold the positions that they had in the original, and is right."""
    import torch

    from ekgfx.surgery.check import relative_error

    model, state = given.model, given.model.state_dict()
    kept = {name: code.long().flatten() for name, code in twin.state_dict().items()}
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, twin))
    row: Row = {"params_kept": round(after / before, 4)}
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for (name, code), target in zip(twin.state_dict().items(), masked.state_dict().values(), strict=True):
            full = state[name].flatten()
            stays = torch.zeros(full.shape, dtype=torch.bool)
            stays[kept[name]] = True
            target.copy_(torch.where(stays.reshape(target.shape), target, torch.zeros_like(target)))
            code.copy_(full[kept[name]].reshape(code.shape))
        expected, got = given.outputs(model), list[Any]()
        if fault := works(lambda: got.extend(given.outputs(twin.eval()))):
            return row | {"status": "does not run", "message": fault}
        if [t.shape for t in got] != [t.shape for t in expected]:
            return row | {"status": "does not run", "message": "the output has another shape"}
        if after == before:
            return row | {"status": "nothing cut"}
        decided = over_what_is_kept(masked, twin, kept)
        row["error"] = relative_error(got, given.outputs(masked))
    near = 1e-6 if torch.float64 in {t.dtype for t in expected} else 1e-4
    return row | {"status": "right" if row["error"] <= near else "wrong" if decided else "runs"}


def over_what_is_kept(masked: Any, twin: Any, kept: Mapping[str, Any]) -> bool:
    """Lets norms over channels compute as those of the cut network do, on the channels that it keeps; whether that is
    all that takes statistics over them."""
    decided = True
    for name, module in masked.named_modules():
        kind = type(module).__name__
        decided &= not any(name in kind for name in ("StdConv", "WeightStandardized"))  # statistics over weights
        if not any(name in kind for name in ("Norm", "GRN")) or "Batch" in kind:
            continue
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 1:
            decided = decided and any(True for _ in module.children())  # what holds norms is none itself
            continue
        module.forward = on_kept(twin.get_submodule(name), kept[f"{name}.weight"], len(weight), "Layer" in kind)
    return decided


def on_kept(cut: Any, index: Any, size: int, last: bool) -> Callable[[Any], Any]:
    """A norm's forward, done by that of the cut network on the positions that it keeps."""

    def forward(x: Any, *more: Any, **options: Any) -> Any:
        dims = [d for d, n in enumerate(x.shape) if n == size and d]
        dim = dims[-1 if last else 0]
        return x.new_zeros(x.shape).index_copy(dim, index, cut(x.index_select(dim, index), *more, **options))

    return forward


def library(name: str) -> str:
    """Which a network is of."""
    kind, colon, _ = name.partition(":")
    return kind if kind in NETWORKS else "transformers" if colon else "timm"


def table(package: str, rows: list[Row]) -> str:
    """How the networks of each library end."""
    kinds = ["timm", "transformers", *NETWORKS]
    counts: Mapping[str, Counter[str]] = {
        kind: Counter(row["status"] for row in rows if library(row["model"]) == kind) for kind in kinds
    }
    lines = [
        f"| {package} {', '.join(sorted({row['version'] for row in rows if 'version' in row}))} "
        f"| {' | '.join(STATUSES.values())} |",
        "|---" * (len(STATUSES) + 1) + "|",
    ]
    for kind, count in counts.items():
        if count:
            cells = [count[status] for status in STATUSES]
            lines.append(f"| {kind}, {count.total()} | " + " | ".join(map(str, cells)) + " |")
    total = Counter(row["status"] for row in rows)
    cells = [total[status] for status in STATUSES]
    lines.append(f"| **together, {total.total()}** | " + " | ".join(f"**{cell}**" for cell in cells) + " |")
    return "\n".join(lines) + "\n"


PEERS = {
    "torch-pruning": Peer("torch-pruning", by_torch_pruning, 30, TEXT),
    "torch-kirigami": Peer("torch-kirigami", by_kirigami, 60, TEXT),
}
