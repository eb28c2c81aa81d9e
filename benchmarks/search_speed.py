"""How long a search takes: masked as in the authors' program, sliced, with shared prefixes, and with everything.

    python benchmarks/search_speed.py --data cifar10:DIR --weights resnet56-cifar10.safetensors --output FOLDER
    python benchmarks/search_speed.py --network resnet50 --output FOLDER        # or vit_tiny

Everything is timed in one run on one thread, the ways of evaluating taken in turn at each of several states along the
search, as CPU seconds of the process (what a busy machine disturbs least; on a GPU, wall seconds). Each measurement is
a process of its own (a fork); its memory is what that grew by. What is in FOLDER already is not measured again.

- masked: the network at full size, its cut weights zero, whole for every candidate.
- sliced: really smaller tensors, whole for every candidate.
- prefixes: a candidate computes only what its cut changes; the rest is computed once per batch.
- contiguous: and values kept from the importance's forward pass, the accepted candidate not evaluated again, early
  stops.
- all: and channels last in memory, with norms made for it. The default.

States are the network evenly cut to 100, 75 and 50% of its MACs (`--states 1`: the first alone). With `--whole`, the
whole ResNet-56 search is run with `all` (and with `--check`, without cache, early stops and channels last, to compare
the plans), and the states are its own; the other ways' totals are estimates: importance, accepted network and candidate
at the states, interpolated over the steps, times the candidates of each.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from search_ways import WAYS, apart, clock, timed

import ekgfx
from ekgfx import data as datasets
from ekgfx.models import resnet56_cifar
from ekgfx.plan import Plan
from ekgfx.prepare import prepare
from ekgfx.run import read_lines, write_json
from ekgfx.search import Step
from ekgfx.search.problem import Budget, Problem, width_rules
from ekgfx.search.result import apply_step, as_steps
from ekgfx.search.reward import Objective, label_free, validation_batches
from ekgfx.trace import TracedModel
from ekgfx.weights import load_weights

PARTS = ("importance", "candidate", "accepted", "step")
KEEP = 0.45


@dataclass(frozen=True)
class Case:
    """A network with the problem of a search; states: plans along the search, by name."""

    problem: Problem
    states: Mapping[str, Plan]


def main() -> None:
    asked = arguments()
    torch.set_num_threads(1)
    folder = Path(asked.output)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(asked.device)
    if asked.network == "resnet56":
        case = resnet56(asked, folder, device)
    else:
        case = on_photos(asked.network, asked.images, device)
        case = replace(case, states=dict(list(case.states.items())[: asked.states]))
    record = folder / f"{asked.network}-{device.type}.jsonl"
    done = {(line["state"], line["way"], line["turn"]) for line in read_lines(record)}
    for turn in range(asked.turns):
        for name, plan in case.states.items():
            for way in asked.ways:
                if (name, way, turn) not in done:
                    found = apart(lambda way=way, plan=plan: timed(case.problem, plan, way), device)
                    line = {"network": asked.network, "state": name, "way": way, "turn": turn, **found}
                    with record.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    print(line, flush=True)
    summary = summarized(asked.network, read_lines(record), folder, device)
    write_json(folder / f"{asked.network}-{device.type}.json", summary)
    print(json.dumps(summary, indent=1))


# -- what is searched ----------------------------------------------------------------------------------------------


def resnet56(asked: argparse.Namespace, folder: Path, device: torch.device) -> Case:
    """CIFAR's ResNet-56 on 320 images after step 0, and the states of its whole search."""
    model = resnet56_cifar()
    load_weights(model, Path(asked.weights))
    model.to(device)
    normal = model.pretrained_cfg
    data = datasets.load(asked.data, mean=normal["mean"], std=normal["std"]).to(device)
    prepared_weights = folder / f"prepared-{device.type}.pt"
    if prepared_weights.exists():
        model.load_state_dict(torch.load(prepared_weights))
        batches = prepare(model, data, train_per_class=0).batches
        _, val = data.search_subset(256, 32, 0)
        batches = tuple((b.images, b.labels) for b in data.loader("train", 256, subset=val))
    else:
        batches = prepare(model, data).batches
        torch.save(model.state_dict(), prepared_weights)
    model.eval()
    traced = ekgfx.trace(model, batches[0][0][:2])
    problem = problem_of(traced, batches)
    if not asked.whole:
        return Case(problem, evenly_cut(problem))
    steps = whole(traced, batches, folder / f"search-all-{device.type}.jsonl")
    if asked.check:
        plain = {"early_stop": False, "cache": 0, "channels_last": False}
        whole(traced, batches, folder / f"search-plain-{device.type}.jsonl", **plain)
    plans, sizes = [problem.full()], {name: group.size for name, group in traced.groups.items()}
    for step in steps:
        plans.append(apply_step(plans[-1], step, sizes))
    places = np.linspace(0, len(steps) - 1, asked.states).round().astype(int)
    return Case(problem, {str(place): plans[place] for place in places})


