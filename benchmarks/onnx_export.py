"""Which models export to ONNX, and do the files compute the same? Every model in a process of its own; resumable.

    python benchmarks/onnx_export.py --output docs/onnx.jsonl --flops 0.55       # benchmarks/models.txt
    python benchmarks/onnx_export.py --output out.jsonl --fp16 nest_tiny twins_svt_small
    python benchmarks/onnx_export.py --table docs/onnx.jsonl > docs/onnx.md

Parameters are perturbed first, since zero-initialised scales and near-uniform attention would hide errors. With --flops
each model is also exported pruned to that share of its MACs (one share for all groups, by magnitude). Parity is checked
in onnxruntime on the CPU at two batch sizes, to 1e-4 relative in fp32 and 1e-2 in fp16.

One JSON line for each network and precision: status "ok", "failed" (with the message, which names the operator),
"timeout" or "error" (the process died); relative and absolute difference; seconds; nodes and bytes of the file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TIMEOUT = 900


def measure(name: str, flops: float | None, fp16: bool) -> dict[str, Any]:
    """The row of one model, dense or pruned, in one precision."""
    import timm
    import torch

    import ekgfx
    from ekgfx.verify import perturb

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    perturb(model)
    inputs = torch.randn(3, *model.pretrained_cfg["input_size"])
    if flops is not None:
        traced = ekgfx.trace(model, inputs)
        plan = ekgfx.search(traced, flops=flops, strategy="uniform", importance="magnitude").plan
        model = ekgfx.prune(model, plan, traced)
    row: dict[str, Any] = {"params": sum(parameter.numel() for parameter in model.parameters())}
    return row | export(model, inputs, fp16)


def export(model: Any, inputs: Any, fp16: bool) -> dict[str, Any]:
    """Export, check, and describe the file."""
    import onnx
    from ekgfx.export import check_parity, to_onnx

    from ekgfx.errors import ExportError

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        start = time.perf_counter()
        try:
            to_onnx(model, inputs, path, fp16=fp16)
            seconds = time.perf_counter() - start
            parity = check_parity(model, path, inputs)
        except ExportError as error:
            return {"status": "failed", "message": str(error)}
        return {
            "status": "ok",
            "relative": parity.relative,
            "absolute": parity.absolute,
            "seconds": round(seconds, 1),
            "nodes": len(onnx.load(path, load_external_data=False).graph.node),
            "bytes": path.stat().st_size,
        }


def run(jobs: list[dict[str, Any]], output: Path) -> None:
    """Measure every job that `output` does not hold yet, each in its own process."""
    done = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    for i, job in enumerate(jobs):
        if any(job.items() <= row.items() for row in done):
            continue
        row = job | in_a_process(job)
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        figures = row.get("message") or (
            f"{row['relative']:.1e} relative, {row['seconds']} s" if "relative" in row else ""
        )
        print(f"[{i + 1}/{len(jobs)}] {label(job)}: {row['status']} {figures}", flush=True)


def in_a_process(job: dict[str, Any]) -> dict[str, Any]:
    try:
        command = [sys.executable, __file__, "--one", json.dumps(job)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return {"status": "timeout", "message": f"no result after {TIMEOUT} s"}
    if result.returncode == 0:
        return json.loads(result.stdout.splitlines()[-1])
    return {"status": "error", "message": "".join(result.stderr.strip().splitlines()[-1:])[:600]}


def label(job: dict[str, Any]) -> str:
    return f"{job['model']} {'dense' if job['flops'] is None else job['flops']} {job['precision']}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| model | network | precision | status | relative difference | seconds | nodes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row["model"], str(row["flops"]), row["precision"])):
        network = "dense" if row["flops"] is None else f"{row['flops']:.0%} of the MACs"
        if row["status"] == "ok":
            figures = [f"{row['relative']:.1e}", str(row["seconds"]), str(row["nodes"])]
        else:
            figures = [row["message"][:120].replace("|", "/"), "", ""]
        lines.append("| " + " | ".join([row["model"], network, row["precision"], row["status"], *figures]) + " |")
    good = sum(row["status"] == "ok" for row in rows)
    return f"{good} of {len(rows)} exports are valid and equal to the model.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="timm names (default: benchmarks/models.txt)")
    parser.add_argument("--output", type=Path, default=Path("onnx.jsonl"))
    parser.add_argument("--flops", type=float, help="export each model pruned to this share of its MACs as well")
    parser.add_argument("--fp16", action="store_true", help="in half precision as well")
    parser.add_argument("--table", type=Path, help="print the table of a finished file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        job = json.loads(args.one)
        print(json.dumps(measure(job["model"], job["flops"], job["precision"] == "fp16")))
    elif args.table:
        print(table([json.loads(line) for line in args.table.read_text().splitlines()]))
    else:
        names = args.models or (Path(__file__).parent / "models.txt").read_text().split()
        networks = [None] if args.flops is None else [None, args.flops]
        precisions = ["fp32", "fp16"] if args.fp16 else ["fp32"]
        run(
            [{"model": name, "flops": f, "precision": p} for name in names for f in networks for p in precisions],
            args.output,
        )


if __name__ == "__main__":
    main()
