"""Commands and recipe fields in documents, and the check that they are valid; nothing is trained."""

from __future__ import annotations

import dataclasses
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from firth.cli import app
from firth.runs.config_io import REGISTRIES
from firth.runs.recipe import Recipe, load
from firth.runs.recipe_names import RECIPES
from firth.sweep.space import parse as parse_settings
from firth.sweep.space import validated

ROOT = Path(__file__).parents[2]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M)


def fenced(text: str) -> list[tuple[str, str, str]]:
    """Return the fenced blocks of a page: (text before, language, content).

    >>> fenced("Save it as `a.py`:\\n\\n```python\\nimport b\\n```\\n")
    [('Save it as `a.py`:\\n\\n', 'python', 'import b\\n')]
    """
    pieces = re.split(r"^ *```(\w*)\n(.*?)^ *```$", text, flags=re.M | re.S)
    return [(before, *block) for before, *block in zip(pieces[0::3], pieces[1::3], pieces[2::3], strict=False)]  # type: ignore[misc]


def command_lines(text: str) -> list[str]:
    """Return the command lines of a page's fenced blocks, without comments.

    >>> command_lines("```\\nfirth list   # all\\nOMP_NUM_THREADS=1 firth train gpt \\\\\\n  max_steps=3\\nfirst 1\\n```\\n")
    ['firth list', 'firth train gpt max_steps=3']
    """
    found = []
    for _, language, block in fenced(text):
        for line in re.sub(r" *\\\n\s*", " ", block).splitlines() if language in ("", "sh", "bash") else ():
            line = re.sub(r"\s+#.*$", "", re.sub(r"^([A-Z_]+=\S+ +)*(\S*/bin/)?", "", line.strip()))
            if re.match(r"(firth|make|torchrun|python|python3) ", line):
                found.append(line)
    return found


def inline_commands(text: str) -> list[str]:
    """Return the commands in backticks in the prose of a page.

    >>> inline_commands("`firth list`, `firth/cli.py`, `make docs`, `firth COMMAND --help`")
    ['firth list', 'make docs']
    """
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    return re.findall(r"`((?:firth|make) [a-z][^`]*)`", prose.replace("\n", " "))


def named_fields(text: str) -> list[str]:
    """Return the recipe fields in backticks: dotted names that begin with a section of a recipe.

    >>> named_fields("`batch.size=64` and `examples.max_length`, not `firth.data`, `data.jsonl` or `model.safetensors`")
    ['batch.size', 'examples.max_length']
    """
    sections = "|".join(field.name for field in dataclasses.fields(Recipe))
    names = re.findall(rf"`((?:{sections})(?:\.[a-z]\w*)+)(?=[=`])", text)
    return [name for name in names if not re.search(FILE_NAME, name)]


FILE_NAME = r"\.(jsonl?|txt|csv|yaml|py|safetensors|gguf|state_dict|ggml.*)$"
"""Dotted names that are files, attributes or GGUF's fields, and no fields of a recipe."""


def parse(words: list[str]) -> Any:
    """Return the context of a command, as the command line parses it.

    Raises:
        click.UsageError: There is no such command or option, an argument is missing, or a value is out of range.
    """
    command, name, words = typer.main.get_command(app), "firth", words[1:]
    while commands := getattr(command, "commands", None):
        name, *words = words
        assert name in commands, f"there is no command {name!r}"
        command = commands[name]
    return command.make_context(name, words, resilient_parsing=not words or "--help" in words)


def check_command(line: str) -> Recipe | None:
    """Check a command line without running it, and return the recipe of `firth train NAME`.

    Raises:
        Exception: The program, command, option, recipe or recipe field does not exist.
    """
    words = shlex.split(line)
    if words[0] == "make":
        assert set(words[1:]) <= {*TARGETS, *(w for w in words if "=" in w)}, f"no target of the Makefile: {line}"
    if words[0] in ("python", "python3", "torchrun"):
        if "firth" in words and words[words.index("firth") - 1] == "-m":
            words = words[words.index("firth") :]
        elif "-m" in words and words[words.index("-m") + 1].startswith("bench"):
            module = ROOT.joinpath(*words[words.index("-m") + 1].split("."))
            assert module.with_suffix(".py").exists() or (module / "__init__.py").exists(), f"no such module: {line}"
        elif words[1].startswith(("docs/", "examples/")):
            assert (ROOT / words[1]).exists(), f"no such file: {line}"
    if words[0] != "firth":
        return None
    context = parse(words)
    if len(words) == 2 or "--help" in words:
        return None
    if words[1] == "compare":
        settings = [one for one in context.params["recipes"] if "=" in one]
        names = [one for one in context.params["recipes"] if "=" not in one]
        for name in names:
            load(name, [one for one in settings if not one.startswith(("probe.", *(f"{n}." for n in names)))])
    if words[1] == "sweep" and context.params["settings"]:
        fixed, parameters = parse_settings(context.params["settings"])
        validated(context.params["recipe"], fixed, parameters)
    if words[1] == "train" and "recipe" in context.params and context.params["recipe"].partition(":")[0] in RECIPES:
        return load(context.params["recipe"], context.params["settings"] or [])
    if words[1] == "train" and "recipe" in context.params:  # a file or a run directory, which the page made
        assert re.search(r"[/.]|^[A-Z_:]+$", context.params["recipe"]), (
            f"there is no recipe {context.params['recipe']!r}"
        )
    return None


def recipe_fields(kind: Any = Recipe, depth: int = 3) -> Iterator[str]:
    """Yield the dotted names of all fields that a recipe may have, of every kind of objective, examples and peft."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        yield field.name
        for hint in (hints[field.name], *typing.get_args(hints[field.name])):
            registry = REGISTRIES.get(hint)
            classes = [registry.find(name) for name in registry.names()] if registry else [hint]
            if registry:
                yield f"{field.name}.kind"
            for one in classes:
                if dataclasses.is_dataclass(one) and depth:
                    yield from (f"{field.name}.{name}" for name in recipe_fields(one, depth - 1))
