"""Configuration of the server: where it listens, who may call it, and its limits."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from firth.fields import NonNegativeInt, PositiveFloat, PositiveInt, TokenCount, Validated
from firth.types import UserError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
MIN_KEY_CHARACTERS = 16
"""Shortest API key: 16 random characters cannot be guessed over a network."""


@dataclass(frozen=True)
class ServeLimits(Validated, section="limits"):
    """Limits of one request and of the server. A request beyond a limit is refused, except that `max_tokens` is lowered.

    Args:
        max_body_bytes: Most bytes of a request body.
        max_prompt_tokens: Most tokens of a prompt; 0 for the context of the model.
        max_pass_tokens: Most tokens of a text that a model reads in one forward pass, during which all answers wait: a text of an
            encoder, a prompt of an encoder-decoder or a prefix language model, a text whose attention is shown.
        max_new_tokens: Most tokens of an answer; a larger `max_tokens` is lowered to it.
        max_prompts: Most prompts or texts of a request.
        max_choices: Most answers to one prompt (`n`), and most answers of a request.
        max_logprobs: Most alternatives per token.
        max_stop_strings: Most stop strings.
        max_stop_characters: Most characters of a stop string.
        max_messages: Most messages of a chat.
        max_records: Most records of `/classify`, `/tag`, `/answer` and `/reward`.
        max_schema_bytes: Most bytes of a JSON schema or a regular expression.
        max_rows: Most answers that are decoded together.
        max_requests: Most requests that run or wait; another one gets 429.
        max_connections: Most open connections.
        header_seconds: Most seconds until the headers of a request are complete.
        body_seconds: Most seconds until the body of a request is complete.
        request_seconds: Most seconds until an answer is complete.
        send_seconds: Most seconds that a client may leave a part of the answer unread.
        drain_seconds: Most seconds for running answers after SIGTERM.
    """

    max_body_bytes: PositiveInt = 1 << 20
    max_prompt_tokens: NonNegativeInt = 0
    max_pass_tokens: PositiveInt = 2048
    max_new_tokens: TokenCount = 4096
    max_prompts: PositiveInt = 64
    max_choices: PositiveInt = 32
    max_logprobs: NonNegativeInt = 20
    max_stop_strings: NonNegativeInt = 16
    max_stop_characters: PositiveInt = 256
    max_messages: PositiveInt = 512
    max_records: PositiveInt = 256
    max_schema_bytes: PositiveInt = 64 << 10
    max_rows: PositiveInt = 16
    max_requests: PositiveInt = 64
    max_connections: PositiveInt = 512
    header_seconds: PositiveFloat = 10.0
    body_seconds: PositiveFloat = 30.0
    request_seconds: PositiveFloat = 600.0
    send_seconds: PositiveFloat = 60.0
    drain_seconds: PositiveFloat = 30.0


@dataclass(frozen=True)
class ServeConfig:
    """Configuration of the server.

    Args:
        host: The address to listen on. Only this machine can reach a loopback address.
        port: The port; 0 takes a free one.
        api_key: The key that every request needs, except those to `/health`; "" for none.
        allowed_hosts: Further names that a request may have in its `Host` header.
        limits: The limits.

    Raises:
        UserError: Other machines can reach the address and there is no key, or the key is short.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str = ""
    allowed_hosts: tuple[str, ...] = ()
    limits: ServeLimits = field(default_factory=ServeLimits)

    def __post_init__(self) -> None:
        if not is_loopback(self.host) and not self.api_key:
            raise UserError(
                f"--host {self.host}: other machines can reach this address, so it needs --api-key or FIRTH_API_KEY; "
                "without a key, use the default 127.0.0.1"
            )
        if self.api_key and (len(self.api_key) < MIN_KEY_CHARACTERS or not self.api_key.isascii()):
            raise UserError(
                f"the API key has {len(self.api_key)} characters: use {MIN_KEY_CHARACTERS} or more ASCII characters, such as the "
                'output of python -c "import secrets; print(secrets.token_urlsafe(24))"'
            )

    def accepts_host(self, name: str) -> bool:
        """Return whether a request may have this name, without its port, in its `Host` header.

        A page on another site can make its own name resolve to this machine (DNS rebinding), but the name stays in the
        header. An address is no name: where the server is open to others, any address is accepted.
        """
        name = name.strip("[]").lower()
        if name in LOOPBACK_NAMES or name == self.host.lower() or name in {one.lower() for one in self.allowed_hosts}:
            return True
        return not is_loopback(self.host) and _is_address(name)


def limits_from(settings: Sequence[str]) -> ServeLimits:
    """Return the limits with some of them changed.

    >>> limits_from(["max_requests=3"]).max_requests
    3

    Raises:
        UserError: A setting is no NAME=VALUE, or there is no such limit.
    """
    known = {one.name: one.type for one in fields(ServeLimits)}
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in known:
            raise UserError(f"--limit {setting}: write NAME=VALUE; the limits are {', '.join(known)}")
        try:
            values[name] = float(value) if known[name] == "PositiveFloat" else int(value)
        except ValueError:
            raise UserError(f"--limit {setting}: {value!r} is not a number") from None
    return ServeLimits(**values)


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
