"""How long a step of a search takes: masked as in the authors' program, sliced, with shared prefixes, with everything.

    python benchmarks/search.py speed --data cifar10:DIR --weights resnet56-cifar10.safetensors --output FOLDER
    python benchmarks/search.py speed --network resnet50 --output FOLDER        # or vit_tiny

Everything is timed in one run on one thread, the ways of evaluating taken in turn at each of several states: the
network evenly cut to 100, 75 and 50% of its MACs (`--states 1`: the first alone). In CPU seconds of the process (what a
busy machine disturbs least; on a GPU, wall seconds). ResNet-56 is judged on the paper's batches of 256 and 64 images,
or as `--val-batch-size 64 --hardest-first` say, in all ways. Each measurement is a process of its own; its memory is
what that grew by over the network and its images. What is in FOLDER already is not measured again, so every kind of
batches needs a folder of its own. Whole searches: `search.py whole`.

- masked: the network at full size, its cut weights zero, whole for every candidate.
- sliced: really smaller tensors, whole for every candidate.
- prefixes: a candidate computes only what its cut changes; the rest is computed once per batch.
- contiguous: and values kept from the importance's forward pass, the accepted candidate not evaluated again, early
  stops.
- all: and channels last in memory, with norms made for it on the CPU, where this is the default (on a GPU: contiguous).

Of ResNet-50 and ViT-Tiny masked and sliced evaluate each third candidate, scaled up.
"""

import argparse
import json
import statistics
from typing import Any

import torch
from common import Lines, apart, environment, in_turn, with_memory
from parts.search_cases import UNTRAINED, Case, problem_of
from parts.search_ways import WAYS, timed

from ekgfx.base.files import write_json

EVERY = 3
"""Of the networks of 224×224 pixels, masked and sliced evaluate each third candidate."""


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    case = Case.of(asked)
    case.make(asked.data, asked.weights, asked.images)
    states = case.states(asked.states)
    record = Lines(case.folder / f"{asked.network}-{asked.device}.jsonl")
    for state in states:
        for turn, way in in_turn(asked.ways, asked.turns):
            key = {"network": asked.network, "state": state, "way": way, "turn": turn}
            if key not in record:
                record.add(key | apart(one, case, state, way))
    summary = summarized(case, list(record))
    write_json(record.path.with_suffix(".json"), summary)
    print(json.dumps(summary, indent=1))


def one(case: Case, name: str, way: str) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    traced, batches = case.opened()
    problem, state = problem_of(traced, batches), case.state(name)
    every = EVERY if case.name in UNTRAINED else 1
    found, memory = with_memory(lambda: timed(problem, state, way, every=every), case.device)
    return {**found, "memory": memory}


# -- the table -----------------------------------------------------------------------------------------------------


def summarized(case: Case, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the turns, ratios to masked, and agreement of the candidates' values."""
    states = list(dict.fromkeys(line["state"] for line in lines))
    pairs = {(line["state"], line["way"]) for line in lines}
    taken = {state: [way for way in WAYS if (state, way) in pairs] for state in states}

    def median(state: str, way: str, key: str) -> float:
        return statistics.median(line[key] for line in lines if (line["state"], line["way"]) == (state, way))

    return {
        "network": case.name,
        **environment(case.device),
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


def differs(lines: list[dict[str, Any]], state: str, way: str) -> dict[str, Any]:
    """Largest difference of −ℛ from that of `prefixes` (or masked), which evaluates all, and whether the best of the
    candidates that both evaluated is the same."""
    found = {line["way"]: line["negatives"] for line in lines if line["state"] == state}
    whole = found.get("prefixes", found["masked"])
    ours = {group: value for group, value in found[way].items() if value is not None and whole.get(group) is not None}
    exact = {group: whole[group] for group in ours}
    largest = max(abs(value - exact[group]) for group, value in ours.items())
    return {"largest": largest, "best": min(ours, key=ours.__getitem__) == min(exact, key=exact.__getitem__)}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=("resnet56", "resnet50", "vit_tiny"), default="resnet56")
    parser.add_argument("--data", default="cifar10:data/cifar10")
    parser.add_argument("--weights", default="data/weights/resnet56-cifar10.safetensors")
    parser.add_argument("--output", required=True)
    parser.add_argument("--images", type=int, default=64, help="of resnet50 and vit_tiny, in batches of 16")
    parser.add_argument("--val-batch-size", type=int, default=256, help="images in a batch of resnet56")
    parser.add_argument("--hardest-first", action="store_true", help="resnet56's hardest images in the first batches")
    parser.add_argument("--states", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--device", default="cpu")
