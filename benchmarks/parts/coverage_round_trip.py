"""Do pruned networks of diffusers and smp come back from their library's own format? Resumable.

    python benchmarks/coverage.py round-trip --output benchmarks/results/coverage-round-trip.jsonl
    python benchmarks/coverage.py round-trip --output benchmarks/results/coverage-round-trip.jsonl --table

Each network of the sweeps over both libraries is cut with `uniform_layers` to 90% of its MACs, saved by
`save_pretrained`, built and loaded by `from_pretrained`, and both outputs are compared. "no plan": no numbers of its
arguments say such a cut; why, the line of the file says.
"""

import argparse
import tempfile
import time
from typing import Any

from common import Lines, Row
from parts.coverage_libraries import SINGLE
from parts.coverage_networks import NETWORKS
from parts.coverage_tables import begun, sweep, sweep_options, without_folders, works

KEPT = 0.9


def names() -> list[str]:
    """The networks of the libraries that save their arguments."""
    return [f"{library}:{short}" for library in ("diffusers", "smp") for short in NETWORKS[library]]


def measure(name: str) -> Row:
    """The row of one network."""
    import torch

    import ekgfx
    from ekgfx.surgery.check import perturb, relative_error
    from ekgfx.surgery.configurations import configuration

    start = begun()
    library, _, short = name.partition(":")
    network = NETWORKS[library][short]()
    model = network.model.eval().double() if network.double else network.model.eval().float()
    perturb(model)
    inputs, row = network.inputs(2, False), {"model": name}
    traced = ekgfx.trace(model, inputs, leaf=network.leaf)
    try:
        found = ekgfx.search(traced, flops=KEPT, strategy="uniform", importance="magnitude", uniform_layers=True)
    except ekgfx.EkgfxError as error:
        return row | {"status": "no plan", "message": without_folders(str(error))[:300]}
    pruned = ekgfx.prune(model, found, traced)

    def round_trip() -> None:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            pruned.save_pretrained(folder)
            again = type(model).from_pretrained(folder).eval().to(next(model.parameters()).dtype)
            off = relative_error(again(*inputs), pruned.eval()(*inputs))
        assert off <= SINGLE, f"off by {off:.1e}"

    fault = works(round_trip)
    before, after = vars(configuration(model)), vars(configuration(pruned))
    changed: dict[str, Any] = {key: [value, after[key]] for key, value in before.items() if after[key] != value}
    row |= {"kept": round(found.kept_fraction, 3), "changed": changed, "message": fault}
    return row | {"status": "no" if fault else "equal", "seconds": round(time.process_time() - start, 1)}


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| network | comes back | MACs kept | arguments that say the cut |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["model"]):
        told = "; ".join(f"{key} {old} → {new}" for key, (old, new) in row.get("changed", {}).items())
        kept = f"{row['kept']:.0%}" if "kept" in row else ""
        lines.append(f"| {row['model']} | {row['status']} | {kept} | {told} |")
    equal = sum(row["status"] == "equal" for row in rows)
    return f"{equal} of {len(rows)} come back equal.\n\n" + "\n".join(lines) + "\n"


def main(asked: argparse.Namespace) -> None:
    found = Lines(asked.output)
    if asked.table:
        print(table(list(found)))
    else:
        sweep(measure, asked.models or names(), found)


def options(parser: argparse.ArgumentParser) -> None:
    sweep_options(parser, "LIBRARY:NETWORK (default: all of both)")
