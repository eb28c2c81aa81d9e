"""The models of the coverage sweep pruned by Torch-Pruning: does the result run, and is it right? Resumable.

    python benchmarks/coverage.py torch-pruning --output benchmarks/results/coverage-peer.jsonl
    python benchmarks/coverage.py torch-pruning --output benchmarks/results/coverage-peer.jsonl --table

As its timm example does: magnitude importance, half of the channels of every layer, the classifier ignored, and the
number of heads told for every attention layer that has `num_heads` and a packed `qkv`. "Runs": the pruned model has
fewer parameters and a forward gives outputs of the original's shape. "Right": the output equals that of the original
with zeros in place of what was cut, to 1e-6 in float64. What was cut is read off a twin whose parameters hold their
own positions. Layer, group and RMS norms take other statistics in a masked network: where a model has them and the
outputs differ, nothing is said. Seconds: until the coupled layers are known, that is their pruner built, our export and
groups, one after the other in one process.
"""

import argparse
import copy
import time
import warnings
from typing import Any

from common import RESULTS, Lines, listed
from parts.coverage_tables import sweep
from parts.coverage_timm import export

TIMEOUT = 60


def measure(name: str) -> dict[str, Any]:
    """The row of one model."""
    import timm
    import torch
    import torch_pruning

    import ekgfx
    from ekgfx.surgery.check import perturb, relative_error

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name).eval().double()
    perturb(model)
    x, program, exporting = export(model)
    start = time.process_time()
    assert ekgfx.TracedModel(model, program, ((x,), {})).groups is not None
    row: dict[str, Any] = {"model": name, "ekgfx_seconds": round(exporting + time.process_time() - start, 2)}
    with torch.no_grad():
        expected = model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.copy_(torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape))
    start = time.process_time()
    heads = {m.qkv: m.num_heads for m in twin.modules() if hasattr(m, "num_heads") and hasattr(m, "qkv")}
    classifier = twin.get_classifier()
    ignored = list(classifier) if isinstance(classifier, tuple | list | torch.nn.ModuleList) else [classifier]
    pruner = torch_pruning.pruner.MetaPruner(
        twin,
        x,
        torch_pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=ignored,
        num_heads=heads,
    )
    row["seconds"] = round(time.process_time() - start, 2)
    pruner.step()
    for module in twin.modules():
        if hasattr(module, "num_heads") and hasattr(module, "qkv") and module.qkv in pruner.num_heads:
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim  # its example does not, timm reads it now
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, twin))
    row["params_kept"] = round(after / before, 4)
    masked, state = copy.deepcopy(model), model.state_dict()
    with torch.no_grad():
        for (key, code), target in zip(twin.state_dict().items(), masked.state_dict().values(), strict=True):
            flat, kept = state[key].flatten(), code.long().flatten()
            stays = torch.zeros_like(flat, dtype=torch.bool)
            stays[kept] = True
            target.copy_(torch.where(stays.reshape(target.shape), target, torch.zeros_like(target)))
            code.copy_(flat[kept].reshape(code.shape))
        try:
            got = twin(x)
        except Exception as error:  # noqa: BLE001  whatever the pruned model raises
            return row | {"status": "does not run", "message": f"{type(error).__name__}: {error}"[:200]}
        shapes = [[t.shape for t in torch.utils._pytree.tree_leaves(value)] for value in (got, expected)]
        if shapes[0] != shapes[1]:
            return row | {"status": "does not run", "message": "the output has another shape"}
        row["error"] = relative_error(got, masked(x))
    statistics = any("Norm" in type(m).__name__ and "Batch" not in type(m).__name__ for m in model.modules())
    right = "right" if row["error"] <= 1e-6 else "runs" if statistics else "wrong"
    return row | {"status": right if after < before else "nothing cut"}


def table(found: Lines, ours: Lines) -> str:
    """How many of the models that both have measured end how."""
    theirs, mine = ({row["model"]: row for row in rows} for rows in (found, ours))
    both = sorted(theirs.keys() & mine.keys())
    statuses = [theirs[name]["status"] for name in both]
    rows = {
        "right": "runs, equal to the masked original",
        "runs": "runs; not decided (norms over channels)",
        "wrong": "runs, but computes something else",
        "nothing cut": "nothing cut",
        "does not run": "the pruned model does not run",
        "error": f"fails, or no result after {TIMEOUT} s",
    }
    lines = ["| | Torch-Pruning | ekgfx |", "|---|---|---|"]
    good = sum(mine[name]["status"].startswith("ok") for name in both)
    for status, text in rows.items():
        own = good if status == "right" else len(both) - good if status == "error" else 0
        lines.append(f"| {text} | {statuses.count(status)} | {own} |")
    timed = [theirs[name] for name in both if "ekgfx_seconds" in theirs[name]]
    for field, whose in (("seconds", "Torch-Pruning"), ("ekgfx_seconds", "ekgfx")) if timed else ():
        seconds = sorted(row[field] for row in timed)
        lines.append(
            f"\n{whose}: {seconds[len(seconds) // 2]:.2f} s until the coupled layers are known in the median of the "
            f"{len(timed)} models for which Torch-Pruning's pruner can be built, {seconds[-1]:.1f} s at most."
        )
    return f"{len(both)} models:\n\n" + "\n".join(lines) + "\n"


def main(asked: argparse.Namespace) -> None:
    found = Lines(asked.output)
    if asked.table:
        print(table(found, Lines(asked.ours)))
    else:
        sweep(measure, asked.models or listed(), found, TIMEOUT)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", help="timm names (default: benchmarks/models.txt)")
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--table", action="store_true", help="the output beside ekgfx's; measures nothing")
    parser.add_argument(
        "--ours", default=RESULTS / "coverage.jsonl", help="what `coverage.py timm` wrote  [%(default)s]"
    )
