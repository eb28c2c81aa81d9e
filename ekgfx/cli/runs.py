"""`ekgfx list` and `ekgfx compare`: several runs beside each other."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ekgfx.base.units import human, percent
from ekgfx.errors import EkgfxError, RunError
from ekgfx.runs.directory import MANIFEST, STAGES, in_use, read_manifest
from ekgfx.settings.budgets import BUDGETS

FORMATS = (".png", ".svg", ".pdf")


@click.command("list")
@click.argument("folder", required=False, type=click.Path(path_type=Path), default=Path("runs"))
@click.option("--json", "as_json", is_flag=True, help="As JSON, one list, on stdout.")
def list_runs(folder: Path, as_json: bool) -> None:
    """List the runs in FOLDER (runs/ by default), the newest last: what was asked, and what became of it."""
    found = sorted((path.parent for path in folder.glob(f"*/{MANIFEST}")), key=_created)
    if not found:
        raise RunError(f"no run in {folder}/; `ekgfx prune` makes one, or name another FOLDER")
    if as_json:
        click.echo(json.dumps([{"run": str(path), **_facts(path)} for path in found], indent=1))
        return
    from ekgfx.cli.render import out, show_table, table

    columns = ("run", "made", "model", "budget", "status", "quality", "MACs", "parameters")
    told = {str(path): _facts(path) for path in found}
    show_table(table(None, columns, [(path, *_row(facts)) for path, facts in told.items() if "error" not in facts]))
    for path, facts in told.items():
        if "error" in facts:
            out.print(f"{path} cannot be read: {facts['error']}", markup=False)


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.png|svg|pdf",
    help="The chart  [default: compare.svg, here]",
)
def compare(runs: tuple[Path, ...], output: Path | None) -> None:
    """Compare RUNS: accuracy, MACs, parameters and latency in a table, and a chart of accuracy over MACs."""
    picture = Path("compare.svg") if output is None else output
    if picture.suffix not in FORMATS:
        raise click.BadParameter(f"{str(picture)!r}: a chart's name ends in {', '.join(FORMATS)}", param_hint="-o")
    short = {run: run.name for run in runs}
    names = short if len(set(short.values())) == len(runs) else {run: str(run) for run in runs}
    facts = {names[run]: _read(run) for run in runs}
    for name, told in facts.items():
        if not told["results"]:
            raise RunError(f"{name} has no results yet; finish it with `ekgfx prune --resume {name}`")
    from ekgfx.cli.render import out, show_table, table

    timed = any(told["latency"] for told in facts.values())
    columns = ["run", "budget", *STAGES.values(), "MACs", "parameters", *(["latency"] if timed else [])]
    rows = []
    for name, told in facts.items():
        qualities = [percent(_quality(told["results"].get(stage))) for stage in STAGES]
        rows.append((name, told["budget"], *qualities, *_costs(told), *([told["latency"] or "–"] if timed else [])))
    show_table(table(None, columns, rows, numbers=range(2, len(columns))))
    _draw(facts, picture)
    out.print(f"wrote {picture}", soft_wrap=True)


def _created(path: Path) -> str:
    try:
        return str(read_manifest(path).get("created", ""))
    except EkgfxError:
        return ""


def _facts(path: Path) -> dict[str, Any]:
    """What run.json says of a run; of a damaged one, that it is."""
    try:
        return _read(path)
    except EkgfxError as error:
        return {"error": str(error)}


def _read(path: Path) -> dict[str, Any]:
    manifest = read_manifest(path)
    settings = manifest.get("settings") or {}
    search = settings.get("search") or {}
    asked = {BUDGETS[key]: search[key] for key in BUDGETS if search.get(key) is not None}
    said = [f"{_amount(keep)} {unit}" for unit, keep in asked.items()]
    times, status = (manifest.get("latency") or {}).get("milliseconds"), manifest.get("status", "–")
    return {
        "made": str(manifest.get("created", ""))[:16].replace("T", " "),
        "model": settings.get("model"),
        "budget": ", ".join(said) or "–",
        "status": "interrupted" if status == "running" and not in_use(path) else status,  # by a kill
        "results": manifest.get("results", {}),
        "latency": f"{times['dense']:.3g} → {times['pruned']:.3g} ms" if times else None,
    }


def _amount(keep: object) -> str:
    if isinstance(keep, list):
        return ", ".join(map(_amount, keep))
    return f"{100 * keep:g}%" if isinstance(keep, float) else str(keep)


def _quality(score: Mapping[str, Any] | None) -> float | None:
    """Accuracy, or agreement with the unpruned network where there are no labels."""
    if score is None:
        return None
    value = score.get("accuracy") if score.get("accuracy") is not None else score.get("agreement")
    return value if isinstance(value, int | float) else None


def _ends(told: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The scores of the unpruned network and of the last one."""
    results = [told["results"][stage] for stage in STAGES if stage in told["results"]]
    return (results[0], results[-1]) if results else ({}, {})


def _costs(told: Mapping[str, Any]) -> tuple[str, str]:
    """MACs and parameters, before and after."""

    def change(key: str) -> str:
        first, last = _ends(told)
        return f"{human(first[key])} → {human(last[key])}" if key in first and key in last else "–"

    return change("macs"), change("params")


def _row(told: Mapping[str, Any]) -> tuple[str, ...]:
    first, last = _ends(told)
    quality = f"{percent(_quality(first))} → {percent(_quality(last))}" if first else "–"
    named = (str(told.get(key) or "–") for key in ("made", "model", "budget", "status"))
    return (*named, quality, *_costs(told))


def _draw(facts: Mapping[str, Mapping[str, Any]], picture: Path) -> None:
    """Quality over the share of the MACs that is kept: one line a run, from the unpruned network to the last one."""
    from matplotlib.figure import Figure

    from ekgfx.base.files import replacing

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, told in facts.items():
        scores = [told["results"][stage] for stage in STAGES if stage in told["results"]]
        points = [(100 * s["macs"] / scores[0]["macs"], 100 * q) for s in scores if (q := _quality(s)) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set_xlabel("MACs kept (%)")
    axes.set_ylabel("accuracy (agreement where there are no labels), %")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    with replacing(picture) as partial:
        figure.savefig(partial, format=picture.suffix[1:])
