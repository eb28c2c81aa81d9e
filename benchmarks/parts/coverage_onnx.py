"""Which models export to ONNX, dense and pruned, and do the files compute the same? One process a model, forked from
one that has imported everything; resumable.

    python benchmarks/coverage.py onnx --output benchmarks/results/onnx.jsonl         # benchmarks/models.txt
    python benchmarks/coverage.py onnx --output out.jsonl nest_tiny twins_svt_small
    python benchmarks/coverage.py onnx --output out.jsonl --pixels 144 gemma4_vit_167m    # its own are 768×768
    python benchmarks/coverage.py onnx --output benchmarks/results/onnx.jsonl --table     # one row a model
    python benchmarks/coverage.py onnx --output benchmarks/results/onnx.jsonl --page > docs/onnx.md

Every model is exported as it is and pruned to half of its MACs (one share for all groups, by magnitude), in fp32 and
in fp16. Parameters are perturbed first, since zero-initialised scales and near-uniform attention would hide errors;
less so, or with new statistics of batch norms, where rounding weights and inputs to fp16 would move the PyTorch model's
own output by more than 1e-2: nothing can be compared then. Parity is checked in onnxruntime on the CPU at two batch
sizes, to 1e-4 relative in fp32 and 1e-2 in fp16.

One JSON line for each network and precision: status "ok", "unpruned" (ekgfx cannot cut the model so far, so there is
nothing to export), "failed" (with the message, which names the operator), "amplifies" (the file differs by more, but so
does the PyTorch model from itself when its weights and inputs move by the rounding of that precision, and no state was
found in which it does not), "timeout" or "error" (the process died); relative and absolute difference; seconds; nodes
and bytes of the file; nodes of an fp16 file that stay in fp32 because their values or weights are too large; strength
of the perturbation, whether batch norms were estimated anew, and how far rounding moves the output. A model whose lines
the output holds already is skipped.
"""

import argparse
import copy
import json
import math
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Ended, Lines, Row, listed, streamed

TIMEOUT = 3600
FLOPS = 0.5
STRENGTHS = (1.0, 0.3, 0.1, 0.03)
"""Of the perturbation, one after the other until the network bears it."""
ROUNDING, TOLERANCE = 2**-11, 1e-2
"""Of fp16, relative."""
CASES = [(network, precision) for network in ("dense", "pruned") for precision in ("fp32", "fp16")]

PATH = re.compile(r"(?:/[\w.-]+)+/([\w.-]+)")
"""A path of the machine that measured; its last part says enough."""


def measure(name: str, pixels: int | None) -> Iterator[Row]:
    """The rows of one model, as they are known. pixels: side of its images, where they are not of its own size."""
    import timm
    import torch
    from ekgfx.export import amplification

    import ekgfx
    from ekgfx.errors import EkgfxError
    from ekgfx.surgery.calibrate import calibrate

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    channels, *size = model.pretrained_cfg["input_size"]
    inputs = torch.randn(2, channels, *((pixels, pixels) if pixels else size))
    pruned, reason, facts, most = None, "no state was found whose outputs are finite", {}, math.inf
    try:
        traced = ekgfx.trace(model, inputs)
    except EkgfxError as error:
        traced, reason = None, str(error)
    kept = model
    for state in states(model, inputs):
        moves = amplification(model, inputs, ROUNDING)
        if moves >= most:
            continue
        cut = None
        if traced is not None:
            try:
                plan = ekgfx.search(traced, flops=FLOPS, strategy="uniform", importance="magnitude").plan
                cut = ekgfx.prune(model, plan, traced)
            except EkgfxError as error:
                traced, reason = None, str(error)
        if cut is not None:
            if state["reestimated"]:
                calibrate(cut, [inputs])
            moves = max(moves, amplification(cut, inputs, ROUNDING))
        if moves < most:
            most, pruned, facts = moves, cut, state | {"moves": moves}
            kept = model if moves <= TOLERANCE else copy.deepcopy(model)
        if moves <= TOLERANCE:
            break
    yield from (row | facts for row in export("dense", kept, inputs))
    if pruned is None:
        yield from (blank("pruned", p, "unpruned", reason) for p in ("fp32", "fp16"))
    else:
        yield from (row | facts for row in export("pruned", pruned, inputs))


def states(model: Any, inputs: Any) -> Iterator[Row]:
    """Give the model other weights in place: perturbed fully (`ekgfx.surgery.check.perturb`), by a third, a tenth, …;
    then the same again with the statistics of its batch norms estimated anew, if it has any."""
    from ekgfx.surgery.calibrate import calibrate
    from ekgfx.surgery.check import perturb

    initial = copy.deepcopy(model.state_dict())
    perturb(model)
    full = copy.deepcopy(model.state_dict())
    for reestimated in (False, True) if any("running_var" in key for key in initial) else (False,):
        for strength in STRENGTHS:
            model.load_state_dict({key: w.lerp(full[key], strength) if finite(w) else w for key, w in initial.items()})
            if reestimated:
                calibrate(model, [inputs])
            yield {"perturbation": strength, "reestimated": reestimated}


