"""`ekgfx groups`: what of a model can be pruned together, and what cannot be pruned and why."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ekgfx.base import named
from ekgfx.base.units import several
from ekgfx.cli import sensitivity
from ekgfx.cli.options import images, preprocessing_of

if TYPE_CHECKING:
    from ekgfx.tracing.traced import TracedModel


@click.command()
@click.argument("model")
@click.option("--why", is_flag=True, help="Also say which dimensions cannot be pruned, and why.")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, one object, on stdout.")
@click.option(
    "--weights", metavar="auto|none|FILE", help="Weights of MODEL, on which groups don't depend  [default: none]"
)
@click.option("--ema", is_flag=True, help="Of a file with several state dicts, take the moving average.")
@click.option(
    "--input", metavar="SHAPE", help="Shape of the example input, such as 1x3x224x224 (comma: several inputs)."
)
@click.option("--classes", type=int, help="Number of classes to build the model with.")
@images
@click.option("--leaf", metavar="GLOB", multiple=True, help="Modules that run as they are, whole; repeatable.")
@click.option("--unused", metavar="GLOB", multiple=True, help="Parameters or modules that nothing uses; repeatable.")
@click.option(
    "--outputs", metavar="PLACE", multiple=True, help="Outputs that matter, by key, field or index; repeatable."
)
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Also draw the graph, coloured by group.")
@sensitivity.parameters
def groups(
    model: str,
    why: bool,
    as_json: bool,
    weights: str | None,
    ema: bool,
    input: str | None,
    classes: int | None,
    leaf: tuple[str, ...],
    unused: tuple[str, ...],
    outputs: tuple[str, ...],
    svg: Path | None,
    **flags: Any,
) -> None:
    """Show the coupled channel groups of MODEL.

    MODEL is timm:NAME, hf:NAME|DIR, torchvision:NAME, package.module:factory, path/file.py:factory or a run directory
    (`ekgfx models`). Weights don't matter here and are not fetched; with --weights it is tried whether they fit.

    With --sensitivity the network is judged with one group cut after the other, on --data (default: the run's, or
    photographs without labels), and --weights are auto. Channels are chosen on training images and judged on test
    images. --svg draws what was found.
    """
    named.check_model(model)
    named.check_input(input)
    if sensitivity.wanted(flags):
        if why:
            raise click.UsageError("--why and --sensitivity are two questions: ask one", click.get_current_context())
        typed: dict[str, Any] = {"weights": weights or "auto", "ema": ema, "input": input, "classes": classes}
        typed |= {"leaf": leaf, "unused": unused, "outputs": outputs}
        sensitivity.show(model, as_json=as_json, svg=svg, **typed, **flags)
        return
    weights = weights or "none"
    named.check_weights(weights)
    from ekgfx.models import source
    from ekgfx.runs import checkpoint
    from ekgfx.tracing.trace import silently_traced

    built = checkpoint.build(source.parse(model, weights, input, classes, ema, **preprocessing_of(flags)))
    leaf, outputs = (*built.leaf, *leaf), (*built.outputs, *outputs)
    traced = silently_traced(built.model, built.example_inputs, leaf=leaf, unused=unused, outputs=outputs or None)
    if svg is not None:
        from ekgfx.report import drawing

        drawing.write(traced, model, svg)
    if as_json:
        click.echo(json.dumps(_facts(model, traced), indent=1))
    else:
        _show(model, traced, why)


def _facts(model: str, traced: "TracedModel") -> dict[str, Any]:
    from ekgfx.surgery.tied import ties_of

    cost = traced.cost()
    return {
        "model": model,
        "macs": cost.macs,
        "params": cost.params,
        "structure": traced.groups.digest,
        "prunable_share": traced.groups.prunable_share,
        "groups": [
            {
                "name": group.name,
                "size": group.size,
                "producers": list(group.producers),
                "macs": group.macs,
                "places": [{"parameter": p.parameter, "dim": p.dim, "layout": p.layout} for p in group.places],
            }
            for group in traced.groups.values()
        ],
        "frozen": [
            {"parameter": f.parameter, "dim": f.dim, "size": f.size, "reason": f.reason} for f in traced.groups.frozen
        ],
        "ties": [{"groups": list(tie.members), "why": list(tie.why)} for tie in ties_of(traced).ties],
        "unknown_ops": {
            op: {"uses": uses, "parameters": traced.unknown_costs[op]} for op, uses in traced.unknown_ops.items()
        },
        "uncounted_ops": traced.uncounted_ops,
        "leaf": list(traced.leaves),
        "notes": list(traced.notes),
    }


def _show(model: str, traced: "TracedModel", why: bool) -> None:
    from ekgfx.cli.render import human, out, show_table, table
    from ekgfx.surgery.tied import ties_of

    cost = traced.cost()
    rows = [
        (
            group.name,
            str(group.size),
            str(len(group.producers)),
            str(len({place.parameter for place in group.places})),
            human(group.macs),
            f"{100 * group.macs / cost.macs:.1f}%" if cost.macs else "–",
        )
        for group in traced.groups.values()
    ]
    columns = ("group", "channels", "producers", "parameters cut", "MACs governed", "of all")
    show_table(table(None, columns, rows, numbers=range(1, 6)))
    out.print(
        f"\n{model}: {several(len(rows), 'group')}, {human(cost.macs)} MACs, {human(cost.params)} parameters; "
        f"{100 * traced.groups.prunable_share:.1f}% of the parameters lie in tensors that some group cuts"
    )
    for op, uses in traced.unknown_ops.items():
        more = traced.unknown_costs[op]
        out.print(
            f"{op} has no rule ({uses} {'use' if uses == 1 else 'uses'}): what touches it stays whole, which costs "
            f"{human(more)} parameters ({100 * more / cost.params:.1f}%); CONTRIBUTING.md shows how to add one"
            if op not in traced.failed_rules
            else f"{op} is not understood: {traced.failed_rules[op]}; what touches it stays whole, which costs "
            f"{human(more)} parameters ({100 * more / cost.params:.1f}%)"
        )
    for op, uses in traced.uncounted_ops.items():
        out.print(
            f"{op} counts as 0 MACs ({uses} {'use' if uses == 1 else 'uses'}): its rule does not say what it "
            "multiplies (macs=…); CONTRIBUTING.md shows how"
        )
    for tie in ties_of(traced).ties:
        out.print(f"{' and '.join(tie.members)} keep the same share of their channels: {'; '.join(tie.why)}")
    for name in traced.leaves:
        out.print(f"{name} is a leaf: it runs as it is, and what touches it stays whole")
    for note in traced.notes:
        out.print(note)
    if why:
        out.print()
        out.print(
            table(None, ("cannot be pruned because", "dimensions", "for example"), _reasons(traced), numbers=(1,))
        )
    elif traced.groups.frozen:
        out.print("--why lists what cannot be pruned, and the reasons")


def _reasons(traced: "TracedModel") -> list[tuple[str, str, str]]:
    """One row per reason, the most frequent first; the module in which an operator stands is left to the examples."""
    found: dict[str, list[str]] = {}
    for place in traced.groups.frozen:
        reason = re.sub(r" in [^\s:]+: ", ": ", place.reason)
        found.setdefault(reason, []).append(f"{place.parameter} dim {place.dim}")
    ordered = sorted(found.items(), key=lambda item: -len(item[1]))
    return [
        (reason, str(len(dims)), ", ".join(dims[:2]) + (", …" if len(dims) > 2 else "")) for reason, dims in ordered
    ]
