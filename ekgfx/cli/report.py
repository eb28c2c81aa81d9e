"""`ekgfx report`: a run as one page."""

from pathlib import Path

import click


@click.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="Where to  [default: RUN/report.html]"
)
def report(run: Path | None, output: Path | None) -> None:
    """Write RUN (the newest one by default) as one self-contained HTML page: search, widths, accuracy, latency.

    The page needs no network and runs no scripts. A run that is still going can be looked at too.
    """
    from ekgfx.runs.directory import newest, read_manifest

    run = newest() if run is None else run
    read_manifest(run)
    from ekgfx.report import write

    click.echo(write(run, output))
