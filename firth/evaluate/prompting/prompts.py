"""Build prompts: templates in Jinja, examples before the question (few-shot), chain of thought, chat template.

The text of a question is

    description, then for each example: prompt, target delimiter, target, few-shot delimiter; then the prompt

as lm-evaluation-harness builds it. Whole examples are dropped, the last first, where a prompt is longer than the context.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from firth.types import UserError

STEP_BY_STEP = "Let's think step by step."
"""Zero-shot chain of thought (Kojima 2022): the answer of the model starts with it."""
THEREFORE = "Therefore, the answer is"
"""Second prompt of zero-shot chain of thought, after the rationale."""


@dataclass(frozen=True)
class Item:
    """One question.

    Args:
        fields: Its record.
        location: File and line, for error messages.
    """

    fields: Mapping[str, Any]
    location: str


@lru_cache(maxsize=256)
def _compiled(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(template)


def check_template(template: str, location: str) -> None:
    """Raise a UserError with the location if a template is not valid Jinja."""
    try:
        _compiled(template)
    except jinja2.TemplateError as error:
        raise UserError(f"{location}: the template {template!r} is not valid Jinja: {error}") from error


def render(template: str, item: Item) -> str:
    """Render a template with the fields of an item.

    Raises:
        UserError: The item lacks a field of the template, or the template fails.
    """
    if template in item.fields:  # the name of a field is short for its value
        return _text(item.fields[template])
    try:
        return _compiled(template).render(**item.fields)
    except jinja2.UndefinedError as error:
        names = ", ".join(map(repr, item.fields))
        raise UserError(
            f"{item.location}: the template {template!r} fails: {error.message}; the fields are {names}"
        ) from error
    except Exception as error:  # a template is a user's program
        raise UserError(f"{item.location}: the template {template!r} fails: {type(error).__name__}: {error}") from error


def render_value(template: str, item: Item) -> Any:
    """Return the value of a template: of a field as it is, of "{{ expression }}" the expression's value, else its text."""
    if template in item.fields:
        return item.fields[template]
    inner = template.strip()
    if inner.startswith("{{") and inner.endswith("}}") and "{{" not in inner[2:-2]:
        environment = _compiled(template).environment
        try:
            value = environment.compile_expression(inner[2:-2].strip(), undefined_to_none=False)(**item.fields)
        except Exception as error:  # as above
            raise UserError(
                f"{item.location}: the template {template!r} fails: {type(error).__name__}: {error}"
            ) from error
        if isinstance(value, jinja2.Undefined):
            names = ", ".join(map(repr, item.fields))
            raise UserError(
                f"{item.location}: the template {template!r} names a field that is missing; the fields are {names}"
            )
        return value
    return render(template, item)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def choose_shots(pool: Sequence[Item], item: Item, count: int, sampler: str, seed: int, index: int) -> list[Item]:
    """Return examples for the prompt of an item, never the item itself or a copy of it.

    Args:
        pool: Items that examples are taken from.
        item: The question.
        count: Number of examples.
        sampler: "first_n" for the first ones, "random" for others for each item.
        seed: Seed of the random choice.
        index: Number of the item, part of the seed.

    Raises:
        UserError: The pool is too small.
    """
    others = [one for one in pool if one is not item and one.fields != item.fields]
    if len(others) < count:
        raise UserError(
            f"{item.location}: {count} examples are wanted and only {len(others)} others are there: lower --shots"
        )
    if sampler == "first_n":
        return others[:count]
    return random.Random(f"{seed}/{index}").sample(others, count)


def fit(
    parts: Sequence[str], question: str, description: str, longest: int, count_tokens: Callable[[str], int]
) -> tuple[str, int]:
    """Join a prompt and drop whole examples, the last first, until it is short enough.

    Args:
        parts: Text of each example, its delimiter included.
        question: Text of the question.
        description: Text before the examples.
        longest: Most tokens of the prompt.
        count_tokens: Counts the tokens of a text.

    Returns:
        The prompt, and the number of examples that were kept. It may still be too long with none.
    """
    for kept in range(len(parts), -1, -1):
        prompt = description + "".join(parts[:kept]) + question
        if not kept or count_tokens(prompt) <= longest:
            return prompt, kept
    raise AssertionError("unreachable")
