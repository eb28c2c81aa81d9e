"""`ekgfx groups --sensitivity`: what each group costs when it alone is cut."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ekgfx.base import named
from ekgfx.cli.options import Decorator, setting
from ekgfx.cli.subject import look

IMAGES = 256
_OPTIONS: dict[str, Decorator] = {
    "data": click.option("--data", metavar="SPEC", help="What the cuts are judged on."),
    "repair": click.option(
        "--repair/--no-repair", default=None, help="Repair every cut network, which takes far longer.  [default: no]"
    ),
    "search__importance": setting("search.importance", "--importance", help="Which channels go first."),
    "samples": click.option(
        "samples",
        "--images",
        type=click.IntRange(2),
        help=f"Images to choose channels on, and as many to judge on.  [default: {IMAGES}]",
    ),
    "logits": click.option("--logits", metavar="PLACE", help="Where the logits are in the model's output."),
    "device": click.option("--device", metavar="auto|cpu|cuda[:N]", help="Where to compute.  [default: auto]"),
}


def parameters(command: Callable[..., Any]) -> Callable[..., Any]:
    """--sensitivity, and the options that go with it."""
    for option in reversed(_OPTIONS.values()):
        command = option(command)
    says = "What each group costs when it alone is cut to 75, 50 and 25%; with the options below."
    return click.option("--sensitivity", is_flag=True, help=says)(command)


def wanted(flags: dict[str, Any]) -> bool:
    """Whether --sensitivity was typed; takes all of its options out of `flags` where not. UsageError where only one of
    these was."""
    if flags.pop("sensitivity"):
        return True
    typed = [name for name in _OPTIONS if flags.pop(name) is not None]
    if typed:
        option = {"samples": "images", "search__importance": "importance"}.get(typed[0], typed[0])
        raise click.UsageError(f"--{option} goes with --sensitivity", click.get_current_context())
    return False


def show(
    model: str,
    *,
    weights: str,
    as_json: bool,
    svg: Path | None,
    leaf: tuple[str, ...],
    unused: tuple[str, ...],
    outputs: tuple[str, ...],
    data: str | None,
    repair: bool | None,
    search__importance: str | None,
    samples: int | None,
    device: str | None,
    **asked: Any,
) -> None:
    """Measures, and prints a table or JSON; with `svg` draws a chart as well."""
    named.check_weights(weights)
    named.check_data(data)
    from ekgfx.cli.progress import Terminal
    from ekgfx.cli.render import out, show_table, table
    from ekgfx.pipeline.job import LABEL_FREE
    from ekgfx.search.effort import fitting_batch
    from ekgfx.search.sensitivity import sensitivity
    from ekgfx.tracing.trace import silently_traced

    with Terminal() as report:
        report.stage("build the model")
        subject = look(model, data=data, weights=weights, device=device or "auto", otherwise=LABEL_FREE, **asked)
        built = subject.built
        if built.weights_origin.startswith("random"):
            report.note("the weights are random: what a group costs says nothing of the trained network")
        report.stage("trace")
        leaf, outputs = (*built.leaf, *leaf), (*built.outputs, *outputs)
        traced = silently_traced(built.model, built.example_inputs, leaf=leaf, unused=unused, outputs=outputs or None)
        size = fitting_batch(traced)
        chosen, held = (subject.data.loader(split, size).mixed(samples or IMAGES) for split in ("train", "test"))
        report.stage(f"cut one group after the other{' and repair' * bool(repair)}")
        found = sensitivity(
            traced,
            chosen,
            held,
            repair=bool(repair),
            importance=search__importance or "taylor",
            logits=subject.logits,
            on_cut=report.part,
        )
    if svg is not None:
        from ekgfx.report import sensitivity as chart

        chart.write(found, model, svg)
    if as_json:
        click.echo(json.dumps({"model": model, "data": subject.spec, **found.to_json()}, indent=1))
        return
    show_table(table(None, found.columns, found.rows(), numbers=range(1, len(found.columns))))
    out.print(f"\n{model}: {found.caption}; the groups that cost most come first", markup=False)
