"""The command line: parses, calls the library, renders. One file per command; torch is imported when a command runs."""

import io
import logging
import re
import sys
from difflib import get_close_matches

import click

from ekgfx import __version__
from ekgfx.base.memory import keep_freed_memory
from ekgfx.cli.evaluate import evaluate
from ekgfx.cli.export import export
from ekgfx.cli.finetune import finetune
from ekgfx.cli.groups import groups
from ekgfx.cli.landscape import landscape
from ekgfx.cli.models import models
from ekgfx.cli.prune import prune
from ekgfx.cli.recipes import recipes
from ekgfx.cli.repair import repair
from ekgfx.cli.report import report
from ekgfx.cli.runs import compare, list_runs
from ekgfx.errors import EkgfxError

LONGEST = 1000
"""Most characters of an error."""
_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class _Notes(logging.Handler):
    """Shows the library's warnings and notes as they are, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING:
            click.echo(f"note: {record.getMessage()}", err=True)
        else:
            click.secho(f"{record.levelname.lower()}: {record.getMessage()}", err=True, fg="yellow")


_NOTES = _Notes()


class _Group(click.Group):
    """Lists its commands with the whole first sentence of each, and says which was probably meant."""

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = arguments[0]
        if name not in self.commands and not name.startswith("-"):
            close = get_close_matches(name, self.commands, n=1)
            hint = f"did you mean {close[0]}?" if close else f"use {', '.join(sorted(self.commands))}"
            raise click.UsageError(f"no command {name[:80]!r}: {hint}", context)
        return super().resolve_command(context, arguments)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.commands[name].get_short_help_str(200)) for name in sorted(self.commands)])


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    invoke_without_command=True,
)
@click.version_option(__version__)
@click.pass_context
def cli(context: click.Context) -> None:
    """Prune any PyTorch model to a budget, keep its accuracy, prove the speed-up.

    Start with: ekgfx prune --recipe quickstart
    """
    log = logging.getLogger("ekgfx")
    log.addHandler(_NOTES)
    log.setLevel(logging.INFO)
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


LISTS = recipes, models, list_runs, compare
for command in (groups, prune, repair, finetune, evaluate, export, landscape, report, *LISTS):
    cli.add_command(command)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 2 bad input or an error with advice, 1 what nobody foresaw (each one
    line on stderr), 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show an arrow shows a question mark
    keep_freed_memory()
    try:
        cli.main(arguments, prog_name="ekgfx", standalone_mode=False)
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "ekgfx"
        _fail(f"{error.format_message().rstrip('.')} (see {command} --help)")
    except click.ClickException as error:
        _fail(error.format_message())
    except EkgfxError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"cannot use {error.filename}: {error.strerror or error}" if error.filename else str(error))
    except (KeyboardInterrupt, click.Abort) as error:
        told = error.__cause__ if isinstance(error.__cause__, KeyboardInterrupt) else error  # click makes it an Abort
        print("; ".join(["ekgfx: stopped", *map(str, told.args)]), file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # noqa: BLE001  of a user's network, a library, or a fault of ours
        from ekgfx.cli.unforeseen import unforeseen

        _fail(unforeseen(error), 1)


def _fail(message: str, code: int = 2) -> None:
    plain = " ".join(_COLOURS.sub("", message).split())  # a library's message may be coloured, a name endless
    print(f"ekgfx: {plain if len(plain) <= LONGEST else f'{plain[:700]} … {plain[-250:]}'}", file=sys.stderr)
    sys.exit(code)
