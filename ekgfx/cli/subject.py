"""What `ekgfx eval` and `ekgfx landscape` look at: a network and its data, as typed or as the run says."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ekgfx.base import named
from ekgfx.cli.options import images, preprocessing_of

if TYPE_CHECKING:
    from ekgfx.data import Data
    from ekgfx.models.source import Built

log = logging.getLogger("ekgfx")
_PARAMETERS = (
    click.argument("model"),
    click.option("--data", metavar="SPEC", help="Data with labels  [default: the run's]"),
    click.option("--weights", metavar="auto|none|FILE", default="auto", help="Weights of MODEL, where it is no run."),
    click.option("--ema", is_flag=True, help="Of a file with several state dicts, take the moving average."),
    click.option("--input", metavar="SHAPE", help="Shape of the example input, such as 1x3x32x32."),
    click.option("--classes", type=int, help="Number of classes to build the model with."),
    click.option(
        "--logits", metavar="PLACE", help="Where the logits are in the model's output, where it is not clear."
    ),
    click.option("--device", metavar="auto|cpu|cuda[:N]", default="auto", help="Where to compute."),
)


@dataclass(frozen=True)
class Subject:
    """A model and its data, both on the device; spec: how the data were named; run: where the model is one; logits:
    finds them in the model's output."""

    built: "Built"
    data: "Data"
    spec: str
    run: Path | None
    logits: Callable[[Any], Any]


def parameters(command: Callable[..., Any]) -> Callable[..., Any]:
    """MODEL and the options that `look` takes."""
    command = images(command)
    for parameter in reversed(_PARAMETERS):
        command = parameter(command)
    return command


def look(
    model: str,
    *,
    data: str | None,
    weights: str,
    ema: bool,
    input: str | None,
    classes: int | None,
    logits: str | None,
    device: str,
    otherwise: str | None = None,
    **flags: Any,
) -> Subject:
    """Builds the model, or loads the run, and opens the data; `otherwise` is taken where neither names any. DataError
    where that is None; what the run and the sources of models and data refuse."""
    named.check_model(model)
    kwargs = flags["model_kwargs"]
    named.check_of_run(model, weights=weights, input=input, classes=classes, ema=ema, model_kwargs=kwargs)
    named.check_weights(weights)
    named.check_data(data)
    named.check_input(input)
    from dataclasses import replace

    from ekgfx.errors import DataError
    from ekgfx.models import source
    from ekgfx.pipeline import job
    from ekgfx.runs import checkpoint
    from ekgfx.runs.directory import read_manifest
    from ekgfx.training.outputs import finder, logits_of

    asked = source.parse(model, weights, input, classes, ema, **preprocessing_of(flags))
    place = job.pick_device(device)
    built = checkpoint.build(asked)
    run = Path(model) if asked.is_run else None
    settings = {} if run is None else read_manifest(run).get("settings", {})
    spec = data or settings.get("data") or otherwise
    if spec is None:
        raise DataError(f"nothing to judge {model} on: give --data with labels, such as --data folder:DIR")
    place_of_logits = logits or settings.get("logits")
    find = logits_of if place_of_logits is None else finder(place_of_logits)
    opened = job.open_data(spec, built, settings.get("seed", 0), find).to(place)
    log.info("%s", job.preprocessing_of(opened, built))
    inputs = tuple(value.to(place) for value in built.example_inputs)
    return Subject(replace(built, model=built.model.to(place), example_inputs=inputs), opened, spec, run, find)
