"""Every model of a sweep in a process of its own, and what the sweep over timm found."""

import argparse
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Any

from common import Ended, Lines, Row, apart

TIMEOUT = 3600.0


def sweep(measure: Callable[[str], Row], names: Sequence[str], found: Lines, timeout: float = TIMEOUT) -> None:
    """Measures every model that `found` does not hold yet, each in its own process, forked with the imports done."""
    import timm  # noqa: F401

    import ekgfx.search
    import ekgfx.surgery.cut  # noqa: F401

    for i, name in enumerate(names):
        if {"model": name} in found:
            continue
        print(f"[{i + 1}/{len(names)}] ", end="")
        try:
            row = apart(measure, name, timeout=timeout, start="fork")
        except Ended as ended:
            row = {"model": name, "status": "error", "message": without_folders(str(ended))[:600]}
        found.add(row)


def spread(columns: Iterable[Sequence[str]]) -> list[str]:
    """The names of all columns, one of each in turn, so that a sweep that is stopped has seen some of each."""
    return [name for names in zip_longest(*columns) for name in names if name is not None]


def begun() -> float:
    """Makes a process quiet, of one thread, and its random numbers the same each time; its CPU seconds so far."""
    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return time.process_time()


def sweep_options(parser: argparse.ArgumentParser, models: str) -> None:
    """What every sweep takes. models: what it calls them."""
    parser.add_argument("models", nargs="*", help=models)
    parser.add_argument("--output", required=True, help="JSON lines")
    parser.add_argument("--table", action="store_true", help="what the output says together; measures nothing")


def works(call: Callable[[], Any]) -> str:
    """Why a call fails, "" where it does not."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  every failure is a result
        return without_folders(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]
    return ""


def without_folders(message: str) -> str:
    """A message that does not say where packages are installed."""
    for folder in sorted(filter(None, sys.path), key=len, reverse=True):
        message = message.replace(f"{folder}/", "")
    return message


def rows(found: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| model | status | groups | prunable | class kept | export s | group ms | worst error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(found, key=lambda r: r["model"]):
        if "groups" not in row:
            lines.append(f"| {row['model']} | {row['status']}: {row.get('message', '')[:80]} | | | | | | |")
            continue
        if "checks" not in row:
            cells = [row["model"], row["status"], row["groups"], f"{row['share']:.1%}", ""]
            lines.append("| " + " | ".join(map(str, [*cells, row["export_seconds"], row["group_ms"], ""])) + " |")
            continue
        checks = row["checks"].values()
        worst = max((max(c["masked"], c.get("pruned", 0)) for c in checks), default=0)
        inner = sorted({name for c in checks for name in c.get("graphed", ())})
        kept = all(c.get("class_kept", False) for c in checks)
        whole = ("yes" + (f" (graphs: {', '.join(inner)})" if inner else "")) if kept else "no"
        cells = [row["model"], row["status"], row["groups"], f"{row['share']:.1%}", whole]
        lines.append(
            "| " + " | ".join(map(str, [*cells, row["export_seconds"], row["group_ms"], f"{worst:.0e}"])) + " |"
        )
    return "\n".join(lines) + "\n"


def summary(rows: list[Row]) -> str:
    """What the rows say together."""
    measured = [row for row in rows if "checks" in row]
    analysed = [row for row in rows if "groups" in row]
    shares = sorted(row["share"] for row in analysed)
    kept = [row for row in measured if all(check.get("class_kept") for check in row["checks"].values())]
    useful = [row for row in kept if not any(check.get("interface") for check in row["checks"].values())]
    large = [row for row in measured if row["deepcopy_seconds"] >= 0.05]
    ratios = sorted(c["cut_seconds"] / r["deepcopy_seconds"] for r in large for c in r["checks"].values())
    low = [row for row in analysed if row["share"] < 0.95]
    lines = [
        f"- **{sum(row['status'].startswith('ok') for row in rows)} of {len(rows)} models are exact** "
        f"(to 1e-10; {sum(row['status'] != 'ok' for row in measured)} that cast to float32 themselves to 1e-6); "
        f"{len(analysed) - len(measured)} are too large to be cut here and were analysed on meta tensors.",
        f"- {len(kept)} of {len(measured)} keep their class; {len(useful)} of those can be used as before "
        "(`forward_features`, `num_features`, `reset_classifier`, `train()`, `state_dict`).",
        f"- {shares[len(shares) // 2]:.1%} of the median model's parameters lie in tensors that some group cuts, "
        f"{shares[0]:.1%} of the least.",
        f"- Cutting, without verifying, takes {ratios[len(ratios) // 2]:.2f} times as long as a deep copy in the "
        f"median of the models whose copy takes at least 50 ms, and {ratios[-1]:.2f} times at most.",
        "- Below 95%: " + "; ".join(f"{r['model']} {r['share']:.1%} ({', '.join(r['uncut'])})" for r in low) + ".",
    ]
    return "\n".join(lines) + "\n"