def evenly_cut(problem: Problem) -> dict[str, Plan]:
    """The whole network, and it with one width for all groups at two fractions of its MACs."""
    states = {"1.00": problem.full()}
    for keep in (0.75, 0.5):
        plan = ekgfx.search(problem.traced, flops=keep, strategy="uniform", importance="magnitude").plan
        states[f"{keep:.2f}"] = replace(plan, rescale=problem.rescale)
    return states


def whole(traced: TracedModel, batches: Any, history: Path, **options: Any) -> tuple[Step, ...]:
    """The steps of a whole search, resumed from its history; the CPU seconds of each are noted beside."""
    steps = as_steps(read_lines(history))
    if steps and steps[-1].kept_fraction <= KEEP:
        return tuple(steps)
    last = [clock(traced)]

    def note(step: Step) -> None:
        now = clock(traced)
        line = {**step.to_json(), "seconds": now - last[0]}
        last[0] = now
        with history.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{history.stem} step {step.number}: {step.kept_fraction:.3f}, {line['seconds']:.1f} s", flush=True)

    return ekgfx.search(traced, batches, flops=KEEP, on_step=note, resume_from=steps, **options).steps


def on_photos(name: str, images: int, device: torch.device) -> Case:
    """A network of timm with random weights on photographs, label-free; states of evenly cut widths."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model({"vit_tiny": "vit_tiny_patch16_224"}.get(name, name)).eval().to(device)
    data = datasets.load("photos", image_size=224).to(device)
    loader = data.loader("train", images // 2, subset=range(images))
    batches = [(batch.images, None) for batch in loader]
    traced = ekgfx.trace(model, batches[0][0][:2])
    problem = problem_of(traced, batches)
    return Case(problem, evenly_cut(problem))


def problem_of(traced: TracedModel, batches: Any) -> Problem:
    """The problem that `ekgfx.search` poses with its defaults."""
    norms = any(operation.target is torch.ops.aten.batch_norm.default for operation in traced.operations)
    problem = Problem(
        traced=traced,
        batches=validation_batches(batches),
        objective=Objective(),
        budget=Budget.of(lambda plan: traced.cost(plan).macs, KEEP, "MACs"),
        rules=width_rules(traced, frozenset(), 1, 0.0),
        guided=True,
        ensemble=True,
        rescale=norms,
    )
    if problem.batches[0].target is None:
        soft = label_free(problem.network(problem.full()), problem.batches, problem.objective)
        problem = replace(problem, batches=soft)
    return problem


# -- the table -----------------------------------------------------------------------------------------------------


def summarized(network: str, lines: list[dict[str, Any]], folder: Path, device: torch.device) -> dict[str, Any]:
    """Medians over the turns, ratios to masked, agreement of the candidates' values, and totals of the whole search."""
    states = list(dict.fromkeys(line["state"] for line in lines))
    pairs = {(line["state"], line["way"]) for line in lines}
    taken = {state: [way for way in WAYS if (state, way) in pairs] for state in states}

    def median(state: str, way: str, key: str) -> float:
        return statistics.median(line[key] for line in lines if (line["state"], line["way"]) == (state, way))

    summary: dict[str, Any] = {
        "network": network,
        "hardware": f"{platform.processor() or platform.machine()}, {device.type}, one thread",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "states": {
            state: {
                way: {
                    **{
                        key: round(median(state, way, key), 3)
                        for key in ("importance", "candidate", "accepted", "step")
                    },
                    "memory": median(state, way, "memory"),
                    "times faster": round(median(state, "masked", "step") / median(state, way, "step"), 2),
                    "differs": differs(lines, state, way),
                }
                for way in taken[state]
            }
            for state in states
        },
    }
    if network == "resnet56" and (folder / f"search-all-{device.type}.jsonl").exists():
        summary["search"] = dict(totals(folder, device, taken, median))
    return summary


