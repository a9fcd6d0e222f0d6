"""Build prompts: templates in Jinja, examples before the question (few-shot), chain of thought, chat template.

The text of a question is

    description, then for each example: prompt, target delimiter, target, few-shot delimiter; then the prompt

as lm-evaluation-harness builds it. Whole examples are dropped, the last first, where a prompt is longer than the context.
"""

from __future__ import annotations

import bisect
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from firth.tokenizer import chat_template
from firth.tokenizer.vocab import replace_lone_surrogates
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
        own_fields: Fields with the texts of this item alone, which are looked up in training text; all fields if empty.
        rendered: Filled templates, kept because an item is rendered for the check, as a question, and as an example.
    """

    fields: Mapping[str, Any]
    location: str
    own_fields: tuple[str, ...] = ()
    rendered: dict[tuple[str, bool], Any] = field(default_factory=dict, compare=False, repr=False)


def without_lone_surrogates(value: Any) -> Any:
    r"""Return a JSON value with the lone surrogates in its texts and keys replaced, since no file can be written with them.

    >>> without_lone_surrogates({"a\ud83d": ["b\udc00", 1]}) == {"a\ufffd": ["b\ufffd", 1]}
    True
    """
    if isinstance(value, str):
        return replace_lone_surrogates(value)
    if isinstance(value, dict):
        return {without_lone_surrogates(key): without_lone_surrogates(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_lone_surrogates(one) for one in value]
    return value


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
    if (template, value) in item.rendered:
        return item.rendered[template, value]
    reply = chat_template.send({"template": template, "fields": dict(item.fields), "value": value})
    if reply is None or "error" in reply:
        why = "it takes more time than any prompt" if reply is None else reply["error"]
        names = ", ".join(map(repr, item.fields))
        raise UserError(f"{item.location}: the template {template!r} fails: {why}; the fields are {names}")
    item.rendered[template, value] = reply["value"]
    return reply["value"]


class ExamplePool:
    """Items that examples are taken from.

    Args:
        items: The items.
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self._copies: dict[str, list[int]] = {}  # record -> its positions, ascending
        for position, item in enumerate(items):
            self._copies.setdefault(_record_key(item), []).append(position)

    def others(self, item: Item) -> int:
        """Return the number of items that are no copy of an item."""
        return len(self.items) - len(self._copies.get(_record_key(item), ()))

    def choose(self, item: Item, count: int, sampler: str, seed: int, index: int) -> list[Item]:
        """Return examples for the prompt of an item, never the item itself or a copy of it.

        Args:
            item: The question.
            count: Number of examples.
            sampler: "first_n" for the first ones, "random" for others for each item.
            seed: Seed of the random choice.
            index: Number of the item, part of the seed.

        Raises:
            UserError: The pool is too small.
        """
        copies = self._copies.get(_record_key(item), [])
        others = self.others(item)
        if others < count:
            raise UserError(
                f"{item.location}: {count} examples are wanted and only {others} others are there: lower --shots"
            )
        order = range(count) if sampler == "first_n" else random.Random(f"{seed}/{index}").sample(range(others), count)
        return [self.items[_skip(position, copies)] for position in order]


def _record_key(item: Item) -> str:
    return json.dumps(item.fields, sort_keys=True, default=str)


def _skip(position: int, left_out: Sequence[int]) -> int:
    """Return the `position`-th number of 0, 1, 2, ... without those that are left out, which ascend.

    >>> [_skip(position, [1, 2]) for position in range(3)]
    [0, 3, 4]
    """
    for one in left_out:
        if one > position:
            break
        position += 1
    return position


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


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """Return a text without as many of its last characters as it takes to fit; "" if none of it does.

    >>> shorten("one two three", lambda text: len(text.split()) <= 2)
    'one two'
    """
    if fits(text):
        return text
    return text[: bisect.bisect_left(range(1, len(text)), True, key=lambda end: not fits(text[:end]))].rstrip()
