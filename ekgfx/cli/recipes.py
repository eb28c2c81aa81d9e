"""`ekgfx recipes`: what is there, and what a recipe says once every default is filled in."""

import click
import yaml

from ekgfx.settings import recipe


@click.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes, or show one (a name or a .yaml file) with every setting it leaves at its default."""
    if name is None:
        for known in recipe.names():
            asked = recipe.load(known)
            click.echo(f"{known}\n    {asked.description}\n    result: {asked.measured or 'nothing said'}")
    else:
        settings = recipe.load(name).to_json()
        click.echo(yaml.safe_dump(_lists(settings), sort_keys=False, allow_unicode=True), nl=False)


def _lists(value: object) -> object:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