def finite(value: Any) -> bool:
    """Whether a tensor can be perturbed; a bound of ±∞ cannot."""
    return bool(value.is_floating_point() and value.isfinite().all())


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
    from ekgfx.export import amplification, check_parity
    from ekgfx.export.parity import ROUNDING as ROUNDING_OF
    from ekgfx.export.parity import TOLERANCE as TOLERANCE_OF

    from ekgfx.errors import ExportError

    try:
        parity = check_parity(model, path, inputs)
    except ExportError as error:
        moved = amplification(model, inputs, ROUNDING_OF[precision])
        status = "amplifies" if moved > TOLERANCE_OF[precision] else "failed"
        return blank(network, precision, status, str(error)) | {"rounding_moves": moved}
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


def run(names: list[str], output: Path, budget: float, pixels: int | None) -> None:
    """Measure every model that `output` does not hold yet, each in its own process, for about `budget` seconds."""
    done = {row["model"] for row in Lines(output)}
    end = time.monotonic() + budget
    warm_up()
    for i, name in enumerate(names):
        if name in done:
            continue
        if time.monotonic() > end:
            print(f"stopped after {budget:.0f} s, before {name}; run the same again to go on", flush=True)
            return
        rows = in_a_process(name, pixels)
        if pixels:
            rows = [row | {"pixels": pixels} for row in rows]
        with output.open("a") as file:  # all rows of a model at once, so that a model is there whole or not at all
            file.write("".join(json.dumps({"model": name, **row}) + "\n" for row in rows))
        print(f"[{i + 1}/{len(names)}] {name}: " + ", ".join(brief(row) for row in rows), flush=True)


def in_a_process(name: str, pixels: int | None) -> list[Row]:
    """A row for every case: what the process sent, and what it came to where it sent nothing."""
    rows: list[Row] = []
    try:
        rows.extend(streamed(measure, name, pixels, timeout=TIMEOUT, start="fork"))
        return rows
    except Ended as ended:
        known = {(row["network"], row["precision"]) for row in rows}
        status = "timeout" if str(ended).startswith("no result") else "error"
        return rows + [blank(*case, status, str(ended)) for case in CASES if case not in known]


def warm_up() -> None:
    """Import everything and fill the exporter's tables once, for all processes to come. No session of onnxruntime is
    opened, whose threads a forked process would lack."""
    import timm  # noqa: F401
    import torch
    from ekgfx.export import to_onnx

    import ekgfx

    torch.set_num_threads(1)
    model, inputs = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU()).eval(), torch.randn(2, 3, 4, 4)
    ekgfx.trace(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        to_onnx(model, inputs, Path(folder) / "net.onnx")


def brief(row: Row) -> str:
    figure = f" {row['relative']:.1e}" if "relative" in row else ""
    return f"{row['network']} {row['precision']} {row['status']}{figure}"


def by_model(rows: list[Row]) -> dict[str, dict[tuple[str, str], Row]]:
    """Model → network and precision → row."""
    models: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        models.setdefault(row["model"], {})[row["network"], row["precision"]] = row
    return models


def table(rows: list[Row]) -> str:
    """One Markdown row a model: the four differences, and the exporter's time and nodes for the dense fp32 file."""
    lines = [
        "| model | dense fp32 | dense fp16 | pruned fp32 | pruned fp16 | nodes | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cases in sorted(by_model(rows).items()):
        cells = [
            f"{cases[case]['relative']:.1e}" if cases[case]["status"] == "ok" else f"**{cases[case]['status']}**"
            for case in CASES
        ]
        dense = cases["dense", "fp32"]
        name += f" ({dense['pixels']} px)" if "pixels" in dense else ""
        lines.append(
            "| " + " | ".join([name, *cells, str(dense.get("nodes", "")), str(dense.get("seconds", ""))]) + " |"
        )
    return "\n".join(lines) + "\n"


def page(rows: list[Row]) -> str:
    """docs/onnx.md: what the rows say together, and each file that failed."""
    models = by_model(rows)
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
    missing = [name for name in listed() if name not in models]
    return HEAD.format(models=len(models), counts="; ".join(counts), missing=", ".join(missing) or "nothing") + (
        "## What did not\n\n" + "\n".join(failures) + "\n" if failures else ""
    )


HEAD = """# ONNX files of timm models

`python benchmarks/coverage.py onnx --output benchmarks/results/onnx.jsonl` measures;
with `--table`, it prints a row for each model.

{models} of the models in `benchmarks/models.txt`, each dense and pruned to half of its MACs, with random weights that
are perturbed as strongly as the network bears without amplifying rounding. A figure is the largest relative difference
between PyTorch and onnxruntime on the CPU over two batch sizes; a file counts when it passes onnx's checker with shape
inference and differs by at most 1e-4 in fp32 and 1e-2 in fp16. Equal to the model, {counts}.
Images have the model's own size where no other is named (`--pixels`).
Not measured of the list: {missing}. Rows without `moves` in the raw file are of an earlier state of
the program, which judged what the network bears by rounding its inputs alone. 2026-11-25 and 26, two cores of an AMD
EPYC shared with other work, torch 2.14.1, onnxruntime 1.31.1.

"""


def main(asked: argparse.Namespace) -> None:
    if asked.table or asked.page:
        print((table if asked.table else page)(list(Lines(asked.output))), end="")
    else:
        run(asked.models or listed(), asked.output, asked.seconds, asked.pixels)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", help="timm names (default: benchmarks/models.txt)")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further model after this time")
    parser.add_argument("--pixels", type=int, help="side of the images (default: the model's own)")
    parser.add_argument("--table", action="store_true", help="print what the output holds; measures nothing")
    parser.add_argument("--page", action="store_true", help="print docs/onnx.md from the output; measures nothing")
