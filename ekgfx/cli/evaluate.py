"""`ekgfx eval`: what a network is worth on data, and what it costs."""

import json
from dataclasses import asdict
from typing import Any

import click

from ekgfx.cli.subject import look, parameters


@click.command("eval")
@parameters
@click.option("--batch-size", type=int, default=128, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def evaluate(model: str, batch_size: int, as_json: bool, **asked: Any) -> None:
    """Accuracy and loss of MODEL (or a run) on the test split, its MACs and parameters."""
    subject = look(model, **asked)
    from ekgfx.cli.render import human, percent, show_table, table
    from ekgfx.tracing.trace import silently_traced
    from ekgfx.training.evaluation import evaluate as measure

    built = subject.built
    metrics = measure(built.model, subject.data.loader("test", batch_size).mixed(), logits=subject.logits)
    outputs = built.outputs or None
    cost = silently_traced(built.model, built.example_inputs, leaf=built.leaf, outputs=outputs).cost()
    if as_json:
        click.echo(json.dumps({"model": model, "data": subject.spec, **asdict(metrics), **asdict(cost)}))
        return
    row = (percent(metrics.accuracy), f"{metrics.loss:.4f}", str(metrics.samples), human(cost.macs), human(cost.params))
    show_table(table(None, ("accuracy", "loss", "images", "MACs", "parameters"), [row], numbers=range(5)))
