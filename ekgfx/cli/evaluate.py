"""`ekgfx eval`: what a network is worth on data, and what it costs."""

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command("eval")
@click.argument("model")
@click.option("--data", metavar="SPEC", help="Data with labels  [default: the run's]")
@click.option("--weights", metavar="auto|none|FILE", default="auto", help="Weights of MODEL, where it is no run.")
@click.option("--input", metavar="SHAPE", help="Shape of the example input, such as 1x3x32x32.")
@click.option("--classes", type=int, help="Number of classes to build the model with.")
@click.option("--batch-size", type=int, default=128, show_default=True)
@click.option("--device", metavar="auto|cpu|cuda[:N]", default="auto", help="Where to compute.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def evaluate(
    model: str,
    data: str | None,
    weights: str,
    input: str | None,
    classes: int | None,
    batch_size: int,
    device: str,
    as_json: bool,
) -> None:
    """Accuracy and loss of MODEL (or a run) on the test split, its MACs and parameters."""
    import ekgfx
    from ekgfx import job, source
    from ekgfx.cli.render import human, out, percent, table
    from ekgfx.errors import DataError
    from ekgfx.evaluation import evaluate as measure
    from ekgfx.run import read_manifest

    asked = source.parse(model, weights, input, classes)
    place = job.pick_device(device)
    built = asked.build()
    settings = read_manifest(Path(model)).get("settings", {}) if asked.is_run else {}
    spec = data or settings.get("data")
    if spec is None:
        raise DataError("nothing to evaluate on: give --data with labels, such as --data folder:DIR")
    images = job.open_data(spec, built, settings.get("seed", 0)).to(place)
    metrics = measure(built.model.to(place), images.loader("test", batch_size))
    inputs = tuple(value.to(place) for value in built.example_inputs)
    cost = ekgfx.trace(built.model, inputs, leaf=built.leaf).cost()
    if as_json:
        click.echo(json.dumps({"model": model, "data": spec, **asdict(metrics), **asdict(cost)}))
        return
    row = (percent(metrics.accuracy), f"{metrics.loss:.4f}", str(metrics.samples), human(cost.macs), human(cost.params))
    out.print(table(None, ("accuracy", "loss", "images", "MACs", "parameters"), [row], numbers=range(5)))
