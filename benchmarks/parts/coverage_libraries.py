"""Small networks of other libraries with random weights, and what becomes of them: one way, one row for each.

    python benchmarks/coverage.py diffusers --output benchmarks/results/coverage-libraries.jsonl          # resumes
    python benchmarks/coverage.py diffusers --output benchmarks/results/coverage-libraries.jsonl --table

The libraries are torchvision, smp (segmentation_models_pytorch), ultralytics, diffusers, open_clip, monai, torchaudio
and efficientnet_pytorch. Of each network half of every group is cut at random, in float64 (in float32 where a forward
makes such tensors itself: RAFT, four of diffusers, VQVAE), with all parameters perturbed. What the columns say:

    exact: the sliced graph equals the user's own network with zeros in place of what is cut (statistics over what is
    kept), and the cut module equals the sliced graph, at another batch, both to 1e-9; training: the same in training
    mode with dropout off, where that has been traced; size: the cut module equals the sliced graph of the original,
    traced at that size ("fixed": the original does not run at another); class: it keeps its class; graphs inside:
    modules whose forward was replaced; API: what people do with such a model (a detector around the cut backbone finds
    and trains, Ultralytics' predictor and loss run, a sliding window and a loss); ONNX: exported (by Ultralytics' own
    exporter where it has one), and the same in ONNX Runtime ("exported": not compared there);
    prunable: the share of the parameters in tensors that some group cuts; s: CPU seconds of one thread.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Lines, Row
from parts.coverage_networks import NETWORKS, Network
from parts.coverage_tables import begun, sweep, sweep_options, without_folders, works

TOLERANCE, SINGLE = 1e-9, 1e-4
TEXT = (__doc__ or "").partition("\n\n")[2]


def measure(name: str) -> dict[str, Any]:
    """The row of one network, LIBRARY:NAME."""

    import ekgfx
    from ekgfx.surgery.check import perturb
    from ekgfx.surgery.masked import check_masked

    start = begun()
    library, _, short = name.partition(":")
    network = NETWORKS[library][short]()
    model = network.model.eval().double() if network.double else network.model.eval().float()
    tolerance = TOLERANCE if network.double else SINGLE
    perturb(model)
    row: dict[str, Any] = {"model": name, "params": sum(p.numel() for p in model.parameters())}
    also = [network.inputs(2, True)] if network.also else []
    traced = ekgfx.trace(model, network.inputs(2, False), leaf=network.leaf, also=also)
    row["also"] = network.also
    row |= {"groups": len(traced.groups), "share": round(traced.groups.prunable_share, 3)}
    row |= {"unknown": traced.unknown_ops, "notes": [without_folders(note)[:200] for note in traced.notes]}
    row["ways"] = [str(graph.way) for graph in traced.graphs]
    draw = random.Random(0)
    plan = ekgfx.Plan(
        {n: tuple(sorted(draw.sample(range(g.size), max(1, g.size // 2)))) for n, g in traced.groups.items()}
    )
    other = network.inputs(3, False)
    try:
        row["masked"] = float(check_masked(traced, plan, other))
        pruned = ekgfx.prune(model, plan, traced)
    except ekgfx.EkgfxError as error:
        return row | {
            "status": "failed",
            "message": without_folders(str(error))[:400],
            "seconds": round(time.process_time() - start, 1),
        }
    row |= behaves(network, traced, plan, pruned, tolerance)
    row["class"] = type(pruned) is type(model)
    row["graphs"] = sorted({each.kind for each in ekgfx.replaced(pruned)})
    row["api"] = works(lambda: network.use(pruned)) if network.use else None
    export = network.export or (lambda module: exported(module, network))
    row["onnx"] = works(lambda: export(pruned)) if network.exports else None
    row["compared"] = row["onnx"] == ""
    row["seconds"] = round(time.process_time() - start, 1)
    off = [row[key] for key in ("size", "training") if row[key].startswith(f"{AssertionError.__name__}: off by")]
    row["status"] = "inexact" if off or max(row["masked"], row["batch"]) > tolerance else "ok"
    return row


def behaves(network: Network, traced: Any, plan: Any, pruned: Any, tolerance: float) -> dict[str, Any]:
    """The cut module against the sliced graph: another batch, another size, training mode."""
    import torch

    import ekgfx
    from ekgfx.surgery.check import check_pruned, compare_outputs, relative_error

    model, found = traced.model, {"batch": float(check_pruned(traced, plan, pruned, network.inputs(3, False)))}

    def at_another_size() -> None:
        also = [network.inputs(2, False)] if network.also else []
        there = ekgfx.trace(model, network.inputs(2, True), leaf=network.leaf, also=also)
        with torch.no_grad():
            off = relative_error(
                pruned.eval()(*network.inputs(2, True)), there.subnetwork(plan)(*network.inputs(2, True))
            )
        assert off <= tolerance, f"off by {off:.1e}"

    asked = works(lambda: model.eval()(*network.inputs(2, True)))
    found["size"] = "fixed" if asked else works(at_another_size)
    trained = [graph for graph in traced.graphs if graph.way.training]
    if trained:

        def in_training() -> None:
            from ekgfx.execution.subnetwork import SubNetwork

            graph = trained[0]
            off = compare_outputs(pruned, SubNetwork(graph, traced.groups.kept(plan)), *graph.example)
            assert off <= tolerance, f"off by {off:.1e}"

        found["training"] = works(in_training)
    else:
        found["training"] = works(lambda: pruned.train()(*network.inputs(3, False)))
    pruned.eval()
    return found


def exported(pruned: Any, network: Network) -> None:
    """To ONNX in float32, and compared there with what ONNX Runtime computes, at another batch, too."""
    import copy

    import torch
    from ekgfx.export import check_parity, to_onnx

    inputs = tuple(
        t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in network.inputs(2, False)
    )
    with tempfile.TemporaryDirectory() as folder:
        single, path = copy.deepcopy(pruned).float(), Path(folder) / "model.onnx"
        to_onnx(single, inputs, path)
        check_parity(single, path, inputs)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, with what they say together."""
    cut = [row for row in rows if "batch" in row]

    def share(says: Callable[[Row], Any], some: list[Row]) -> str:
        return f"{sum(bool(says(row)) for row in some)} of {len(some)}"

    lines = [
        f"- {share(lambda r: 'groups' in r, rows)} are traced as they come; "
        f"{share(lambda r: r['status'] == 'ok', rows)} are cut exactly.",
        f"- {share(lambda r: r['class'], cut)} keep their class, {share(lambda r: not r['graphs'], cut)} without "
        f"another forward inside; {share(lambda r: not r['api'], [r for r in cut if r['api'] is not None])} work with "
        f"the library's API; {share(lambda r: not r['onnx'], [r for r in cut if r['onnx'] is not None])} export to "
        "ONNX.",
        "",
        "| network | status | groups | prunable | graphs inside | training | other size | API | ONNX | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: r["model"]):
        if "batch" not in row:
            why = row.get("message", "")[:110].replace("|", "/")
            lines.append(f"| {row['model']} | {row['status']}: {why} | | | | | | | | |")
            continue
        size = "fixed" if row["size"] == "fixed" else "no" if row["size"] else "yes"
        answers = ["" if row[key] is None else "no" if row[key] else "yes" for key in ("api", "onnx")]
        if row["onnx"] == "" and not row.get("compared"):
            answers[1] = "exported"
        cells = [row["model"], row["status"], row["groups"], f"{row['share']:.0%}", ", ".join(row["graphs"]) or "none"]
        cells += ["no" if row["training"] else "yes", size, *answers, row["seconds"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Library:
    """One library as a part of the program."""

    name: str
    __doc__: str = field(default=__doc__ or "")

    def names(self) -> list[str]:
        return [f"{self.name}:{short}" for short in NETWORKS[self.name]]

    def main(self, asked: argparse.Namespace) -> None:
        found = Lines(asked.output)
        if asked.table:
            print(table([row for row in found if row["model"].startswith(f"{self.name}:")]))
        else:
            sweep(measure, asked.models or self.names(), found)

    def options(self, parser: argparse.ArgumentParser) -> None:
        sweep_options(parser, f"{self.name}:NETWORK (default: all of them)")


LIBRARIES: Mapping[str, Any] = {
    name: Library(
        name,
        f"Small networks of {name}.\n\n{TEXT}".replace("coverage.py diffusers", f"coverage.py {name}"),
    )
    for name in NETWORKS
}
