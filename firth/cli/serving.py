"""Commands that serve models. `firth.cli` registers them."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firth.cli.options import Seed, Tokens, TopP, Weights, number_option
from firth.fields import AnswerCount, NonNegativeInt, Port, PositiveFloat, Share
from firth.types import UserError

if TYPE_CHECKING:
    from firth.serve.config import ServeConfig

KEY_VARIABLE = "FIRTH_API_KEY"


def address(
    host: Annotated[
        str, typer.Option(help="The address to listen on; one that others can reach needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, number_option(Port, help="The port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str, typer.Option(help=f"The key that requests need; better in the environment, as {KEY_VARIABLE}.")
    ] = "",
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name of this server in requests; may be given several times.")
    ] = None,
) -> ServeConfig:
    """Return the configuration of a server with these options, which all commands here have."""
    check_installed()
    from firth.serve.config import ServeConfig

    return ServeConfig(host, port, api_key or os.environ.get(KEY_VARIABLE, ""), tuple(allow_host or ()))


def serving(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the options of `address` after its own; it gets their result as its first argument."""
    shared = inspect.signature(address, eval_str=True, locals={"ServeConfig": object}).parameters
    _, *own = inspect.signature(command, eval_str=True, locals={"ServeConfig": object}).parameters.values()

    def run(**options: Any) -> None:
        command(address(**{name: options.pop(name) for name in shared}), **options)

    parameters = [one.replace(kind=one.KEYWORD_ONLY) for one in (*own, *shared.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


@serving
def serve(
    config: ServeConfig,
    models: Annotated[
        list[str],
        typer.Argument(
            help="Run or model directories, adapters or GGUF files: PATH, or NAME=PATH to set the name in requests."
        ),
    ],
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit as NAME=VALUE, such as max_requests=16; may be given several times (see the reference)."
        ),
    ] = None,
    weights: Weights = "auto",
    runs: Annotated[
        list[Path] | None,
        typer.Option(help="Show these runs, or directories of runs, on the page; may be given several times."),
    ] = None,
) -> None:
    """Serve models over HTTP with OpenAI's routes, firth's own routes and a page."""
    from firth.serve.app import create_app
    from firth.serve.board import Board
    from firth.serve.config import limits_from
    from firth.serve.registry import load_models
    from firth.serve.server import serve as run

    config = replace(config, limits=limits_from(limit or []))
    registry = load_models(models, weights, config.limits.max_rows)
    run(create_app(registry, config, board=Board(runs) if runs else None), config)


@serving
def watch(
    config: ServeConfig,
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Runs, or directories of runs, which may begin later; runs/ by default.")
    ] = None,
) -> None:
    """Show runs on a page while they train: their states, and curves that grow."""
    from firth.serve.app import create_app
    from firth.serve.board import Board
    from firth.serve.server import serve as run

    run(create_app(None, config, board=Board(runs or [Path("runs")])), config)


@serving
def annotate(
    config: ServeConfig,
    paths: Annotated[
        list[str],
        typer.Argument(
            help="The runs that answer, then the file of prompts. Without a run, the records of the file have `samples`.",
            metavar="[RUN]... PROMPTS",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file of preferences, which is continued if it exists.")] = Path(
        "preferences.jsonl"
    ),
    answers: Annotated[int, number_option(AnswerCount, help="Answers to each prompt, of all runs in turn.")] = 4,
    twice: Annotated[
        float, number_option(Share, help="Share of the prompts that are given twice, to measure agreement.")
    ] = 0.1,
    temperature: Annotated[float, number_option(PositiveFloat, help="Temperature of the answers.")] = 1.0,
    top_p: TopP = 1.0,
    max_new_tokens: Tokens = 256,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Whether prompts are messages of the chat template.")
    ] = True,
    limit: Annotated[int, number_option(NonNegativeInt, help="Most prompts; 0 for all.")] = 0,
    seed: Seed = 0,
) -> None:
    """Collect preferences of people on a page: prompts with answers of one or several runs, whose names are hidden."""
    from firth.serve.annotation import AnnotationConfig, Collection, annotation_routes
    from firth.serve.app import create_app
    from firth.serve.server import serve as run

    *names, prompts = paths
    about = AnnotationConfig(
        tuple(names), (prompts,), answers, twice, temperature, top_p, max_new_tokens, chat, limit, seed
    )
    collection = Collection(about, out)
    collection.start()
    try:
        run(create_app(None, config, annotation_routes(collection, config.limits)), config)
    finally:
        collection.preferences.close()
    typer.echo(f"{out}: {len(collection.preferences.judgments()):,} judgments")


def check_installed() -> None:
    """Raise a UserError if the packages of the extra `serve` are missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f'a server needs {error.name}: pip install "firth[serve]"') from None
