"""Write the reference pages of the manual from the code: commands, recipes, recipe fields, objectives, Python API.

    python docs/write_reference.py            # writes docs/reference/*.md; `make docs` runs it first

A test fails if the pages in the repository are not those that this program writes.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer.main

import firth
from firth import objectives
from firth.cli import app
from firth.model.config import ModelConfig
from firth.pipelines.pipeline import KINDS, TrainRecipe
from firth.runs import recipe_names
from firth.runs.examples import EXAMPLES
from firth.runs.peft_options import PEFT_METHODS
from firth.runs.recipe import Recipe
from firth.runs.recipe_fields import default, described, kind_of, summary
from firth.runs.recipe_names import RECIPES
from firth.types import UserError

PAGES = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/write_reference.py: change the code, not this page. -->\n\n"


def cell(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as a cell of a table."""
    text = default(field)
    return text if text in ("", "required") else f"`{text}`"


def table(kind: type, fields: Iterable[dataclasses.Field[Any]] | None = None) -> list[str]:
    """Return a Markdown table of a dataclass's fields; nothing if it has none."""
    chosen = [f for f in (dataclasses.fields(kind) if fields is None else fields) if f.init]
    hints, about = typing.get_type_hints(kind, include_extras=True), described(kind)
    if not chosen:
        return []
    rows = [
        f"| `{f.name}` | {kind_of(hints[f.name])} | {cell(f)} | {about.get(f.name, '')} |".replace("||", "|")
        for f in chosen
    ]
    return ["| field | type | default | |", "|---|---|---|---|", *rows, ""]


def commands() -> str:
    """Return the page of the command line."""
    lines = ["# Command line", "", "`firth COMMAND --help` prints the same.", ""]

    def write(name: str, command: Any) -> None:
        if getattr(command, "commands", None):
            for inner, one in command.commands.items():
                write(f"{name} {inner}", one)
            return
        lines.extend([f"## {name}", "", inspect.cleandoc(command.help or ""), "", f"    {usage(name, command)}", ""])
        rows = []
        for param in command.params:
            if param.name == "help":
                continue
            names = (
                param.name.upper()
                if param.param_type_name == "argument"
                else ", ".join([*param.opts, *param.secondary_opts])
            )
            value = "" if param.default in (None, "") or callable(param.default) else f"`{param.default}`"
            rows.append(f"| `{names}` | {' '.join((param.help or '').split())} | {value} |")
        lines.extend(["| | | default |", "|---|---|---|", *rows, ""] if rows else [])

    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        write(f"firth {name}", command)
    return "\n".join(lines)


def usage(name: str, command: Any) -> str:
    """Return a command's synopsis."""
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    written = [p.name.upper() + ("..." if p.nargs == -1 else "") for p in arguments]
    return " ".join(
        [name, *(w if p.required else f"[{w}]" for w, p in zip(written, arguments, strict=True)), "[OPTIONS]"]
    )


def section(name: str, kind: type) -> list[str]:
    """Return the section of a dataclass and, one level below, those of the dataclasses in it (`model.norm`)."""
    hints = typing.get_type_hints(kind, include_extras=True)
    groups = [f for f in dataclasses.fields(kind) if dataclasses.is_dataclass(hints[f.name])]
    own = [f for f in dataclasses.fields(kind) if f not in groups]
    short = f" `{name}=VALUE` sets `{name}.type`." if "type" in hints else ""
    lines = [f"{'###' if '.' in name else '##'} {name}", "", summary(kind) + short, "", *table(kind, own)]
    return lines + [line for f in groups for line in section(f"{name}.{f.name}", hints[f.name])]


def recipe_fields() -> str:
    """Return the page of everything that a recipe may contain."""
    lines = [
        "# Recipe fields", "",
        "A recipe is a tree. `batch.size=64` on the command line and `batch: {size: 64}` in YAML set the same field.",
        "`max_steps`, `max_seconds` and `max_flops` are short for `budget.max_steps` and so on.", "",
    ]  # fmt: skip
    hints = typing.get_type_hints(Recipe, include_extras=True)
    nested = {f.name: hints[f.name] for f in dataclasses.fields(Recipe) if dataclasses.is_dataclass(hints[f.name])}
    plain = [f for f in dataclasses.fields(Recipe) if f.name not in (*nested, "model", "objective", "examples", "peft")]
    lines += ["## Top level", "", *table(Recipe, plain)]
    for name, kind in {"model": ModelConfig, **nested}.items():
        lines += section(name, kind)
    for title, kinds in (("examples", EXAMPLES), ("peft", PEFT_METHODS)):
        lines += [f"## {title}", "", f"`{title}=KIND`, or `{title}.kind=KIND` with its fields.", ""]
        for name, kind in kinds.items():
            lines += [f"### {title}={name}", "", summary(kind), "", *table(kind)]
    lines += ["## objective", "", "See [Objectives](objectives.md).", ""]
    return "\n".join(lines)


