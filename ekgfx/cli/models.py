"""`ekgfx models`: what a MODEL may be."""

from fnmatch import fnmatchcase

import click

from ekgfx.base import named
from ekgfx.errors import ModelError

FORMS = (
    ("package.module:factory", "what the function (or class) returns"),
    ("path/file.py:factory", "the same from a file"),
    ("RUN", "the pruned model of a run, to prune it further"),
)


@click.command()
@click.argument("pattern", required=False)
def models(pattern: str | None) -> None:
    """List what a MODEL may be, or the models whose names match PATTERN, such as `timm:resnet*` or `hf:*`."""
    if pattern is None:
        rows = [(f"{library}:NAME", _told(library)) for library in ("timm", *named.LIBRARIES, *named.plugins())]
        width = max(len(form) for form, _ in (*rows, *FORMS))
        for form, told in (*rows, *FORMS):
            click.echo(f"{form:{width}}  {told}")
        return
    from ekgfx.models import libraries

    library, colon, glob = pattern.partition(":")
    if not colon or library not in ("timm", *named.LIBRARIES, *named.plugins()):
        raise ModelError(f"'{pattern}' names no library: use one of {', '.join(_known())}, such as 'timm:resnet*'")
    if library != "timm":
        named.check_model(f"{library}:{glob}")
    found = [name for name in libraries.names(library) or () if fnmatchcase(name, glob)]
    if not found:
        raise ModelError(f"no model matches '{pattern}'; `ekgfx models '{library}:*'` lists those of {library}")
    for name in found:
        click.echo(f"{library}:{name}")


def _known() -> list[str]:
    return [f"{library}:" for library in ("timm", *named.LIBRARIES, *named.plugins())]


def _told(library: str) -> str:
    if library == "timm":
        return f"{len(named.timm_names())} architectures; `ekgfx models 'timm:*'` lists them"
    if library in named.plugins():
        entry = named.plugins()[library]
        return f"of {entry.value}" + (f", from {entry.dist.name} {entry.dist.version}" if entry.dist else "")
    package, help = named.LIBRARIES[library]
    what = {
        "hf": "a folder or repository with config.json, or an architecture of transformers",
        "torchvision": "a model of torchvision",
    }[library]
    return what if named.installed(package) else f"{what}; not installed: {help}"
