"""What do cut MACs save on this machine? Dense networks against pruned ones against pruned ones with aligned widths.

    python benchmarks/gpu/latency.py --output docs/latency.jsonl                   # on a machine with a GPU
    python benchmarks/gpu/latency.py --output out.jsonl --providers cpu --batches 1,4 --precisions fp32 test_resnet
    python benchmarks/gpu/latency.py --table docs/latency.jsonl > docs/latency.md

Widths come from the uniform search by magnitude, which needs no data: latency depends on widths, not on weights. Every
model and precision is measured in a process of its own and gives one JSON line: MACs of each network, all timings, the
speed-ups with their intervals, and the environment. A model and precision that the output holds already is skipped.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODELS = ("resnet50", "mobilenetv2_100", "convnext_tiny", "vit_small_patch16_224")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """The row of one model in one precision."""
    import timm
    import torch
    from ekgfx.export import check_parity, measure_latency, providers, to_onnx

    import ekgfx

    torch.manual_seed(0)
    model = timm.create_model(job["model"]).eval()
    inputs = torch.randn(2, *model.pretrained_cfg["input_size"])
    traced = ekgfx.trace(model, inputs)
    networks, macs = {"dense": model}, {"dense": traced.cost().macs}
    for align in (1, job["align"]):
        plan = ekgfx.search(traced, flops=job["flops"], strategy="uniform", importance="magnitude", align=align).plan
        name = f"{job['flops']:.0%}" if align == 1 else f"{job['flops']:.0%} aligned to {align}"
        networks[name], macs[name] = ekgfx.prune(model, plan, traced), traced.cost(plan).macs
    names = job["providers"] or [name for name in providers().present if name != "cpu"]
    fp16 = job["precision"] == "fp16"
    with tempfile.TemporaryDirectory() as folder:
        files, parity = {}, {}
        for number, (name, network) in enumerate(networks.items()):
            files[name] = to_onnx(network, inputs, Path(folder) / f"{number}.onnx", fp16=fp16)
            parity[name] = check_parity(network, files[name], inputs).relative
        if any(name.startswith("torch") for name in names):
            networks = {name: network.to("cuda") for name, network in networks.items()}
        table = measure_latency(
            files,
            inputs,
            job["batches"],
            names,
            job["precision"],
            seconds=job["seconds"],
            modules=networks,
            on_setting=lambda provider, batch: print(f"  {provider}, batch {batch}", file=sys.stderr, flush=True),
        )
    return {"macs": macs, "parity": parity, "latency": table.to_json()}


def run(jobs: list[dict[str, Any]], output: Path) -> None:
    """Measure every model and precision that `output` does not hold yet."""
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    done = {(row["model"], row["precision"]) for row in rows}
    for job in jobs:
        if (job["model"], job["precision"]) in done:
            continue
        print(job["model"], job["precision"], flush=True)
        result = subprocess.run([sys.executable, __file__, "--one", json.dumps(job)], stdout=subprocess.PIPE, text=True)
        if result.returncode:
            print("  failed, see above", flush=True)
            continue
        with output.open("a") as file:
            file.write(json.dumps(job | json.loads(result.stdout.splitlines()[-1])) + "\n")


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
    notes = {f"Measured on: {_machine(row['latency'])}." for row in rows} | {row["latency"]["note"] for row in rows}
    return "\n".join([*lines, "", *sorted(notes - {""}), ""])


def _machine(latency: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in latency["environment"].items() if key != "load")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help=f"timm names (default: {' '.join(MODELS)})")
    parser.add_argument("--output", type=Path, default=Path("latency.jsonl"))
    parser.add_argument("--providers", default="", help="comma-separated (default: every GPU provider that is present)")
    parser.add_argument("--batches", default="1,64")
    parser.add_argument("--precisions", default="fp32,fp16")
    parser.add_argument("--flops", type=float, default=0.55)
    parser.add_argument("--align", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="bound on each provider and batch size")
    parser.add_argument("--table", type=Path, help="print the table of a finished file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(json.loads(args.one))))
    elif args.table:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
    else:
        shared = {
            "flops": args.flops,
            "align": args.align,
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
