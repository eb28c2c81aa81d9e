"""At the same latency, does a search that is paid by the millisecond keep more than one that is paid by the MAC?

    python benchmarks/imagenet.py latency --images folder:imagenet-sample \
        --weights resnet50-imagenet-keras-fp16.safetensors --target cpu:fp32:batch=1:threads=1 \
        --search-images 96 --output benchmarks/results/latency_reward.json

All searches stop at the first plan whose predicted latency is within the budget, on the same images, with the same
table of layer timings. "MACs" and "MACs aligned" take in every step the candidate of the highest reward (eq. 3), as a
search for a budget of MACs does (`--flops`, `--flops --align`): its path is the same, only where it ends is told by the
clock. "latency" takes the one that loses the least reward per millisecond saved (`--latency`). The last two have widths
on whole tiles of the hardware.

What they keep is judged by the reward against the knowledge of the unpruned network, which is the same for all, on the
images of the search and on others; and by the accuracy and loss on those others, BatchNorm's statistics estimated anew,
without any fine-tuning. What the networks really take is the shortest of 30 runs in turn. A search that was interrupted
goes on after its last step.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Sheet, chosen
from ekgfx.export import to_onnx
from ekgfx.export.layers import fp16, network_of
from ekgfx.export.profile import whole_runs
from gpu.latency import layer_table
from parts.imagenet_sample import SETTINGS, Setting, appending, differences, prepare

import ekgfx
from ekgfx.base.files import read_lines
from ekgfx.execution.subnetwork import SubNetwork
from ekgfx.graph.plan import Plan
from ekgfx.latency import target
from ekgfx.search.latency import LayerTable, Price
from ekgfx.search.reward import Objective, assess, validation_batches
from ekgfx.surgery.calibrate import calibrate

WAYS = ("MACs", "MACs aligned", "latency")


def search(way: str, setting: Setting, table: LayerTable, output: Path) -> dict[str, Any]:
    """One search, and what its network is worth. Its steps and its plan are in files beside the output."""
    history = beside(output, way, "jsonl")
    asked, traced = setting.asked, setting.traced
    price = Price(traced, table)
    options: dict[str, Any] = {"cost": price, "budget": asked.keep * price.dense / price(Plan())}
    if way == "latency":
        options = {"latency": asked.keep, "table": table}
    if way != "MACs":
        options["align"] = table.tile
    found = ekgfx.search(
        traced,
        list(setting.batches(setting.seen[: asked.search_images])),
        **options,
        accept=asked.accept,
        seed=asked.seed,
        on_step=appending(history),
        resume_from=read_lines(history),
    )
    plan = found.plan
    beside(output, way, "plan.json").write_text(plan.to_json())
    network = ekgfx.prune(traced.model, plan, traced)
    calibrate(network, setting.batches(setting.seen))
    return {
        "widths": traced.groups.widths(plan),
        "predicted": price(plan) / price.dense,
        "macs_kept": traced.cost(plan).macs / traced.cost().macs,
        "params_kept": traced.cost(plan).params / traced.cost().params,
        "steps": len(found.steps),
        "search_seconds": round(sum(step.seconds for step in found.steps), 1),
        "reward": {
            "search images": reward(setting, plan, setting.seen[: asked.search_images]),
            "others": reward(setting, plan, setting.unseen),
        },
        **setting.score(network.eval()),
    }


def beside(output: Path, way: str, ending: str) -> Path:
    """A file of one search."""
    return output.with_suffix(f".{way.replace(' ', '-')}.{ending}")


def reward(setting: Setting, plan: Plan, images: torch.Tensor) -> float:
    """ℛ of a plan's network against the knowledge of the unpruned one, with batch statistics as in the search."""
    batches = validation_batches(setting.batches(images))
    unpruned = Plan(structure=plan.structure, rescale=plan.rescale)
    _, knowledge = assess(subnetwork(setting, unpruned), batches, Objective(), None)
    return assess(subnetwork(setting, plan), batches, Objective(), knowledge)[0].reward


def subnetwork(setting: Setting, plan: Plan) -> SubNetwork:
    kept = setting.traced.groups.kept(plan)
    return SubNetwork(setting.traced, kept, batch_stats=True, rescale=plan.rescale)


def clocked(setting: Setting, plans: dict[str, Plan], place: target.Target) -> dict[str, float]:
    """Milliseconds of each plan's network, and of the unpruned one."""
    inputs = tuple(setting.traced.example[0])
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, plan in {"dense": Plan(), **plans}.items():
            network = network_of(setting.traced, plan).eval()
            files[name] = to_onnx(network, inputs, Path(folder) / f"{name}.onnx", fp16=fp16(place))
        return whole_runs(files, inputs, place, seconds=60)


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(asked.threads)
    output, place = Path(asked.output), target.Target.parse(asked.target)
    found, setting = Sheet(output, chosen(asked, "target", *SETTINGS), methods={}), prepare(asked)
    table, judged = layer_table(setting.traced, place, output.with_suffix(".table.json"))
    found.keep(price={key: judged[key] for key in ("median", "worst")}, machine=dict(table.environment))
    if "before" not in found:
        found.keep(before=setting.score(setting.traced.model))
    for way in WAYS:
        if way not in found["methods"]:
            found.keep(methods={**found["methods"], way: search(way, setting, table, output)})
    plans = {way: Plan.from_json(beside(output, way, "plan.json").read_text()) for way in WAYS}
    times = clocked(setting, plans, place)
    found.keep(shortest_ms=times, kept={way: times[way] / times["dense"] for way in WAYS})
    found.keep(differences=differences(found["methods"], "latency"))
    print(found["kept"], found["differences"], sep="\n")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, help="data SPEC")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--output", required=True, help="JSON")
    parser.add_argument("--target", default="cpu:fp32:batch=1:threads=1")
    parser.add_argument("--keep", type=float, default=0.6, help="of the milliseconds")
    parser.add_argument("--search-images", type=int, default=48)
    parser.add_argument("--accept", type=int, default=4)
    parser.add_argument("--test-images", type=int, default=250)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
