"""Which models can be pruned, and is the result right? Every model in a process of its own; resumable.

    python benchmarks/coverage.py timm --output benchmarks/results/coverage.jsonl          # benchmarks/models.txt
    python benchmarks/coverage.py timm --output out.jsonl test_resnet vit_tiny_patch16_224
    python benchmarks/coverage.py timm --output benchmarks/results/coverage.jsonl --table  # as in docs/coverage.md
    python benchmarks/coverage.py timm --output benchmarks/results/coverage.jsonl --rows   # one row a model

For each model, in float64 with all parameters perturbed: trace, group, cut about half of every group at random
("half"), and cut every group evenly until 55% of the MACs are left ("flops55"); then compare
  masked:  the sliced graph against the uncut graph with zeros in place of what was cut,
  pruned:  the module after surgery against the sliced graph, on fresh inputs of another batch size; `ekgfx.prune`
           itself has then traced the result again and compared every operator's shape, MACs and parameters with the
           prediction, and the output on the traced inputs to 1e-10;
and use the pruned module as timm's users do (`interface`). Models of more parameters than LARGEST are analysed on meta
tensors and not cut. Models that take any image size get 128×128 pixels (or 126
or 144), the others what they are made for.
"""

import argparse
import contextlib
import copy
import gc
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from common import Lines, listed
from parts.coverage_tables import rows, summary, sweep, sweep_options

PIXELS = (128, 126, 144)  # the first that a model takes: some need whole groups of 3×3 patches
LARGEST = 600_000_000  # parameters; cutting takes about 25 bytes for each


