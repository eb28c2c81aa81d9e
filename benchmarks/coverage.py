"""Which models can be pruned, and is the result right? Every model in a process of its own; resumable.

    python benchmarks/coverage.py --output docs/coverage.jsonl         # the smallest model of every timm signature
    python benchmarks/coverage.py --output out.jsonl test_resnet vit_tiny_patch16_224
    python benchmarks/coverage.py --table docs/coverage.jsonl > docs/coverage.md

For each model, in float64 with all parameters perturbed: trace, group, cut about half of every group at random, and cut
every group evenly until 55% of the MACs are left; then compare
  masked:  the sliced graph against the uncut graph with zeros in place of what was cut,
  pruned:  the module after surgery against the sliced graph, on fresh inputs of another batch size; `ekgfx.prune`
           itself has then traced the result again and compared every operator's shape, MACs and parameters with the
           prediction.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIMEOUT = 900


def measure(name: str) -> dict[str, Any]:
    """The row of one model."""
    import timm
    import torch

    import ekgfx
    from ekgfx.cost import mac_table
    from ekgfx.verify import check_masked, check_pruned, perturb

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(name).eval().double()
    perturb(model)
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(2, *size, dtype=torch.float64)
    row: dict[str, Any] = {"model": name, "params": sum(p.numel() for p in model.parameters())}

    start = time.perf_counter()
    traced = ekgfx.trace(model, x)
    row["trace_seconds"] = round(time.perf_counter() - start, 2)
    start = time.perf_counter()
    groups = traced.groups
    row |= {"group_ms": round(1e3 * (time.perf_counter() - start), 1), "groups": len(groups)}
    row |= {
        "operators": len(traced.operations),
        "share": round(groups.prunable_share, 4),
        "unknown": traced.unknown_ops,
    }
    row["attention"] = any("scaled_dot" in n or "softmax" in n for n in map(str, {o.target for o in traced.operations}))
    assert mac_table(traced), "no operator with MACs"

    rng = random.Random(0)
    half = {n: sorted(rng.sample(range(g.size), max(1, g.size // 2))) for n, g in groups.items()}
    plans = {"half": ekgfx.Plan({n: tuple(k) for n, k in half.items()}), "flops55": even_plan(traced, 0.55)}
    row["checks"] = {}
    for label, plan in plans.items():
        check: dict[str, Any] = {"macs": round(traced.cost(plan).macs / max(traced.cost().macs, 1), 4)}
        row["checks"][label] = check
        check["masked"] = check_masked(traced, plan, (x,))
        start = time.perf_counter()
        try:
            pruned = ekgfx.prune(model, plan, traced)
        except ekgfx.EkgfxError as error:
            check["error"] = str(error)[:600]
            continue
        check["prune_seconds"] = round(time.perf_counter() - start, 2)
        check["class_kept"] = type(pruned) is type(model)
        check["pruned"] = check_pruned(traced, plan, pruned, (torch.randn(3, *size, dtype=torch.float64),))
    row["status"] = status(row)
    return row


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
    """ok | inexact | failed: exact to 1e-10 under both plans, with shapes and costs as predicted."""
    checks = row["checks"].values()
    if any("error" in c for c in checks):
        return "failed"
    right = all(c["masked"] <= 1e-10 and c["pruned"] <= 1e-10 for c in checks)
    return "ok" if right and row["groups"] else "inexact" if row["groups"] else "nothing prunable"


def run(names: list[str], output: Path) -> None:
    """Measure every model that `output` does not hold yet, each in its own process."""
    done = {json.loads(line)["model"] for line in output.read_text().splitlines()} if output.exists() else set()
    for i, name in enumerate(names):
        if name in done:
            continue
        command = [sys.executable, __file__, "--one", name]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
            row = json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None
            message = result.stderr.strip().splitlines()[-1][:600] if row is None and result.stderr.strip() else ""
        except subprocess.TimeoutExpired:
            row, message = None, f"no result after {TIMEOUT} s"
        row = row or {"model": name, "status": "error", "message": message}
        with output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"[{i + 1}/{len(names)}] {name}: {row['status']} {row.get('message', '')}", flush=True)


def smallest_of_each_signature() -> list[str]:
    """The smallest model of every distinct architecture signature in every timm module, by parameters."""
    listed = Path(__file__).parent / "models.txt"
    return listed.read_text().split()


def table(path: Path) -> str:
    """The rows as a Markdown table."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [
        "| model | status | groups | prunable | class kept | trace s | group ms | worst error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda r: r["model"]):
        if "checks" not in row:
            lines.append(f"| {row['model']} | {row['status']}: {row.get('message', '')[:80]} | | | | | | |")
            continue
        checks = row["checks"].values()
        worst = max((max(c["masked"], c.get("pruned", 0)) for c in checks), default=0)
        kept = all(c.get("class_kept", False) for c in checks)
        cells = [row["model"], row["status"], row["groups"], f"{row['share']:.1%}", "yes" if kept else "no"]
        lines.append(
            "| " + " | ".join(map(str, [*cells, row["trace_seconds"], row["group_ms"], f"{worst:.0e}"])) + " |"
        )
    good = sum(r["status"] == "ok" for r in rows)
    return f"{good} of {len(rows)} models: exact to 1e-10.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="timm names (default: benchmarks/models.txt)")
    parser.add_argument("--output", type=Path, default=Path("coverage.jsonl"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help="print the table of a finished file")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
    elif args.table:
        print(table(args.table))
    else:
        run(args.models or smallest_of_each_signature(), args.output)


if __name__ == "__main__":
    main()
