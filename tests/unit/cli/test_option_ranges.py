"""Numbers on the command line have ranges: every option that holds one refuses what is outside, in one sentence."""

from __future__ import annotations

import typing

import pytest
import typer
from typer.testing import CliRunner

from firth.cli import app, tokenizer_app
from firth.types import UserError


def number_options() -> list[tuple[tuple[str, ...], str, str]]:
    """(command, option, type) of every parameter of a command that holds a number."""
    found = []
    for group, path in ((app, ()), (tokenizer_app, ("tokenizer",))):
        for command in group.registered_commands:
            assert command.callback is not None
            name = command.name or command.callback.__name__.removeprefix(f"{path[0]}_" if path else "")
            for parameter, hint in typing.get_type_hints(command.callback, include_extras=True).items():
                if typing.get_origin(hint) is not typing.Annotated or not {int, float} & {
                    hint.__origin__,
                    *typing.get_args(hint.__origin__),
                }:
                    continue
                [option] = hint.__metadata__
                assert isinstance(option, typer.models.OptionInfo), f"{name}: a number is an option, never an argument"
                named = isinstance(
                    option.default, str
                )  # typer.Option("--max-new-tokens", "-n") takes its first name so
                written = option.default if named else f"--{parameter.replace('_', '-')}"
                found.append(((*path, name), written, "float" if "float" in str(hint.__origin__) else "int"))
    return found


OPTIONS = number_options()


def test_numbers_are_found() -> None:
    assert (("evaluate",), "--limit", "int") in OPTIONS
    assert len(OPTIONS) >= 25


@pytest.mark.parametrize(
    ("path", "option", "kind"), OPTIONS, ids=lambda one: "-".join(one) if type(one) is tuple else one
)
def test_a_number_out_of_range_is_refused(path: tuple[str, ...], option: str, kind: str) -> None:
    for bad in ("-1000000000", *(("nan", "inf") if kind == "float" else ())):
        done = CliRunner().invoke(app, [*path, option, bad])
        assert type(done.exception) is UserError, (option, bad, done.output)
        shown = str(float(bad)) if kind == "float" else bad
        assert str(done.exception).startswith(f"{option}={shown} should be ")
