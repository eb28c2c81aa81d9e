"""`ekgfx landscape`: extreme curvatures of the loss around a network's weights, and a picture of it."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ekgfx.base import named
from ekgfx.cli.subject import Subject, look, parameters

FORMATS = ("png", "svg", "pdf")


def _picture(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix.removeprefix(".") not in FORMATS:
        raise click.BadParameter(f"{str(value)!r}: a picture's name ends in {', '.join('.' + end for end in FORMATS)}")
    return value


POSITIVE = click.FloatRange(0, min_open=True)


@click.command()
@parameters
@click.option("--loss", metavar="FILE.py:FUNCTION", help="loss(output, labels), mean over a batch  [default: CE]")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True)
@click.option("--images", type=click.IntRange(1), default=256, show_default=True, help="Images, drawn from the split.")
@click.option("--batch-size", type=click.IntRange(1), default=128, show_default=True)
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="Eigenvalues at either end.")
@click.option(
    "--products",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Most Hessian-vector products; each keeps a vector as large as the weights.",
)
@click.option("--tolerance", type=POSITIVE, default=1e-3, show_default=True, help="Error, as part of the largest.")
@click.option("--points", type=click.IntRange(2), default=21, show_default=True, help="Points of the surface per side.")
@click.option("--span", type=POSITIVE, default=1.0, show_default=True, help="Largest offset; 1: that of the filters.")
@click.option("--no-surface", is_flag=True, help="Eigenvalues only.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    callback=_picture,
    metavar="FILE.png|svg|pdf",
    help="The picture; numbers go beside it, as .json  [default: landscape.png in the run, or here]",
)
@click.option("--json", "as_json", is_flag=True, help="The numbers on stdout as well.")
def landscape(
    model: str,
    data: str | None,
    weights: str,
    ema: bool,
    input: str | None,
    classes: int | None,
    logits: str | None,
    device: str,
    loss: str | None,
    output: Path | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Condition number of the Hessian, its leading eigenvalues, and the loss surface of MODEL (or a run).

    The Hessian is that of the mean loss over the images in all weights, in evaluation mode; its extreme eigenvalues
    come from the Lanczos iteration, with error bounds. The surface lies along two random filter-normalized directions.
    """
    named.check_model(model)
    named.check_weights(weights)
    named.check_data(data)
    from ekgfx.cli.render import out
    from ekgfx.errors import DataError
    from ekgfx.models import factories
    from ekgfx.search.own import check_takes

    judge = None if loss is None else factories.find_function(loss)
    if judge is not None:
        check_takes(judge, "--loss", "output", "labels")
    typed: dict[str, Any] = {
        "data": data,
        "weights": weights,
        "ema": ema,
        "input": input,
        "classes": classes,
        "logits": logits,
        "device": device,
    }
    shape = {name: asked.pop(name) for name in list(asked) if name.startswith(("preprocessing__", "model_kwargs"))}
    subject = look(model, **typed, **shape)
    if subject.data.classes is None and judge is None:
        raise DataError(f"{subject.spec} has no labels, and the loss needs them; give data with labels, or --loss")
    settings = {"model": model, "data": subject.spec, "loss": loss or "cross-entropy", "device": device, **asked}
    found = {**settings, **_measure(subject, judge, asked)}
    written = _write(found, output, subject.run)
    if as_json:
        click.echo(json.dumps(found))
        return
    out.print(_text(found))
    out.print("wrote " + " and ".join(map(str, written)), soft_wrap=True)


def _measure(subject: Subject, judge: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the report, JSON values."""
    import torch

    from ekgfx import landscape as measures
    from ekgfx.training.loss import cross_entropy, label_loss

    network, images = subject.built.model, subject.data
    draw = torch.Generator().manual_seed(asked["seed"])
    order = torch.randperm(images.size(asked["split"]), generator=draw)[: asked["images"]]
    batches = [batch[:2] for batch in images.loader(asked["split"], asked["batch_size"], subset=order)]
    options = {"seed": asked["seed"], "loss": label_loss(cross_entropy, subject.logits) if judge is None else judge}
    with _progress("Hessian-vector products", asked["products"]) as advance:
        curved = measures.spectrum(
            network,
            batches,
            count=asked["count"],
            steps=asked["products"],
            tolerance=asked["tolerance"],
            on_product=advance,
            **options,
        )
    found: dict[str, Any] = {
        "samples": len(order),
        "condition": curved.condition if math.isfinite(curved.condition) else None,
        "condition_error": curved.condition_error if math.isfinite(curved.condition) else None,
        "largest": curved.largest,
        "largest_errors": curved.largest_errors,
        "smallest": curved.smallest,
        "smallest_errors": curved.smallest_errors,
        "products_used": curved.steps,
        "converged": curved.converged,
    }
    if not asked["no_surface"]:
        with _progress("loss surface", asked["points"]) as advance:
            drawn = measures.surface(
                network, batches, points=asked["points"], span=asked["span"], on_row=advance, **options
            )
        rows = [[loss if math.isfinite(loss) else None for loss in row] for row in drawn.losses]
        found["surface"] = {"offsets": drawn.offsets, "losses": rows}
    return found


def _write(found: dict[str, Any], output: Path | None, run: Path | None) -> list[Path]:
    """The picture and the numbers, each wholly or not at all; the files that were written."""
    from ekgfx.base.files import replacing, write_json
    from ekgfx.landscape import Surface, plot

    picture = output or (run or Path()) / "landscape.png"
    numbers = picture.with_suffix(".json")
    write_json(numbers, found)
    if "surface" not in found:
        return [numbers]
    losses = tuple(tuple(math.nan if loss is None else loss for loss in row) for row in found["surface"]["losses"])
    with replacing(picture) as partial:
        title = f"{Path(found['model']).name}, {found['samples']} images"
        plot(Surface(found["surface"]["offsets"], losses), partial, title, format=picture.suffix[1:])
    return [picture, numbers]


def _text(found: dict[str, Any]) -> str:
    def listed(values: Any, errors: Any) -> str:
        return ", ".join(f"{value:.4g} ± {error:.1g}" for value, error in zip(values, errors, strict=True))

    condition = "infinite" if found["condition"] is None else listed([found["condition"]], [found["condition_error"]])
    lines = [
        f"condition number |λ_min / λ_max|  {condition}",
        f"largest eigenvalues   {listed(found['largest'], found['largest_errors'])}",
        f"smallest eigenvalues  {listed(found['smallest'], found['smallest_errors'])}",
        f"{found['samples']} images, {found['products_used']} Hessian-vector products"
        + ("" if found["converged"] else "; not converged: more --products, or a larger --tolerance"),
    ]
    return "\n".join(lines)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Any]:
    """A bar where there is a terminal; yields what to call with the number done."""
    from rich.progress import Progress

    from ekgfx.cli.render import notes

    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.update(task, completed=done)
