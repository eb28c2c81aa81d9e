"""How long a whole search takes: masked as in the authors' program, sliced, and with everything; do they find the same?

    python benchmarks/search.py whole --data cifar10:DIR --weights resnet56-cifar10.safetensors --output FOLDER
    python benchmarks/search.py whole --network resnet50_keras --data folder:imagenet-sample --keep 0.55 --accept 8 \\
        --weights resnet50-imagenet-keras-fp16.safetensors --output FOLDER

First `ekgfx.search` with its defaults, to `--keep` of the MACs with `--accept` groups a step. Then every one of its
steps again in each of the `--ways`, in turn within one process, on one thread, in CPU seconds (on a GPU, wall seconds):
what else runs on the machine disturbs all of them alike. Each way decides for itself what to remove; the summary tells
at how many steps it took the search's groups, and how many channels are others. So as long as all agree, the
sums are those of whole searches, with nothing estimated. The ways: see `search.py speed --help`.
FOLDER/NETWORK-DEVICE.jsonl tells the sums, then the steps.

ResNet-56 is judged on 320 images after step 0, in the paper's batches of 256 and 64, or as `--val-batch-size 64
--hardest-first` say; the ResNet-50 of `examples/resnet50_keras.py` on `--images` of a folder's, in batches of 16,
without a step 0. What is in FOLDER already is not done again: the same command goes on after the last step.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from common import environment
from parts.search_cases import Case, problem_of, unpruned
from parts.search_ways import WAYS, clock, in_the_way, timed

import ekgfx
from ekgfx.base.files import append_line, read_lines, replacing
from ekgfx.search import Step, ekg
from ekgfx.search.result import as_steps

Line = dict[str, Any]


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    case = Case.of(asked)
    case.make(asked.data, asked.weights, asked.images)
    search, record = (case.folder / f"{asked.network}-{asked.device}-{what}.jsonl" for what in ("search", "turns"))
    searched(case, search, asked.keep, asked.accept)
    in_turn(case, as_steps(read_lines(search)), record, asked)
    run, ways = read_lines(search), by_way(record)
    summary = summarized(asked, run, ways)
    table = [summary, *(step_told(step, ways) for step in run)]
    with replacing(case.folder / f"{asked.network}-{asked.device}.jsonl") as partial:
        partial.write_text("".join(f"{json.dumps(line)}\n" for line in table), encoding="utf-8")
    print(json.dumps(summary, indent=1))


def searched(case: Case, history: Path, keep: float, accept: int) -> None:
    """The search with its defaults, resumed from its history; the seconds of each step are noted in it."""
    steps = as_steps(read_lines(history))
    if steps and steps[-1].kept_fraction <= keep:
        return
    traced, batches = case.opened()
    last = [clock(traced)]

    def note(step: Step) -> None:
        now = clock(traced)
        append_line(history, {**step.to_json(), "seconds": now - last[0]})
        last[0] = now
        print(f"step {step.number}: {step.kept_fraction:.3f}, {now:.0f} s", flush=True)

    ekgfx.search(traced, batches, flops=keep, accept=accept, on_step=note, resume_from=steps)


def in_turn(case: Case, steps: tuple[Step, ...], record: Path, asked: argparse.Namespace) -> None:
    """Every step in each of the ways; the order of these changes from step to step."""
    done = {(line["number"], line["way"]) for line in read_lines(record)}
    if all((step.number, way) in done for step in steps for way in asked.ways):
        return
    problem = problem_of(*case.opened(), asked.keep)
    default = "all" if case.device.type == "cpu" else "contiguous"
    usual = in_the_way(default, problem)
    state = unpruned(usual)
    timed(problem, state, default)  # memory that the process is the first to touch
    for step in steps:
        shift = step.number % len(asked.ways)
        for way in [*asked.ways[shift:], *asked.ways[:shift]]:
            if (step.number, way) not in done:
                found = timed(problem, state, way, ekg.Pace(accept=asked.accept))
                append_line(record, {"number": step.number, "way": way, **found})
                print(step.number, way, round(found["step"], 2), flush=True)
        state = ekg.replay(usual, state, step)


# -- the table -----------------------------------------------------------------------------------------------------


def summarized(asked: argparse.Namespace, run: list[Line], ways: dict[str, list[Line]]) -> Line:
    """Seconds of each way and of its parts, over all steps, and agreement with the search."""
    first = next(iter(ways))
    total = {way: sum(line["step"] for line in lines) for way, lines in ways.items()}
    return {
        "network": asked.network,
        "keep": asked.keep,
        "accept": asked.accept,
        **environment(torch.device(asked.device)),
        "search": {
            "seconds": round(sum(step["seconds"] for step in run), 1),
            "steps": len(run),
            "candidates": sum(len(step["candidates"]) for step in run),
            "left early": sum(c["at_least"] is not None for step in run for c in step["candidates"]),
            "channels": sum(len(removed) for step in run for removed in step["removed"].values()),
        },
        "ways": {
            way: {
                "seconds": round(total[way], 1),
                "importance": round(sum(line["importance"] for line in lines), 1),
                "candidates": round(sum(line["candidate"] * line["candidates"] for line in lines), 1),
                "accepted": round(sum(line["accepted"] for line in lines), 1),
                "times faster": round(total[first] / total[way], 2),
                "same groups": sum({*line["removed"]} == {*step["removed"]} for line, step in paired(lines, run)),
                "other channels": sum(others(line, step) for line, step in paired(lines, run)),
                "differs at most": max(apart(*both) for both in paired(ways[first], lines)),
            }
            for way, lines in ways.items()
        },
    }


def by_way(record: Path) -> dict[str, list[Line]]:
    """What each way took, by step."""
    lines = sorted(read_lines(record), key=lambda line: line["number"])
    found = {way: [line for line in lines if line["way"] == way] for way in WAYS}
    return {way: lines for way, lines in found.items() if lines}


def paired(one: list[Line], other: list[Line]) -> list[tuple[Line, Line]]:
    """The lines of the same steps."""
    return list(zip(one, other, strict=True))


def step_told(step: Line, ways: dict[str, list[Line]]) -> Line:
    """A step: what the search removed, and what each way took."""
    number = step["number"]
    found = {way: {key: told(lines[number - 1][key]) for key in TOLD} for way, lines in ways.items()}
    return {"step": number, "kept": told(step["kept_fraction"]), "removed": step["removed"], **found}


TOLD = ("importance", "candidate", "accepted", "candidates", "stopped", "step")


def told(value: float) -> float:
    return round(value, 4)


def others(line: Line, step: Line) -> int:
    """How many of the channels that the search removed in a step a way left, taking others."""
    return sum(len({*removed} - {*line["removed"].get(group, ())}) for group, removed in step["removed"].items())


def apart(one: Line, other: Line) -> float:
    """The largest difference of −ℛ, relative to it, between candidates that both evaluated to their end."""
    ours, theirs = one["negatives"], other["negatives"]
    both = [group for group, value in ours.items() if value is not None and theirs.get(group) is not None]
    return max((abs(ours[group] - theirs[group]) / abs(ours[group]) for group in both), default=0.0)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=("resnet56", "resnet50_keras"), default="resnet56")
    parser.add_argument("--data", default="cifar10:data/cifar10")
    parser.add_argument("--weights", default="data/weights/resnet56-cifar10.safetensors")
    parser.add_argument("--output", required=True)
    parser.add_argument("--keep", type=float, default=0.45)
    parser.add_argument("--accept", type=int, default=1, help="groups that a step cuts")
    parser.add_argument("--images", type=int, default=64, help="of resnet50_keras, in batches of 16")
    parser.add_argument("--val-batch-size", type=int, default=256, help="images in a batch of resnet56")
    parser.add_argument("--hardest-first", action="store_true", help="resnet56's hardest images in the first batches")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["masked", "sliced", "all"])
    parser.add_argument("--device", default="cpu")
