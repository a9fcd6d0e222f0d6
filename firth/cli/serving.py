"""Commands that serve models. `firth.cli` registers them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from firth.cli.options import Seed, Tokens, TopP, Weights, number_option
from firth.fields import AnswerCount, NonNegativeInt, Port, PositiveFloat, Share
from firth.types import UserError

KEY_VARIABLE = "FIRTH_API_KEY"

Host = Annotated[str, typer.Option(help="The address to listen on; one that others can reach needs a key.")]
ListenPort = Annotated[int, number_option(Port, help="The port; 0 takes a free one.")]
ApiKey = Annotated[str, typer.Option(help=f"The key that requests need; better in the environment, as {KEY_VARIABLE}.")]
AllowHost = Annotated[
    list[str] | None, typer.Option(help="A further name of this server in requests; may be given several times.")
]


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Run or model directories, adapters or GGUF files: PATH, or NAME=PATH to set the name in requests."
        ),
    ],
    host: Host = "127.0.0.1",
    port: ListenPort = 8000,
    api_key: ApiKey = "",
    allow_host: AllowHost = None,
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
    check_installed()
    from firth.serve.app import create_app
    from firth.serve.board import Board
    from firth.serve.config import ServeConfig, limits_from
    from firth.serve.registry import load_models
    from firth.serve.server import serve as run

    config = ServeConfig(host, port, _key(api_key), tuple(allow_host or ()), limits_from(limit or []))
    registry = load_models(models, weights, config.limits.max_rows)
    run(create_app(registry, config, board=Board(runs) if runs else None), config)


def watch(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Runs, or directories of runs, which may begin later; runs/ by default.")
    ] = None,
    host: Host = "127.0.0.1",
    port: ListenPort = 8000,
    api_key: ApiKey = "",
    allow_host: AllowHost = None,
) -> None:
    """Show runs on a page while they train: their states, and curves that grow."""
    check_installed()
    from firth.serve.app import create_app
    from firth.serve.board import Board
    from firth.serve.config import ServeConfig
    from firth.serve.server import serve as run

    config = ServeConfig(host, port, _key(api_key), tuple(allow_host or ()))
    run(create_app(None, config, board=Board(runs or [Path("runs")])), config)


def annotate(
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
    host: Host = "127.0.0.1",
    port: ListenPort = 8000,
    api_key: ApiKey = "",
    allow_host: AllowHost = None,
) -> None:
    """Collect preferences of people on a page: prompts with answers of one or several runs, whose names are hidden."""
    check_installed()
    from firth.serve.annotation import AnnotationConfig, Collection, annotation_routes
    from firth.serve.app import create_app
    from firth.serve.config import ServeConfig
    from firth.serve.server import serve as run

    *names, prompts = paths
    config = ServeConfig(host, port, _key(api_key), tuple(allow_host or ()))
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


def _key(given: str) -> str:
    """Return the API key: the given one, or that of the environment."""
    return given or os.environ.get(KEY_VARIABLE, "")


def check_installed() -> None:
    """Raise a UserError if the packages of the extra `serve` are missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f'a server needs {error.name}: pip install "firth[serve]"') from None
