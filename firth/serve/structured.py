"""Structured output: a JSON schema or a regular expression that decides which tokens may come next (llguidance)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from firth.generate.engine import Engine
from firth.serve.config import ServeLimits
from firth.serve.errors import ApiError
from firth.serve.schemas import JsonObjectFormat, JsonSchemaFormat, RegexFormat, TextFormat

Format = TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat


class GrammarConstraint:
    """The tokens that a grammar allows; one for each answer.

    Args:
        matcher: llguidance's matcher, at the start.
        size: Number of token ids.
    """

    def __init__(self, matcher: Any, size: int) -> None:
        self.matcher, self.size = matcher, size

    def mask(self, tokens: Sequence[int]) -> np.ndarray:
        """Return (V,) bool, whether each id may come next; `tokens`, the answer so far, were all accepted."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self.size, bitorder="little").astype(bool)

    def accept(self, token: int) -> None:
        """Move on by a token of the answer."""
        self.matcher.consume_token(token)

    def copy(self) -> GrammarConstraint:
        """Return a constraint at the same position, for another answer."""
        return GrammarConstraint(self.matcher.deep_copy(), self.size)


class Grammars:
    """Compiles formats for the tokenizer of a model.

    Args:
        engine: The engine, with the tokenizer and its stop tokens.
    """

    def __init__(self, engine: Engine) -> None:
        library = _library()
        try:
            self.tokenizer = library.LLTokenizer(
                engine.tokenizer.definition, n_vocab=engine.model.config.vocab_size, eos_token=sorted(engine.stops)
            )
        except Exception as error:
            raise ApiError(
                400, f"the tokenizer of this model cannot be used for structured output: {_first_line(error)}",
                param="response_format", code="unsupported_by_model",
            ) from error  # fmt: skip
        self.matcher = library.LLMatcher

    def compile(
        self, wanted: JsonObjectFormat | JsonSchemaFormat | RegexFormat, limits: ServeLimits
    ) -> GrammarConstraint:
        """Return the constraint of a format.

        Raises:
            ApiError: The schema or the expression is too long or invalid.
        """
        if isinstance(wanted, RegexFormat):
            text, grammar = wanted.pattern, self.matcher.grammar_from_regex(wanted.pattern)
        else:
            schema = wanted.json_schema.schema_ if isinstance(wanted, JsonSchemaFormat) else {"type": "object"}
            text = json.dumps(schema)
            grammar = self.matcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        if len(text.encode()) > limits.max_schema_bytes:
            raise ApiError(
                400, f"response_format has {len(text.encode()):,} bytes, of at most {limits.max_schema_bytes:,}",
                param="response_format", code="invalid_value",
            )  # fmt: skip
        matcher = self.matcher(self.tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ApiError(
                400, f"response_format cannot be used: {_first_line(matcher.get_error())}", param="response_format",
                code="invalid_value",
            )  # fmt: skip
        return GrammarConstraint(matcher, self.tokenizer.vocab_size)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ApiError(
            501, 'structured output needs llguidance on the server: pip install "firth[serve]"', param="response_format",
            code="not_installed",
        ) from None  # fmt: skip
    return llguidance


def _first_line(error: Any) -> str:
    return str(error).strip().partition("\n")[0][:200]
