"""Which models export to ONNX, dense and pruned, and do the files compute the same? One process a model; resumable.

    python benchmarks/onnx_export.py --output docs/onnx.jsonl                  # benchmarks/models.txt
    python benchmarks/onnx_export.py --output out.jsonl nest_tiny twins_svt_small
    python benchmarks/onnx_export.py --table docs/onnx.jsonl > docs/onnx.md

Every model is exported as it is and pruned to half of its MACs (one share for all groups, by magnitude), in fp32 and
in fp16. Parameters are perturbed first, since zero-initialised scales and near-uniform attention would hide errors;
less so where the network would then amplify mere rounding until nothing can be compared. Parity is checked in
onnxruntime on the CPU at two batch sizes, to 1e-4 relative in fp32 and 1e-2 in fp16.

One JSON line for each network and precision: status "ok", "unpruned" (ekgfx cannot cut the model so far, so there is
nothing to export), "failed" (with the message, which names the operator), "timeout" or "error" (the process died);
relative and absolute difference; seconds; nodes and bytes of the file; nodes of an fp16 file that stay in fp32 because
their values are too large; strength of the perturbation. A model whose lines the output holds already is skipped.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMEOUT = 900
FLOPS = 0.5
ROUNDING = 2**-11
"""Of fp16, relative."""
CASES = [(network, precision) for network in ("dense", "pruned") for precision in ("fp32", "fp16")]

PATH = re.compile(r"(?:/[\w.-]+)+/([\w.-]+)")
"""A path of the machine that measured; its last part says enough."""

Row = dict[str, Any]


def measure(name: str) -> Iterator[Row]:
    """The rows of one model, as they are known."""
    import timm
    import torch

    import ekgfx
    from ekgfx.errors import EkgfxError

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    inputs = torch.randn(2, *model.pretrained_cfg["input_size"])
    traced, reason = None, ""
    try:
        traced = ekgfx.trace(model, inputs)
    except EkgfxError as error:
        reason = str(error)
    pruned = None
    for drawn in perturbations(model):
        strength = drawn
        if traced is not None:
            try:
                plan = ekgfx.search(traced, flops=FLOPS, strategy="uniform", importance="magnitude").plan
                pruned = ekgfx.prune(model, plan, traced)
            except EkgfxError as error:
                traced, reason = None, str(error)
        if calm(model, inputs) and (pruned is None or calm(pruned, inputs)):
            break
    yield from (row | {"perturbation": strength} for row in export("dense", model, inputs))
    if pruned is None:
        yield from (blank("pruned", p, "unpruned", reason) for p in ("fp32", "fp16"))
    else:
        yield from (row | {"perturbation": strength} for row in export("pruned", pruned, inputs))


def perturbations(model: Any) -> Iterator[float]:
    """Perturb the model's weights in place, ever less strongly: fully (`ekgfx.verify.perturb`), by a third, a tenth."""
    import copy

    from ekgfx.verify import perturb

    initial = copy.deepcopy(model.state_dict())
    perturb(model)
    full = copy.deepcopy(model.state_dict())
    for strength in (1.0, 0.3, 0.1, 0.03):
        model.load_state_dict(
            {key: w.lerp(full[key], strength) if w.is_floating_point() else w for key, w in initial.items()}
        )
        yield strength


def calm(model: Any, inputs: Any) -> bool:
    """Whether the network leaves rounding errors about as small as they are."""
    from ekgfx.export import amplification

    return amplification(model, inputs[:1], ROUNDING) <= 2 * ROUNDING


