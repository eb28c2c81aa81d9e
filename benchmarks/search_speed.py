"""How long a search takes: masked as in the authors' program, sliced, with shared prefixes, and with everything.

    python benchmarks/search_speed.py --data cifar10:DIR --weights resnet56-cifar10.safetensors --output FOLDER
    python benchmarks/search_speed.py --network resnet50 --output FOLDER        # or vit_tiny

Everything is timed in one run on one thread, the ways of evaluating taken in turn at each of several states along the
search, as CPU seconds of the process (what a busy machine disturbs least; on a GPU, wall seconds). ResNet-56 is judged
on the paper's batches of 256 and 64 images, or as `--val-batch-size 64 --hardest-first` say, in all ways. Each
measurement is a process of its own; its memory is what that grew by over the network and its images. What is in FOLDER
already is not measured again, so every kind of batches needs a folder of its own.

- masked: the network at full size, its cut weights zero, whole for every candidate.
- sliced: really smaller tensors, whole for every candidate.
- prefixes: a candidate computes only what its cut changes; the rest is computed once per batch.
- contiguous: and values kept from the importance's forward pass, the accepted candidate not evaluated again, early
  stops.
- all: and channels last in memory, with norms made for it on the CPU, where this is the default (on a GPU: contiguous).

States are the network evenly cut to 100, 75 and 50% of its MACs (`--states 1`: the first alone). With `--whole`, the
whole ResNet-56 search is run with `all`, and the states are those before `--states` of its steps, evenly spread: masked
and sliced then evaluate every candidate (else each third), and whether they choose as the search did is compared. The
other ways' totals are estimates: importance, accepted network and candidate at the states, interpolated over the steps,
times the candidates of each. With `--check` the search is also run plainly, without early stops, kept values and
channels last, and all steps are compared.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from search_cases import IMAGES, Case, problem_of
from search_ways import WAYS, apart, timed, with_memory

from ekgfx.files import append_line, read_lines, write_json

PARTS = ("importance", "candidate", "accepted", "step")
EVERY = 3
"""Where there is no search to compare with, masked and sliced evaluate each third candidate."""


def main() -> None:
    asked = arguments()
    torch.set_num_threads(1)
    folder = Path(asked.output)
    folder.mkdir(parents=True, exist_ok=True)
    case = Case(asked.network, folder, torch.device(asked.device), asked.val_batch_size, asked.hardest_first)
    if asked.one:
        print(json.dumps(one(case, *asked.one)))
        return
    case.make(asked.data, asked.weights, asked.images)
    if asked.whole and asked.network == "resnet56":
        case.search()
        if asked.check:
            case.search(plain=True)
    states = case.states(asked.states)
    record = folder / f"{asked.network}-{asked.device}.jsonl"
    done = {(line["state"], line["way"], line["turn"]) for line in read_lines(record)}
    for turn in range(asked.turns):
        for state in states:
            for way in asked.ways:
                if (state, way, turn) not in done:
                    here = ("--network", asked.network, "--device", asked.device, "--output", asked.output)
                    found = apart(*here, "--one", state, way)
                    line = {"network": asked.network, "state": state, "way": way, "turn": turn, **found}
                    append_line(record, line)
                    print(line, flush=True)
    summary = summarized(case, read_lines(record))
    write_json(record.with_suffix(".json"), summary)
    print(json.dumps(summary, indent=1))


def one(case: Case, name: str, way: str) -> dict[str, Any]:
    """One measurement, in this process."""
    traced, batches = case.opened()
    problem, state = problem_of(traced, batches), case.state(name)
    every = EVERY if case.name in IMAGES else 1
    return with_memory(case.device, lambda: timed(problem, state, way, every=every))


# -- the table -----------------------------------------------------------------------------------------------------


def summarized(case: Case, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns, ratios to masked, agreement of the candidates' values, and totals of the whole search."""
    states = list(dict.fromkeys(line["state"] for line in lines))
    pairs = {(line["state"], line["way"]) for line in lines}
    taken = {state: [way for way in WAYS if (state, way) in pairs] for state in states}

    def median(state: str, way: str, key: str) -> float:
        return statistics.median(line[key] for line in lines if (line["state"], line["way"]) == (state, way))

    summary: dict[str, Any] = {
        "network": case.name,
        "hardware": f"{platform.processor() or platform.machine()}, {case.device.type}, one thread",
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
    if case.history().exists():
        summary["search"] = dict(totals(read_lines(case.history()), lines, taken, median))
        if plain := read_lines(case.history(plain=True)):
            summary["search"]["plain"] = compared(read_lines(case.history()), plain)
    return summary


def differs(lines: list[dict[str, Any]], state: str, way: str) -> dict[str, Any]:
    """Largest difference of −ℛ from that of `prefixes` (or masked), which evaluates all, and whether the best of the
    candidates that both evaluated is the same."""
    found = {line["way"]: line["negatives"] for line in lines if line["state"] == state}
    whole = found.get("prefixes", found["masked"])
    ours = {group: value for group, value in found[way].items() if value is not None and whole.get(group) is not None}
    exact = {group: whole[group] for group in ours}
    largest = max(abs(value - exact[group]) for group, value in ours.items())
    return {"largest": largest, "best": min(ours, key=ours.__getitem__) == min(exact, key=exact.__getitem__)}


def totals(
    run: list[dict[str, Any]],
    lines: list[dict[str, Any]],
    taken: Mapping[str, list[str]],
    median: Callable[[str, str, str], float],
) -> Iterator[tuple[str, Any]]:
    """Seconds of the whole search: measured for `all`, for each way estimated from the states. And at how many of these
    a way that evaluated every candidate found best what the search had taken."""
    states = list(taken)
    places = [int(state) for state in states]
    for way in (way for way in WAYS if all(way in taken[state] for state in states)):
        parts = {key: [median(state, way, key) for state in states] for key in PARTS[:3]}
        each = {key: np.interp(range(len(run)), places, values) for key, values in parts.items()}
        estimate = sum(
            each["importance"][i] + each["accepted"][i] + each["candidate"][i] * len(step["candidates"])
            for i, step in enumerate(run)
        )
        chosen = {line["state"]: min(known(line), key=known(line).__getitem__) for line in lines if line["way"] == way}
        same = sum([*run[int(state)]["removed"]] == [best] for state, best in chosen.items())
        yield way, {"estimated": round(estimate, 1), "same choice": f"{same} of {len(chosen)}"}
    yield "measured", round(sum(step["seconds"] for step in run), 1)
    yield "steps", len(run)
    yield "candidates", sum(len(step["candidates"]) for step in run)
    yield "stopped", sum(c["at_least"] is not None for step in run for c in step["candidates"])


def compared(run: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """The plain search beside `run`: how many steps of the longer one are the same in both, and its seconds."""
    same = sum(a["removed"] == b["removed"] for a, b in zip(run, plain, strict=False))
    seconds = round(sum(step["seconds"] for step in plain), 1)
    return {"same steps": f"{same} of {max(len(run), len(plain))}", "measured": seconds}


def known(line: Mapping[str, Any]) -> dict[str, float]:
    """−ℛ of the candidates that were evaluated to their end."""
    return {group: value for group, value in line["negatives"].items() if value is not None}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--network", choices=("resnet56", "resnet50", "vit_tiny"), default="resnet56")
    parser.add_argument("--data", default="cifar10:data/cifar10")
    parser.add_argument("--weights", default="data/weights/resnet56-cifar10.safetensors")
    parser.add_argument("--output", required=True)
    parser.add_argument("--images", type=int, default=64, help="of resnet50 and vit_tiny, in batches of 16")
    parser.add_argument("--val-batch-size", type=int, default=256, help="images in a batch of resnet56")
    parser.add_argument("--hardest-first", action="store_true", help="resnet56's hardest images in the first batches")
    parser.add_argument("--whole", action="store_true", help="run the whole search of resnet56, and take its states")
    parser.add_argument("--check", action="store_true", help="with --whole: run it plainly too, and compare every step")
    parser.add_argument("--states", type=int, default=4)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("STATE", "WAY"), help="measure this one, and print it")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    main()