def every_objective() -> str:
    """Return the page of the objectives."""
    lines = [
        "# Objectives", "",
        "`objective=NAME`, or `objective.kind=NAME` with its fields. A list adds objectives: `objective=[nsp, mlm]`.", "",
    ]  # fmt: skip
    for name in objectives.OBJECTIVES:
        kind = objectives.find(name)
        lines += [f"## {name}", "", summary(kind), "", f"`{kind.__module__}.{kind.__name__}`", "", *table(kind)]
    return "\n".join(lines)


def recipes() -> str:
    """Return the page of the published recipes."""
    lines = [
        "# Recipes",
        "",
        "`firth train NAME` takes the tiny size, `firth train NAME:SIZE` another.",
        "",
        "| name | | sizes |",
        "|---|---|---|",
    ]
    for name in RECIPES:
        lines.append(f"| `{name}` | {recipe_names.summary(name)} | {sizes(name)} |")
    return "\n".join([*lines, ""])


def sizes(name: str) -> str:
    """Return the sizes of a recipe, as its error lists them; empty if it comes in one size."""
    module, function = RECIPES[name].split(":")
    make = getattr(importlib.import_module(module), function)
    if "size" not in inspect.signature(make).parameters:
        return ""
    try:
        make("?")
    except UserError as error:
        return str(error).rpartition("there is ")[2]
    raise AssertionError(f"{name} accepts any size")


def python_api() -> str:
    """Return the page of the names that `import firth` offers."""
    from firth import api

    def entry(level: str, name: str, thing: Any) -> str:
        signature = str(inspect.signature(thing)).replace("'", "").replace("<built-in function print>", "print")
        return f"{level} {name}\n\n```python\n{name}{signature}\n```\n\n```text\n{inspect.getdoc(thing)}\n```\n"

    head = inspect.cleandoc(api.__doc__ or "").partition("\n\n")
    parts = [
        "# Python API\n",
        re.sub(r"((?:^    .*\n|^\n(?=    ))+)", r"```python\n\1```\n", head[2] + "\n", flags=re.M),
    ]
    parts[1] = re.sub(r"^    ", "", parts[1], flags=re.M)
    parts += [entry("##", name, getattr(api, name)) for name in ("load_recipe", "train", "load_model")]
    parts.append(f"## Model\n\n```text\n{inspect.getdoc(api.Model)}\n```\n")
    parts += [
        entry("###", name, thing)
        for name, thing in vars(api.Model).items()
        if inspect.isfunction(thing) and name[0] != "_"
    ]
    others = sorted(set(firth.__all__) - {"load_recipe", "train", "load_model", "Model"})
    parts.append("## Other names\n")
    parts += [f"- `firth.{name}`: {summary(getattr(firth, name))}" for name in others]
    return "\n".join(parts)


def pipelines() -> str:
    """Return the page of the kinds of stages."""
    lines = [
        "# Stages of pipelines", "",
        "`KIND: VALUE` sets the field named in brackets; see [Run several stages](../how-to/run-a-pipeline.md).", "",
    ]  # fmt: skip
    for name, kind in KINDS.items():
        output = f" Writes `{kind.output}`." if kind.output else ""
        lines += [f"## {name} ({kind.main})", "", summary(kind) + output, ""]
        lines += ["Its other fields are those of the recipe.", ""] if kind is TrainRecipe else table(kind)
    return "\n".join(lines)


def serving() -> str:
    """Return the page of the routes and the limits of the server."""
    from pydantic.json_schema import models_json_schema

    from firth.serve.app import OPERATIONS
    from firth.serve.config import ServeLimits

    lines = [
        "# Routes of the server", "",
        "`firth serve` describes itself at `/openapi.json`; see [Serve a model](../how-to/serve-a-model.md). Fields in "
        "bold are required.", "",
        "`GET /health` needs no key. `GET /v1/models` and `GET /v1/models/NAME` list the models with their context (`max_model_len`) and "
        "`capabilities`.", "",
    ]  # fmt: skip
    kinds = {one.request for one in OPERATIONS}
    _, schemas = models_json_schema([(kind, "validation") for kind in sorted(kinds, key=str)])
    for one in OPERATIONS:
        schema = schemas["$defs"][one.request.__name__]
        lines += [f"## POST {one.path}", "", f"{one.summary}.", "", "| field | default | |", "|---|---|---|"]
        for name, field in schema["properties"].items():
            shown = f"**`{name}`**" if name in schema.get("required", ()) else f"`{name}`"
            value = f"`{json.dumps(field['default'])}`" if field.get("default") is not None else ""
            lines.append(f"| {shown} | {value} | {field.get('description', '')} |")
        lines.append("")
    return "\n".join([*lines, "## Limits", "", "`--limit NAME=VALUE` changes one.", "", *table(ServeLimits)])


WRITERS = {
    "serving.md": serving,
    "cli.md": commands,
    "recipe.md": recipe_fields,
    "objectives.md": every_objective,
    "recipes.md": recipes,
    "python.md": python_api,
    "pipelines.md": pipelines,
}
"""File in docs/reference -> the function that returns its text."""


def main() -> None:
    """Write all pages."""
    for name, make in WRITERS.items():
        (PAGES / name).write_text(NOTE + make().rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