def measure(name: str) -> dict[str, Any]:
    """The row of one model."""
    import timm
    import torch

    import ekgfx
    from ekgfx.graph.cost import mac_table
    from ekgfx.surgery.check import check_pruned, perturb
    from ekgfx.surgery.masked import check_masked

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.device("meta"):
        shell = timm.create_model(name).eval().double()
    large = sum(p.numel() for p in shell.parameters()) > LARGEST
    model = shell if large else timm.create_model(name).eval().double()
    x, program, exporting = export(model)
    row: dict[str, Any] = {"model": name, "params": sum(p.numel() for p in model.parameters())}
    row |= {"pixels": x.shape[-1], "export_seconds": round(exporting, 2)}
    with timing() as seconds:
        traced = ekgfx.TracedModel(model, program, ((x,), {}))
        groups = traced.groups
    row |= {"group_ms": round(1e3 * seconds[0], 1), "groups": len(groups)}
    row |= {"operators": len(traced.operations), "share": round(groups.prunable_share, 4)}
    row |= {"unknown": traced.unknown_ops, "uncut": uncut(model, groups)}
    values = torch.utils._pytree.tree_leaves([operation.node.meta["val"] for operation in traced.operations])
    row["single"] = any(isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in values)
    assert mac_table(traced), "no operator with MACs"
    if large:
        return row | {"status": "analysed"}

    perturb(model)
    with timing() as seconds:
        copy.deepcopy(model)
    row["deepcopy_seconds"] = round(seconds[0], 3)
    rng = random.Random(0)
    half = {n: sorted(rng.sample(range(g.size), max(1, g.size // 2))) for n, g in groups.items()}
    plans = {"half": ekgfx.Plan({n: tuple(k) for n, k in half.items()}), "flops55": even_plan(traced, 0.55)}
    row["checks"] = {}
    for label, plan in plans.items():
        check: dict[str, Any] = {"macs": round(traced.cost(plan).macs / max(traced.cost().macs, 1), 4)}
        row["checks"][label] = check
        check["masked"] = check_masked(traced, plan, (x,))
        with timing() as seconds:
            ekgfx.prune(model, plan, traced, verify=False)
        check["cut_seconds"] = round(seconds[0], 3)
        start = time.process_time()
        try:
            pruned = ekgfx.prune(model, plan, traced)
        except ekgfx.EkgfxError as error:
            check["error"] = str(error)[:600]
            continue
        check["prune_seconds"] = round(time.process_time() - start, 2)
        check["class_kept"] = type(pruned) is type(model)
        check["graphed"] = sorted({each.kind for each in ekgfx.replaced(pruned)})
        if label == "half":
            check["pruned"] = check_pruned(traced, plan, pruned, (torch.randn(3, *x.shape[1:], dtype=x.dtype),))
        elif check["class_kept"]:
            check["interface"] = interface(model, pruned, x)
        del pruned
    row["status"] = status(row)
    return row


@contextlib.contextmanager
def timing() -> Iterator[list[float]]:
    """CPU seconds of what is done inside, in the list at its end. Without garbage collection: a full one takes 0.25 s
    once torch and timm are loaded, whatever it interrupts."""
    seconds: list[float] = []
    gc.collect()
    gc.disable()
    start = time.process_time()
    yield seconds
    seconds.append(time.process_time() - start)
    gc.enable()


def export(model: Any) -> tuple[Any, Any, float]:
    """Example inputs, the exported program, and seconds: on few pixels where the model takes them."""
    import torch

    channels, *pixels = model.pretrained_cfg["input_size"]
    fixed = model.pretrained_cfg.get("fixed_input_size", False)
    sizes = [pixels] if fixed else [*([n, n] for n in PIXELS), pixels]
    for size in sizes:
        x = torch.randn(2, channels, *size, dtype=torch.float64, device=next(model.parameters()).device)
        start = time.process_time()
        try:
            with torch.no_grad():
                return x, torch.export.export(model, (x,), strict=False), time.process_time() - start
        except Exception:  # whatever a model's own code raises on a size that it does not take
            if size is sizes[-1]:
                raise
    raise AssertionError("there is a size")


def uncut(model: Any, groups: Any) -> dict[str, int]:
    """Why parameters lie in tensors that no group cuts: reason → number of them, where it is over 1% of the model."""
    cut = {place.parameter for group in groups.values() for place in group.places}
    reasons: dict[str, list[str]] = {}
    for place in groups.frozen:
        reasons.setdefault(place.parameter, []).append(place.reason)
    total, found = sum(p.numel() for p in model.parameters()), Counter[str]()
    for name, parameter in model.named_parameters():
        if name not in cut:
            operator, _, why = (reasons.get(name) or ["a single position"])[0].rpartition(": ")
            found[f"{operator.partition(' in ')[0]}: {why}".removeprefix(": ")] += parameter.numel()
    return {reason: count for reason, count in found.most_common() if count > total / 100}


def interface(model: Any, pruned: Any, x: Any) -> str:
    """What of timm's interface does not work on the pruned module as it does on the original ('' if all does)."""
    import torch

    broken = []
    with torch.no_grad():
        if hasattr(model, "forward_features"):
            features, before = pruned.forward_features(x), model.forward_features(x)
            if isinstance(features, torch.Tensor):
                axis = next((d for d, n in enumerate(before.shape) if d and n == model.num_features), None)
                if axis is not None and features.shape[axis] != pruned.num_features:
                    broken.append(f"num_features is {pruned.num_features}, features are {tuple(features.shape)}")
    twin = copy.deepcopy(pruned)
    twin.load_state_dict(pruned.state_dict())
    if hasattr(model, "reset_classifier"):
        wanted = hasattr(model, "num_classes") and attempt(copy.deepcopy(model), x)
        if wanted == "" and (got := attempt(twin, x)):
            broken.append(f"reset_classifier: {got}")
    pruned.train()
    output = pruned(x)
    leaves = [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    sum(t.square().mean() for t in leaves).backward()
    if not any(p.grad is not None for p in pruned.parameters()):
        broken.append("no gradients")
    return "; ".join(broken)


def attempt(model: Any, x: Any) -> str:
    """Why a model cannot get a classifier of seven classes ('' if it can)."""
    import torch

    try:
        with torch.no_grad():
            model.reset_classifier(7)
            model.double().eval()
            leaves = torch.utils._pytree.tree_leaves(model(x))
    except Exception as error:  # noqa: BLE001  whatever a model's own code raises
        return f"{type(error).__name__}: {error}"[:200]
    return "" if leaves[0].shape[-1] == 7 else f"the output is {tuple(leaves[0].shape)}"


def even_plan(traced: Any, budget: float) -> Any:
    """Keep the same share of every group, at random, so that `budget` of the MACs are left, as near as that goes."""
    import ekgfx

    rng = random.Random(1)
    orders = {n: rng.sample(range(g.size), g.size) for n, g in traced.groups.items()}
    low, high = 0.0, 1.0
    full = traced.cost().macs
    for _ in range(20):
        ratio = (low + high) / 2
        plan = ekgfx.Plan({n: tuple(sorted(o[: max(1, round(ratio * len(o)))])) for n, o in orders.items()})
        low, high = (low, ratio) if traced.cost(plan).macs > budget * full else (ratio, high)
    return plan


def status(row: dict[str, Any]) -> str:
    """ok: exact to 1e-10 under both plans, with shapes and costs as predicted. "ok, float32 inside": to 1e-6, where the
    model itself casts to float32. inexact, failed, or nothing prunable."""
    checks = row["checks"].values()
    if any("error" in c for c in checks):
        return "failed"
    if not row["groups"]:
        return "nothing prunable"
    worst = max(max(c["masked"], c.get("pruned", 0)) for c in checks)
    return "ok" if worst <= 1e-10 else "ok, float32 inside" if row["single"] and worst <= 1e-6 else "inexact"


def main(asked: argparse.Namespace) -> None:
    found = Lines(asked.output)
    if asked.table or asked.rows:
        print((rows if asked.rows else summary)(list(found)))
    else:
        sweep(measure, asked.models or listed(), found)


def options(parser: argparse.ArgumentParser) -> None:
    sweep_options(parser, "timm names (default: benchmarks/models.txt)")
    parser.add_argument("--rows", action="store_true", help="a row for each model in the output; measures nothing")
