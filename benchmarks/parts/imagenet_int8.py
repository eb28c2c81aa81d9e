"""INT8 alone, pruned alone, both: ResNet-50 with real weights on a few ImageNet images, one CPU thread.

    python benchmarks/imagenet.py int8 --images folder:imagenet-sample \
        --weights resnet50-imagenet-keras-fp16.safetensors --history benchmarks/results/imagenet_sample.history.jsonl \
        --output benchmarks/results/int8.json

The halves of the sample are those of `benchmarks/imagenet.py sample`. The first half repairs the pruned network,
calibrates both INT8 files and chooses among their variants, without labels; accuracy is measured on the second.

The plan is that of a recorded EKG search to 55% of the MACs, whose widths were free: they are rounded to whole tiles of
16 channels, up or down, so that the budget holds. Where channels are lost, it is those of the smallest weights; where
they come back, those of the largest. All networks are timed in turn in one process. What is done is not done again:
the repaired weights and the ONNX files are in `--work`.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import Sheet, chosen
from ekgfx.export import Samples, check_parity, measure_latency, to_fp16, to_int8, to_onnx
from ekgfx.export.precisions import judge, slower
from parts import imagenet_sample
from plans import aligned, from_history
from safetensors.torch import load_file, save_file
from torch import nn

import ekgfx
from ekgfx.graph.plan import Plan


def repaired(setting: imagenet_sample.Setting, asked: argparse.Namespace) -> tuple[nn.Module, Plan, float | None]:
    """The pruned network, repaired on the first half of the images, and the CPU seconds of it, if it was done now."""
    traced = setting.traced
    plan = aligned(traced, from_history(traced, Path(asked.history), asked.keep), asked.keep)
    network = ekgfx.prune(traced.model, plan, traced).eval()
    weights, seconds = Path(asked.work) / "repaired.safetensors", None
    if weights.exists():
        network.load_state_dict(load_file(weights))
    else:
        images = [batch[0] for batch in setting.batches(setting.seen)]
        started = time.process_time()
        found = ekgfx.repair(
            network,
            traced,
            plan,
            images,
            most=len(setting.seen),
            seed=asked.seed,
            checkpoint=weights.with_name("repair.safetensors"),
            on_layer=told,
        )
        seconds = round(time.process_time() - started, 1)
        print(found, f"{seconds} CPU seconds", flush=True)
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, weights)
    return network, plan, seconds


def told(layer: Any, number: int, count: int) -> None:
    print(f"{number}/{count} {layer.name}: {layer.before:.3g} → {layer.after:.3g} ({layer.done})", flush=True)


def rows(found: dict[str, Any]) -> list[str]:
    """The lines of the table, one for each network, as they stand in docs/latency.md."""
    lines = []
    for name, score in found["scores"].items():
        cells = [name, f"{score:.1%}", f"{found['bytes'][name] / 1e6:.1f} MB"]
        for measured in found["latency"].values():
            timing = next(t for t in measured["timings"] if t["network"] == name)
            ratio = next((s["ratio"] for s in measured["speedups"] if s["network"] == name), None)
            cells += [f"{timing['median_ms']:.1f}", f"{timing['p95_ms']:.1f}"]
            cells.append("" if ratio is None else f"{ratio['value']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    work = Path(asked.work)
    work.mkdir(parents=True, exist_ok=True)
    settings = chosen(asked, "keep", "calibration", "test_images", "runs", "seconds", "seed")
    found = Sheet(asked.output, settings, int8={}, latency={})
    setting = imagenet_sample.prepare(asked)
    network, plan, seconds = repaired(setting, asked)
    found.keep(macs_kept=setting.traced.cost(plan).macs / setting.traced.cost().macs)
    found.keep(widths=setting.traced.groups.widths(plan))
    if seconds is not None:
        found.keep(repair_cpu_seconds=seconds)
    images = next(setting.batches(setting.unseen))[0][:4]
    files: dict[str, Path] = {}
    for name, model in {"dense": setting.traced.model, "pruned": network}.items():
        files[name], files[f"{name} int8"] = work / f"{name}.onnx", work / f"{name}-int8.onnx"
        if name not in found["int8"]:
            to_onnx(model, images, files[name])
            check_parity(model, files[name], images)
            seen = setting.batches(setting.seen[: asked.calibration])
            made = to_int8(files[name], files[f"{name} int8"], seen, most=asked.calibration, on_trial=print)
            print(made, flush=True)
            found.keep(int8={**found["int8"], name: made.to_json()})
    precisions = {name: "int8" if name.endswith("int8") else "fp32" for name in files}
    found.keep(bytes={name: file.stat().st_size for name, file in files.items()})
    if "scores" not in found:
        variants = {name: (name, precisions[name], file.name) for name, file in files.items()}
        scores, _, count = judge(variants, work, Samples([], setting.batches(setting.unseen)))
        found.keep(scores=scores, images=count)
    for batch in asked.batches:
        if str(batch) not in found["latency"]:
            options = {"runs": asked.runs, "seconds": asked.seconds, "warmup": 3, "threads": 1}
            table = measure_latency(files, images, [batch], ["cpu"], precisions, **options)
            found.keep(latency={**found["latency"], str(batch): table.to_json()})
    if "fp16_times_as_slow" not in found:
        half = to_fp16(files["dense"], work / "dense-fp16.onnx", images)
        found.keep(fp16_times_as_slow=slower(half, files["dense"], (images[:1],), 1))
    print(*rows(found), sep="\n")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", required=True, help="data SPEC")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--history", required=True, help="steps of EKG's search, as JSON lines")
    parser.add_argument("--output", required=True, help="JSON")
    parser.add_argument("--work", default="int8-work", help="folder for weights and ONNX files")
    parser.add_argument("--keep", type=float, default=0.55)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8])
    parser.add_argument("--calibration", type=int, default=64, help="images of the first half; half of them chooses")
    parser.add_argument("--test-images", type=int, default=250)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=90.0, help="most, of all timed runs of a batch size")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