def differs(lines: list[dict[str, Any]], state: str, way: str) -> dict[str, Any]:
    """Largest difference of −ℛ from that of `prefixes`, which evaluates all, and whether the best of the candidates
    that both evaluated is the same."""
    found = {line["way"]: line["negatives"] for line in lines if line["state"] == state}
    whole = found.get("prefixes", found["masked"])
    known = {group: value for group, value in found[way].items() if value is not None and group in whole}
    exact = {group: whole[group] for group in known}
    largest = max(abs(value - exact[group]) for group, value in known.items())
    return {"largest": largest, "best": min(known, key=known.__getitem__) == min(exact, key=exact.__getitem__)}


def totals(
    folder: Path,
    device: torch.device,
    taken: Mapping[str, list[str]],
    median: Callable[[str, str, str], float],
) -> Iterator[tuple[str, Any]]:
    """Seconds of the whole search in every way: measured where it was run, else estimated from the states."""
    run = read_lines(folder / f"search-all-{device.type}.jsonl")
    states = list(taken)
    places = [int(state) for state in states]
    measured = {}
    for way in (way for way in WAYS if all(way in taken[state] for state in states)):
        history = folder / f"search-{way.replace(' ', '-')}-{device.type}.jsonl"
        parts = {key: [median(state, way, key) for state in states] for key in PARTS[:3]}
        each = {key: np.interp(range(len(run)), places, values) for key, values in parts.items()}
        estimate = sum(
            each["importance"][i] + each["accepted"][i] + each["candidate"][i] * len(step["candidates"])
            for i, step in enumerate(run)
        )
        if history.exists():
            measured[way] = sum(step["seconds"] for step in read_lines(history))
        yield way, {"estimated": round(estimate, 1), "measured": measured.get(way)}
    yield "steps", len(run)
    yield "candidates", sum(len(step["candidates"]) for step in run)
    yield "stopped", sum(c["at_least"] is not None for step in run for c in step["candidates"])
    for path in sorted(folder.glob(f"search-*-{device.type}.jsonl")):
        other = read_lines(path)
        same = [a["removed"] == b["removed"] for a, b in zip(run, other, strict=False)]
        yield f"same steps as all: {path.stem}", f"{sum(same)} of {len(run)}, {len(other)} steps"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--network", choices=("resnet56", "resnet50", "vit_tiny"), default="resnet56")
    parser.add_argument("--data", default="cifar10:data/cifar10")
    parser.add_argument("--weights", default="data/weights/resnet56-cifar10.safetensors")
    parser.add_argument("--output", required=True)
    parser.add_argument("--images", type=int, default=64, help="of resnet50 and vit_tiny, in two batches")
    parser.add_argument("--whole", action="store_true", help="run the whole search of resnet56, and take its states")
    parser.add_argument("--states", type=int, default=4)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="run the search without cache and early stops too")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
