"""Structured output: a JSON schema or a regular expression that decides which tokens may come next (llguidance)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from firth.generate.engine import Engine
from firth.serve.config import ServeLimits
from firth.serve.responses import ApiError
from firth.serve.schemas import JsonObjectFormat, JsonSchemaFormat, RegexFormat, TextFormat

Format = TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat
LEXER_LIMITS = {"initial_lexer_fuel": 100_000, "step_lexer_fuel": 20_000, "max_lexer_states": 20_000}
"""A tenth of llguidance's limits: a mask takes 50 ms at most, during which the other answers wait."""


class GrammarConstraint:
    """The tokens that a grammar allows; one for each answer.

    Args:
        matcher: llguidance's matcher, at the start.
        size: Number of token ids.
        first: The mask of the first token.
    """

    def __init__(self, matcher: Any, size: int, first: np.ndarray | None = None) -> None:
        self.matcher, self.size, self.first = matcher, size, first

    def mask(self, tokens: Sequence[int]) -> np.ndarray:
        """Return (V,) bool, whether each id may come next; `tokens`, the answer so far, were all accepted.

        Raises:
            ApiError: The grammar needs more than LEXER_LIMITS.
        """
        if self.first is not None and not len(tokens):
            return self.first
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, count=self.size, bitorder="little").astype(bool)

    def accept(self, token: int) -> None:
        """Move on by a token of the answer.

        Raises:
            ApiError: The grammar needs more than LEXER_LIMITS.
        """
        self.matcher.consume_token(token)
        self._check()

    def copy(self) -> GrammarConstraint:
        """Return a constraint at the same position, for another answer."""
        return GrammarConstraint(self.matcher.deep_copy(), self.size, self.first)

    def _check(self) -> None:
        if self.matcher.is_error():
            raise _refused(self.matcher)


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
        self.matcher, self.limits = library.LLMatcher, library.LLParserLimits(**LEXER_LIMITS)

    def compile(
        self, wanted: JsonObjectFormat | JsonSchemaFormat | RegexFormat, limits: ServeLimits
    ) -> GrammarConstraint:
        """Return the constraint of a format, with the mask of its first token.

        Raises:
            ApiError: The schema or the expression is too long, invalid, or needs more than LEXER_LIMITS at its first token.
        """
        convert: Callable[[str], str]
        if isinstance(wanted, RegexFormat):
            text, convert = wanted.pattern, self.matcher.grammar_from_regex
        else:
            text = json.dumps(
                wanted.json_schema.schema_ if isinstance(wanted, JsonSchemaFormat) else {"type": "object"}
            )
            convert = partial(self.matcher.grammar_from_json_schema, overrides={"whitespace_flexible": False})
        if len(text.encode()) > limits.max_schema_bytes:
            raise ApiError(
                400, f"response_format has {len(text.encode()):,} bytes, of at most {limits.max_schema_bytes:,}",
                param="response_format", code="invalid_value",
            )  # fmt: skip
        matcher = self.matcher(self.tokenizer, convert(text), log_level=0, limits=self.limits)
        if matcher.is_error():
            raise _refused(matcher)
        found = GrammarConstraint(matcher, self.tokenizer.vocab_size)
        found.first = found.mask([])
        if found.first.any():  # a mask that ran out of limits shows it only when a token is accepted
            found.copy().accept(int(found.first.argmax()))
        return found


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ApiError(
            501, 'structured output needs llguidance on the server: pip install "firth[serve]"', param="response_format",
            code="not_installed",
        ) from None  # fmt: skip
    return llguidance


def _refused(matcher: Any) -> ApiError:
    return ApiError(
        400, f"response_format cannot be used: {_first_line(matcher.get_error())}", param="response_format",
        code="invalid_value",
    )  # fmt: skip


def _first_line(error: Any) -> str:
    return str(error).strip().partition("\n")[0][:200]
