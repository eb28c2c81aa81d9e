"""What do cut MACs save on this machine? Dense networks against pruned ones, pruned ones with aligned widths, and ones
that were pruned to a budget of milliseconds.

    python benchmarks/gpu/latency.py --output benchmarks/results/latency_gpu.jsonl  # on a machine with a GPU
    python benchmarks/gpu/latency.py --output benchmarks/results/latency_cpu.jsonl --providers cpu --batches 1 \
        --precisions fp32 --threads 1 --align 8,16 mobilenetv2_100 resnet50
    python benchmarks/gpu/latency.py --table benchmarks/results/latency_gpu.jsonl   # as Markdown
    python benchmarks/gpu/latency.py --plot docs/latency_gpu.png benchmarks/results/latency_gpu.jsonl

Widths come from the uniform search by magnitude, which needs no data: latency depends on widths, not on weights. Every
model and precision is measured in a process of its own and gives one JSON line: MACs of each network, all timings, the
speed-ups with their intervals, the environment, how well the tables of layer timings predict whole networks (each
measured network by a price that does not know it), and the shortest of 30 further runs of each network, which on one
CPU thread is that thread's own time and so hardly sees other work on the machine. A model and precision that the output
holds already is skipped; the tables of layer timings lie in the folder OUTPUT-tables, where an interrupted measurement
goes on.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from ekgfx.base.files import append_line, read_lines

MODELS = ("resnet50", "mobilenetv2_100", "convnext_tiny", "vit_small_patch16_224")
TIMED = ("cuda", "cpu")
"""Providers whose layers can be timed one by one, the first of them that is measured prices the layers."""


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """The row of one model in one precision."""
    import timm
    import torch
    from ekgfx.export import check_parity, measure_latency, providers, to_onnx
    from ekgfx.export.profile import whole_runs

    import ekgfx

    torch.manual_seed(0)
    model = timm.create_model(job["model"]).eval()
    inputs = torch.randn(2, *model.pretrained_cfg["input_size"])
    traced = ekgfx.trace(model, inputs)
    names = job["providers"] or [name for name in providers().present if name != "cpu"]
    plans, uniform = {"dense": ekgfx.Plan()}, {"strategy": "uniform", "importance": "magnitude"}
    for align in (1, *job["align"]):
        name = f"{job['flops']:.0%}" if align == 1 else f"{job['flops']:.0%} aligned to {align}"
        plans[name] = ekgfx.search(traced, flops=job["flops"], align=align, **uniform).plan
    everywhere, predicted = list(plans), {}
    for batch in job["batches"]:
        name = f"{job['budget']:.0%} of the latency at batch {batch}"
        target = target_of(names, job["precision"], batch, job["threads"])
        table, predicted[batch] = layer_table(traced, target, Path(job["tables"]) / f"{job['model']}-{target}.json")
        found = ekgfx.search(traced, latency=job["budget"], table=table, align=table.tile, **uniform)
        plans[name] = found.plan
        predicted[batch]["kept"] = found.steps[-1].kept_fraction
    networks = {name: ekgfx.prune(model, plan, traced) if plan.kept else model for name, plan in plans.items()}
    with tempfile.TemporaryDirectory() as folder:
        files, parity = {}, {}
        for number, (name, network) in enumerate(networks.items()):
            files[name] = to_onnx(network, inputs, Path(folder) / f"{number}.onnx", fp16=job["precision"] == "fp16")
            parity[name] = check_parity(network, files[name], inputs).relative
        if any(name.startswith("torch") for name in names):
            networks = {name: network.to("cuda") for name, network in networks.items()}
        whole, shortest = None, {}
        for batch, own in zip(job["batches"], [name for name in plans if name not in everywhere], strict=True):
            timed = measure_latency(
                {name: files[name] for name in (*everywhere, own)},
                inputs,
                [batch],
                names,
                job["precision"],
                seconds=job["seconds"],
                threads=job["threads"] or None,
                modules={name: networks[name] for name in (*everywhere, own)},
                on_setting=lambda provider, batch: print(f"  {provider}, batch {batch}", file=sys.stderr, flush=True),
            )
            whole = timed if whole is None else joined(whole, timed)
            here = target_of(names, job["precision"], batch, job["threads"])
            shortest[batch] = whole_runs({name: files[name] for name in (*everywhere, own)}, inputs, here)
    assert whole is not None
    macs = {name: traced.cost(plan).macs for name, plan in plans.items()}
    return {
        "macs": macs,
        "parity": parity,
        "predicted": predicted,
        "shortest_ms": shortest,
        "latency": whole.to_json(),
    }


def target_of(names: list[str], precision: str, batch: int, threads: int) -> Any:
    """Where the layers are timed, for a latency budget."""
    from ekgfx.latency.target import Target

    return Target(next(name for name in TIMED if name in names), precision, batch, threads)


def layer_table(traced: Any, target: Any, file: Path) -> tuple[Any, dict[str, Any]]:
    """The table of layer timings, measured or read again, and how far off its predictions are."""
    import numpy as np
    from ekgfx.export.layers import NETWORKS, measure_layers

    from ekgfx.search.latency import LayerTable, Price
    from ekgfx.search.problem import width_rules

    def keep(table: Any) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(table.to_json()))
        print(f"  {target}: network {len(table.samples)} of {NETWORKS}", file=sys.stderr, flush=True)

    begun = LayerTable.load(file) if file.exists() else None
    rules = width_rules(traced, frozenset(), target.staircase.tile, 0.0)
    table = measure_layers(traced, target, rules, begun=begun, on_network=keep)
    errors = Price(traced, table).errors
    return table, {"errors": errors, "median": float(np.median(np.abs(errors))), "worst": float(np.abs(errors).max())}


def joined(first: Any, second: Any) -> Any:
    """Two tables of latencies as one."""
    note = "; ".join(dict.fromkeys(filter(None, (first.note, second.note))))
    return replace(
        first,
        timings=(*first.timings, *second.timings),
        speedups=(*first.speedups, *second.speedups),
        note=note,
    )


def run(jobs: list[dict[str, Any]], output: Path) -> None:
    """Measure every model and precision that `output` does not hold yet."""
    rows = read_lines(output)
    done = {(row["model"], row["precision"]) for row in rows}
    for job in jobs:
        if (job["model"], job["precision"]) in done:
            continue
        print(job["model"], job["precision"], flush=True)
        result = subprocess.run([sys.executable, __file__, "--one", json.dumps(job)], stdout=subprocess.PIPE, text=True)
        if result.returncode:
            print("  failed, see above", flush=True)
            continue
        told = {key: value for key, value in job.items() if key != "tables"}
        append_line(output, told | json.loads(result.stdout.splitlines()[-1]))


def table(rows: list[dict[str, Any]]) -> str:
    """Latency kept next to MACs kept, as Markdown. "realised" is the share of the ideal saving, 1 − MACs kept, that the
    clock confirms."""
    from ekgfx.export import LatencyTable

    lines = [
        "| model | provider | batch | network | MACs kept | median ms | p95 ms | latency kept | realised |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        measured = LatencyTable.from_json(row["latency"])
        ratios = {(s.provider, s.batch, s.network): s.ratio for s in measured.speedups}
        for t in measured.timings:
            kept = row["macs"][t.network] / row["macs"]["dense"]
            ratio = ratios.get((t.provider, t.batch, t.network))
            saving = ["", ""]
            if ratio is not None:
                shown = f"{1 / ratio.value:.2f} ({1 / ratio.high:.2f}–{1 / ratio.low:.2f})"
                saving = [
                    f"no difference {shown}" if ratio.verdict == "no difference" else shown,
                    f"{(1 - 1 / ratio.value) / (1 - kept):.0%}",
                ]
            cells = [row["model"], f"{t.provider} {t.precision}", str(t.batch), t.network, f"{kept:.1%}"]
            lines.append("| " + " | ".join([*cells, f"{t.median_ms:.3f}", f"{t.p95_ms:.3f}", *saving]) + " |")
    lines.append("")
    for row in rows:
        for batch, found in row["predicted"].items():
            lines.append(
                f"- {row['model']} {row['precision']}, batch {batch}: the price of a network from the layers of others "
                f"is off by {found['median']:.1%} in the median, {found['worst']:.1%} at most ({len(found['errors'])} "
                f"networks); {found['kept']:.1%} of the latency predicted for the plan"
            )
            if "shortest_ms" not in row:  # of an older version
                continue
            times = row["shortest_ms"][batch]
            shown = ", ".join(f"{name} {ms:.2f} ms ({ms / times['dense']:.2f})" for name, ms in times.items())
            lines.append(f"- {row['model']} {row['precision']}, batch {batch}, shortest of 30 runs in turn: {shown}")
    notes = {f"Measured on: {_machine(row['latency'])}." for row in rows} | {row["latency"]["note"] for row in rows}
    return "\n".join([*lines, "", *sorted(notes - {""}), ""])


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Bars of the latency kept by every pruned network, with its range; a line across each is its share of the MACs,
    which it would take if cut MACs were saved milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    from ekgfx.export import LatencyTable
    from matplotlib import pyplot

    bars: dict[str, list[tuple[str, float, float, float, float]]] = {}
    for row in rows:
        for s in LatencyTable.from_json(row["latency"]).speedups:
            place = f"{row['model']}\n{s.provider} {row['precision']}, batch {s.batch}"
            of_macs = row["macs"][s.network] / row["macs"]["dense"]
            ratio = s.ratio
            name = re.sub(r" at batch \d+$", "", s.network)
            bars.setdefault(name, []).append((place, 1 / ratio.value, 1 / ratio.high, 1 / ratio.low, of_macs))
    places = list(dict.fromkeys(bar[0] for found in bars.values() for bar in found))
    width = 0.8 / len(bars)
    figure, axes = pyplot.subplots(figsize=(2 + 1.7 * len(places), 4), layout="constrained")
    for number, (name, found) in enumerate(bars.items()):
        at = [places.index(place) + width * (number - (len(bars) - 1) / 2) for place, *_ in found]
        kept = [value for _, value, *_ in found]
        spread = [[value - low for _, value, low, *_ in found], [high - value for _, value, _, high, _ in found]]
        axes.bar(at, kept, width * 0.9, yerr=spread, label=name)
        axes.hlines([bar[-1] for bar in found], [x - width / 2 for x in at], [x + width / 2 for x in at], "black")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(ylabel="latency kept (line: MACs kept)", xticks=range(len(places)), xticklabels=places)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=110)


def _machine(latency: dict[str, Any]) -> str:
    facts = latency["environment"].items()
    return ", ".join(f"{key} {value}" for key, value in facts if key not in ("load", "platform"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"timm names (default: {' '.join(MODELS)})")
    parser.add_argument("--output", type=Path, default=Path("latency.jsonl"))
    parser.add_argument("--providers", default="", help="comma-separated (default: every GPU provider that is present)")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--precisions", default="fp32,fp16")
    parser.add_argument("--flops", type=float, default=0.55)
    parser.add_argument("--align", default="32", help="comma-separated")
    parser.add_argument("--latency", type=float, default=0.55, help="budget of milliseconds")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (default: all)")
    parser.add_argument("--seconds", type=float, default=10.0, help="bound on each provider and batch size")
    parser.add_argument("--table", type=Path, help="print the table of a finished file")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("PNG", "FILE"), help="draw a finished file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
    elif args.table:
        print(table(read_lines(args.table)))
    elif args.plot:
        plot(read_lines(args.plot[1]), args.plot[0])
    else:
        shared = {
            "flops": args.flops,
            "align": [int(align) for align in args.align.split(",")],
            "budget": args.latency,
            "threads": args.threads,
            "tables": str(args.output.with_suffix("")) + "-tables",
            "batches": [int(batch) for batch in args.batches.split(",")],
            "providers": [name for name in args.providers.split(",") if name],
            "seconds": args.seconds,
        }
        run(
            [{"model": m, "precision": p, **shared} for m in args.models for p in args.precisions.split(",")],
            args.output,
        )


if __name__ == "__main__":
    main()
