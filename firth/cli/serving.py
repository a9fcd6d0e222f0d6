"""Commands that serve models. `firth.cli` registers them."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from firth.cli.options import Weights, number_option
from firth.fields import Port
from firth.types import UserError

KEY_VARIABLE = "FIRTH_API_KEY"


def serve(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Run or model directories, adapters or GGUF files: PATH, or NAME=PATH to set the name in requests."
        ),
    ],
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
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit as NAME=VALUE, such as max_requests=16; may be given several times (see the reference)."
        ),
    ] = None,
    weights: Weights = "auto",
) -> None:
    """Serve models over HTTP with OpenAI's routes, firth's own routes and a page."""
    check_installed()
    from firth.serve.app import create_app
    from firth.serve.config import ServeConfig, limits_from
    from firth.serve.registry import load_models
    from firth.serve.server import serve as run

    key = api_key or os.environ.get(KEY_VARIABLE, "")
    config = ServeConfig(host, port, key, tuple(allow_host or ()), limits_from(limit or []))
    registry = load_models(models, weights, config.limits.max_rows)
    run(create_app(registry, config), config)


def check_installed() -> None:
    """Raise a UserError if the packages of the extra `serve` are missing."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f'a server needs {error.name}: pip install "firth[serve]"') from None
