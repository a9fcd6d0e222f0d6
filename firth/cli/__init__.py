"""Command line interface: one module per group of commands, each command a few lines over the packages below.

`firth --help` must answer in under a second, so torch, the tokenizer engine and the model are imported inside the commands. A
`UserError` is printed as one sentence with exit code 2; Ctrl-C exits with 130.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from firth.cli.evaluation import evaluate, ratings
from firth.cli.inference import chat, embed, fill, generate, predict, vectors
from firth.cli.information import doctor, fetch, list_, show
from firth.cli.models import export, import_
from firth.cli.preparation import prepare, tokenizer_show, tokenizer_train
from firth.cli.scaling import plan, scale_fit, scale_run, sweep
from firth.cli.serving import annotate, serve, watch
from firth.cli.training import compare, demo, pipeline, train
from firth.io.atomic import refusal
from firth.types import LOGGER, VERSION, UserError


class ConsoleHandler(logging.Handler):
    """Prints messages on standard output and warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        typer.echo(f"firth: {record.getMessage()}" if warning else record.getMessage(), err=warning)


@contextmanager
def console() -> Iterator[None]:
    """Print the messages of firth within the context."""
    handler, level = ConsoleHandler(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)


app = typer.Typer(
    help="firth takes raw text to a language model that is pretrained, adapted, aligned and evaluated.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tokenizer_app = typer.Typer(help="Train a tokenizer on your own text, or look inside one.", no_args_is_help=True)
tokenizer_app.command("train")(tokenizer_train)
tokenizer_app.command("show")(tokenizer_show)
scale_app = typer.Typer(help="Scaling laws of your own text: train a sweep, fit it.", no_args_is_help=True)
scale_app.command("run")(scale_run)
scale_app.command("fit")(scale_fit)

COMMANDS = (
    demo, doctor, fetch, show, prepare, train, compare, sweep, plan, pipeline, generate, fill, chat, predict, embed, vectors, evaluate,
    ratings, export, serve, watch, annotate,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.command("list")(list_)
app.command("import")(import_)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(scale_app, name="scale")


def main() -> None:
    """Entry point of the `firth` command."""
    try:
        app()
    except UserError as error:
        typer.echo(f"firth: {error}", err=True)
        sys.exit(2)
    except SystemExit as ended:
        stopped = ended.__context__.__cause__ if ended.__context__ else None  # typer turns Ctrl-C into an exit with 130
        if isinstance(
            stopped, KeyboardInterrupt
        ):  # the message of an interrupted run names its checkpoint and how to continue
            typer.echo(f"firth: {str(stopped) or 'interrupted'}", err=True)
        raise
    except BrokenPipeError:  # `firth list | head`
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:  # errors of the operating system need no traceback
        refused = refusal(error, error.filename or "a temporary file (in TMPDIR)")
        if refused is None:
            raise
        typer.echo(f"firth: {refused}", err=True)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    context.with_resource(console())
    if version:
        typer.echo(f"firth {VERSION}")
        raise typer.Exit
