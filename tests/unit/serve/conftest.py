"""A server of tiny models that the tests of this directory share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving import Running, serving, write_models

LIMITS = {
    "max_body_bytes": 100_000, "max_new_tokens": 64, "max_choices": 8, "max_prompts": 8, "max_messages": 16,
    "max_records": 8, "max_logprobs": 8, "header_seconds": 2.0, "body_seconds": 2.0, "request_seconds": 20.0,
    "drain_seconds": 5.0,
}  # fmt: skip


@pytest.fixture(scope="package")
def model_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the directories of a decoder and an encoder."""
    return write_models(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="package")
def server(model_paths: dict[str, Path]) -> Iterator[Running]:
    """Return a running server."""
    with serving([*model_paths.values()], **LIMITS) as found:
        yield found
