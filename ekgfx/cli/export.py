"""`ekgfx export`: a run's network as ONNX, checked and timed."""

import shutil
from pathlib import Path

import click

from ekgfx.base.files import replacing
from ekgfx.cli.options import at_budget
from ekgfx.runs import directory
from ekgfx.runs.directory import MANIFEST, Run, newest, read_manifest


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"{value!r}: use whole numbers with commas, such as 1,64")
    return numbers


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option(
    "--onnx",
    "file",
    is_flag=False,
    flag_value="",
    metavar="[FILE]",
    help="Copy the ONNX file to FILE; model.onnx in RUN is written in any case.",
)
@click.option("--fp16", is_flag=True, help="Half-precision weights and arithmetic.")
@click.option(
    "--int8",
    is_flag=True,
    help="Also in INT8, calibrated on the run's images without labels; both networks are timed on the CPU in fp32, "
    "INT8 and, where it is faster, fp16. --onnx copies the INT8 file.",
)
@click.option("--batch", "batches", default="1,64", show_default=True, callback=_numbers, help="Batch sizes to time.")
@click.option(
    "--provider",
    "providers",
    multiple=True,
    type=click.Choice(["cpu", "cuda", "cuda-graph", "tensorrt", "torch", "torch-compile"]),
    help="Where to time; repeatable  [default: all of onnxruntime's that are present]; torch and torch-compile time "
    "PyTorch itself, on the CPU.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads to time on  [default: all; with --int8 one]")
@at_budget
@click.option("--no-latency", is_flag=True, help="Export and check only.")
@click.option("--opset", type=int, help="ONNX operator set  [default: the exporter's]")
def export(
    run: Path | None,
    file: str | None,
    fp16: bool,
    int8: bool,
    batches: tuple[int, ...],
    providers: tuple[str, ...],
    threads: int | None,
    no_latency: bool,
    opset: int | None,
    **budget: float | str | None,
) -> None:
    """Write the network of RUN (the newest one by default) as ONNX, check it against PyTorch and time it."""
    if int8 and (fp16 or set(providers) - {"cpu"}):
        raise click.UsageError("--int8 is timed on the CPU, and in fp16 as well: leave out --fp16 and --provider")
    if run is None and file and (Path(file) / MANIFEST).is_file():
        run, file = Path(file), None  # --onnx takes a file, and RUN stood behind it
    if file and Path(file).suffix != ".onnx":
        raise click.BadParameter(
            f"{file!r}: a file's name ends in .onnx, and a run has a {MANIFEST}", param_hint="--onnx"
        )
    if file and not Path(file).absolute().parent.is_dir():
        raise click.BadParameter(f"{file!r}: no such folder as {Path(file).parent}", param_hint="--onnx")
    if run is None:
        run = newest()
        click.echo(f"run {run}, the newest one", err=True)
    read_manifest(run)
    run = directory.at_budget(run, budget)
    from ekgfx.cli.progress import Terminal
    from ekgfx.cli.render import out, show_table
    from ekgfx.export import latency_table, parity_text, precisions_table
    from ekgfx.pipeline.delivery import export_run
    from ekgfx.runs.checkpoint import load_run
    from ekgfx.settings.recipe import Export

    with Run.reopen(run) as opened, Terminal() as terminal:
        asked = Export(True, fp16, batches, providers, opset, not no_latency, int8, threads or 0)
        made = export_run(opened, load_run(opened.path), asked, terminal)
        written = opened.path / made.files["pruned int8" if int8 else "pruned"]
        if file:
            with replacing(Path(file)) as partial:
                shutil.copyfile(written, partial)
            written = Path(file)
    if made.precisions is not None:
        show_table(precisions_table(made.precisions, made.latency))
    elif made.latency is not None:
        show_table(latency_table(made.latency))
    out.print(f"wrote {written}; {parity_text(made.parity['pruned'])}", soft_wrap=True)
