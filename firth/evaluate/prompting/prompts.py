"""Build prompts: templates in Jinja, examples before the question (few-shot), chain of thought, chat template.

The text of a question is

    description, then for each example: prompt, target delimiter, target, few-shot delimiter; then the prompt

as lm-evaluation-harness builds it. Whole examples are dropped, the last first, where a prompt is longer than the context.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from firth.tokenizer import chat_template
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


def check_template(template: str, location: str) -> None:
    """Raise a UserError with the location if a template is not valid Jinja."""
    reply = chat_template.send({"template": template, "fields": None, "value": False})
    if reply is None or "error" in reply:
        why = "it takes too long" if reply is None else reply["error"]
        raise UserError(f"{location}: the template {template!r} cannot be used: {why}")


def render(template: str, item: Item) -> str:
    """Render a template with the fields of an item; the name of a field is short for its value.

    Raises:
        UserError: The item lacks a field of the template, or the template fails.
    """
    return str(_filled(template, item, False))


def render_value(template: str, item: Item) -> Any:
    """Return the value of a template: of a field as it is, of "{{ expression }}" the expression's value, else its text."""
    return _filled(template, item, True)


def _filled(template: str, item: Item, value: bool) -> Any:
    """Fill a template in the process for untrusted templates."""
    if template in item.fields:
        return item.fields[template]
    if "{" not in template:
        return template
    reply = chat_template.send({"template": template, "fields": dict(item.fields), "value": value})
    if reply is None or "error" in reply:
        why = "it takes more time than any prompt" if reply is None else reply["error"]
        names = ", ".join(map(repr, item.fields))
        raise UserError(f"{item.location}: the template {template!r} fails: {why}; the fields are {names}")
    return reply["value"]


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
