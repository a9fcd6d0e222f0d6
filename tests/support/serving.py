"""A server of tiny models in a thread, for tests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.routing import BaseRoute

from firth.model.config import encoder_config
from firth.model.presets import llama
from firth.pretrained.load_save import save_model
from firth.serve.app import create_app
from firth.serve.config import ServeConfig, ServeLimits
from firth.serve.registry import ModelRegistry, load_models
from firth.serve.server import listen, uvicorn_config
from firth.tokenizer.train import train
from tests.support.models import random_model

TEXT = "Who paints the boat at dawn, and who holds the map by the mill? The otter paints the boat. " * 12


@dataclass(frozen=True)
class Running:
    """A running server.

    Args:
        url: Its address.
        port: Its port.
        models: Its models.
        app: Its application.
        client: A client of it, which opens a connection for each request. It has no certificates, which would be read for each
            request that is sent without a client.
    """

    url: str
    port: int
    models: ModelRegistry
    app: Starlette
    client: httpx.Client

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """Send a request; `body` is JSON, or bytes as they are."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post(path, content=content, headers={"content-type": "application/json", **headers})

    def settle(self, seconds: float = 1.0) -> float:
        """Return the seconds until no answer is decoded; fail after `seconds`."""
        start = time.monotonic()
        while self.models.thread.running:
            assert time.monotonic() - start < seconds, f"{self.models.thread.running} answers still run"
            time.sleep(0.005)
        return time.monotonic() - start


def write_models(directory: Path) -> dict[str, Path]:
    """Write a decoder with a chat template (`gpt`) and an encoder with a mask (`bert`), and return their directories."""
    tokenizer = train([TEXT], "byte-bpe", 340, num_sentinels=4)
    size = tokenizer.vocab.size
    configs = {
        "gpt": llama(size, 32, 2, 2, 64, max_positions=128), "bert": encoder_config(size, 32, 2, 2, max_positions=64),
    }  # fmt: skip
    for name, config in configs.items():
        save_model(random_model(config, std=0.1), tokenizer, directory / name)
    return {name: directory / name for name in configs}


@contextmanager
def running(models: ModelRegistry, config: ServeConfig, extra_routes: Sequence[BaseRoute] = ()) -> Iterator[Running]:
    """Serve models in a thread, on a free port."""
    with running_app(models, config, create_app(models, config, extra_routes)) as found:
        yield found


@contextmanager
def running_app(models: ModelRegistry | None, config: ServeConfig, app: Starlette) -> Iterator[Running]:
    """Serve an application in a thread, on a free port."""
    listener = listen(config)
    server = uvicorn.Server(uvicorn_config(app, config))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    client = httpx.Client(base_url=url, verify=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
    try:
        with client:
            yield Running(url, port, models or ModelRegistry({}), app, client)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
        assert not thread.is_alive()


@contextmanager
def serving(paths: Sequence[Path], **limits: Any) -> Iterator[Running]:
    """Serve model directories with some limits."""
    config = ServeConfig(port=0, limits=ServeLimits(**limits))
    with running(load_models([str(path) for path in paths], max_rows=config.limits.max_rows), config) as server:
        yield server