def export(network: str, model: Any, inputs: Any) -> Iterator[Row]:
    """Export once, convert to fp16, check both files."""
    from ekgfx.export import to_fp16, to_onnx

    from ekgfx.errors import ExportError

    params = sum(parameter.numel() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        single, half = Path(folder) / "single.onnx", Path(folder) / "half.onnx"
        start = time.perf_counter()
        try:
            to_onnx(model, inputs, single)
        except ExportError as error:
            yield from (blank(network, p, "failed", str(error)) for p in ("fp32", "fp16"))
            return
        yield checked(network, "fp32", model, single, inputs, params, time.perf_counter() - start)
        start = time.perf_counter()
        try:
            to_fp16(single, half, inputs)
        except ExportError as error:
            yield blank(network, "fp16", "failed", str(error))
        else:
            yield checked(network, "fp16", model, half, inputs, params, time.perf_counter() - start)


def checked(network: str, precision: str, model: Any, path: Path, inputs: Any, params: int, seconds: float) -> Row:
    """A file's parity and its size."""
    import onnx
    from ekgfx.export import check_parity

    from ekgfx.errors import ExportError

    try:
        parity = check_parity(model, path, inputs)
    except ExportError as error:
        return blank(network, precision, "failed", str(error))
    file = onnx.load(path, load_external_data=False)
    recorded = {entry.key: entry.value for entry in file.metadata_props}
    wide = recorded.get("ekgfx.fp32_nodes")
    return {
        "network": network,
        "precision": precision,
        "status": "ok",
        "relative": parity.relative,
        "absolute": parity.absolute,
        "seconds": round(seconds, 1),
        "nodes": len(file.graph.node),
        "fp32_nodes": wide.count(", ") + 1 if wide else 0,
        "bytes": path.stat().st_size,
        "params": params,
    }


def blank(network: str, precision: str, status: str, message: str) -> Row:
    return {"network": network, "precision": precision, "status": status, "message": PATH.sub(r"\1", message)[:600]}


def run(names: list[str], output: Path, budget: float) -> None:
    """Measure every model that `output` does not hold yet, each in its own process, for about `budget` seconds."""
    done = {row["model"] for row in read(output)} if output.exists() else set()
    end = time.monotonic() + budget
    for i, name in enumerate(names):
        if name in done:
            continue
        if time.monotonic() > end:
            print(f"stopped after {budget:.0f} s, before {name}; run the same again to go on", flush=True)
            return
        rows = in_a_process(name)
        with output.open("a") as file:  # all rows of a model at once, so that a model is there whole or not at all
            file.write("".join(json.dumps({"model": name, **row}) + "\n" for row in rows))
        print(f"[{i + 1}/{len(names)}] {name}: " + ", ".join(brief(row) for row in rows), flush=True)


def in_a_process(name: str) -> list[Row]:
    """A row for every case: what the process printed, and what it came to where it printed nothing."""
    command = [sys.executable, __file__, "--one", name]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        printed, ended = result.stdout, "error"
        message = "".join(result.stderr.strip().splitlines()[-1:]) or f"exit code {result.returncode}"
    except subprocess.TimeoutExpired as error:
        printed = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ended, message = "timeout", f"no result after {TIMEOUT} s"
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    known = {(row["network"], row["precision"]) for row in rows}
    return rows + [blank(*case, ended, message) for case in CASES if case not in known]


def brief(row: Row) -> str:
    figure = f" {row['relative']:.1e}" if "relative" in row else ""
    return f"{row['network']} {row['precision']} {row['status']}{figure}"


def table(rows: list[Row]) -> str:
    """One Markdown row a model: the four differences, and the exporter's time and nodes for the dense fp32 file."""
    models: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        models.setdefault(row["model"], {})[row["network"], row["precision"]] = row
    lines = [
        "| model | dense fp32 | dense fp16 | pruned fp32 | pruned fp16 | nodes | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cases in sorted(models.items()):
        cells = [
            f"{cases[case]['relative']:.1e}" if cases[case]["status"] == "ok" else f"**{cases[case]['status']}**"
            for case in CASES
        ]
        dense = cases["dense", "fp32"]
        lines.append(
            "| " + " | ".join([name, *cells, str(dense.get("nodes", "")), str(dense.get("seconds", ""))]) + " |"
        )
    counts = [
        f"{network} {precision}: {sum(c[network, precision]['status'] == 'ok' for c in models.values())} of "
        f"{sum(c[network, precision]['status'] != 'unpruned' for c in models.values())}"
        for network, precision in CASES
    ]
    failures = [
        f"- {row['model']}, {row['network']} {row['precision']}, {row['status']}: {row['message']}"
        for row in rows
        if row["status"] != "ok"
    ]
    return (
        HEAD.format(models=len(models), counts="; ".join(counts))
        + "\n".join(lines)
        + "\n"
        + ("\n## What did not\n\n" + "\n".join(failures) + "\n" if failures else "")
    )


HEAD = """# ONNX files of timm models

`python benchmarks/onnx_export.py --output docs/onnx.jsonl && python benchmarks/onnx_export.py --table docs/onnx.jsonl`

{models} of the models in `benchmarks/models.txt`, each dense and pruned to half of its MACs, with random weights that
are perturbed as strongly as the network bears without amplifying rounding. A figure is the largest relative difference
between PyTorch and onnxruntime on the CPU over two batch sizes; a file counts when it passes onnx's checker with shape
inference and differs by at most 1e-4 in fp32 and 1e-2 in fp16. Equal to the model, {counts}.
The rest of the list is not measured here. 2026-11-25, two cores of an AMD EPYC (AVX2) shared with other work, torch
2.14.1, onnxruntime 1.31.1.

"""


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="timm names (default: benchmarks/models.txt)")
    parser.add_argument("--output", type=Path, default=Path("onnx.jsonl"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further model after this time")
    parser.add_argument("--table", type=Path, help="print the table of a finished file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        for row in measure(args.one):
            print(json.dumps(row), flush=True)
    elif args.table:
        print(table(read(args.table)), end="")
    else:
        run(args.models or (Path(__file__).parent / "models.txt").read_text().split(), args.output, args.seconds)


if __name__ == "__main__":
    main()
