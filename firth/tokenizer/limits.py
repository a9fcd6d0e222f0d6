"""Bounds on what a tokenizer.json can ask for: text that grows, and regular expressions that never end.

A normalizer may replace every character by a text, again and again: thirty short steps make gigabytes of one letter. An
expression such as `(a+)+$` takes time that doubles with each letter. Neither is seen when the file is read, only when
some text comes, inside of the library, where nothing can stop it. So the file itself is checked, without running it:

    growth       the product of what each step can multiply a text by is at most MAX_GROWTH, what it adds MAX_ADDED
    templates    a post-processor holds each text once and adds at most MAX_ADDED tokens: a second `$A` doubles every text
    words        WordPiece looks for all beginnings of all rests of a word, each look as long as the word: at most MAX_WORD
    expressions  nothing that repeats without end, and no choice (a|b, a?), inside of a group that repeats without end; at most
                 MAX_REPEATS endless repeats in a row; no backreferences. The time is then a small power of the length.

All published tokenizers that the tests know (GPT-2, GPT-4's, Llama 3, Qwen, T5, BERT, DeepSeek) are far inside.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from firth.types import UserError

MAX_GROWTH = 1000
"""How many times as long all steps of a normalizer or decoder together may make a text."""
MAX_ADDED = 10_000
"""Characters that they may add once, and tokens that a post-processor may."""
MAX_WORD = 1000
"""The largest `max_input_chars_per_word` of WordPiece; BERT's is 100. A word of 1,000 letters takes 0.2 s, one of 10,000 36 s."""
MAX_STEPS = 100
"""Steps of a normalizer, pre-tokenizer, post-processor or decoder."""
MAX_REPEATS = 4
"""Endless repeats (`*`, `+`, `{n,}`) in one alternative of an expression. GPT-4's and Llama's have two."""
MAX_COUNT = 1000
"""The largest counted repeat (`{n}`), and the product of nested ones; from ENDLESS on one counts as endless."""
ENDLESS = 100
MAX_CHOICES = 8
"""How often a group that holds a choice may be repeated: each repeat multiplies the ways to match."""

STEPS = ("normalizer", "pre_tokenizer", "decoder")
CLASS = re.compile(r"\\[pP]\{[^{}]*\}|\\x\{[^{}]*\}|\\.", re.S)
COUNTED = re.compile(r"\{(\d*)(,?)(\d*)\}")


def check_bounds(definition: Any, file: Path) -> None:
    """Raise a UserError if a tokenizer.json asks for more than the bounds allow."""
    if not isinstance(definition, dict):
        raise UserError(f"{file}: the tokenizers library cannot read this tokenizer: it is not a JSON object")
    for name in STEPS:
        check_growth(definition.get(name), f"{file}: its {name}")
    _check_templates(definition.get("post_processor"), f"{file}: its post_processor")
    model = definition.get("model")
    longest = model.get("max_input_chars_per_word") if isinstance(model, Mapping) else None
    if isinstance(longest, int | float) and longest > MAX_WORD:
        raise UserError(
            f"{file}: its max_input_chars_per_word is {longest}, and WordPiece takes time by the third power of a word's "
            f"length: lower it to at most {MAX_WORD:,}"
        )


def _check_templates(component: Any, what: str) -> None:
    """Check that a post-processor multiplies no text. The library follows the template even where no tokens are added."""
    added = 0
    for count, step in enumerate(_steps(component, what), 1):
        for name, texts in (("single", ["A"]), ("pair", ["A", "B"])):
            parts = step.get(name)
            if not isinstance(parts, list):
                continue
            held = sorted(id for part in parts if isinstance(id := _part(part, "Sequence"), str))
            if held != texts and (name == "single" or not set(held) <= set(texts) or len(set(held)) < len(held)):
                raise UserError(
                    f"{what} has a template {name!r} of the texts {', '.join(held) or '(none)':.40}, where "
                    f"{' and '.join(texts)} must be there once: it is not read"
                )
            special = step.get("special_tokens")
            tokens = special if isinstance(special, Mapping) else {}
            for part in parts:
                token = tokens.get(_part(part, "SpecialToken"))
                ids = token.get("ids") if isinstance(token, Mapping) else None
                added += len(ids) if isinstance(ids, list) else 1
        if added > MAX_ADDED or count > MAX_STEPS:
            raise UserError(
                f"{what} adds more than {MAX_ADDED:,} tokens or has more than {MAX_STEPS} steps: it is not read"
            )


def _part(part: Any, kind: str) -> str | None:
    """Return the name in a part of a template, {"Sequence": {"id": "A"}} or {"SpecialToken": {"id": "[CLS]"}}."""
    inner = part.get(kind) if isinstance(part, Mapping) else None
    name = inner.get("id") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None


def check_growth(component: Any, what: str) -> None:
    """Check one component and all that it holds. what: the beginning of the sentence."""
    growth, added = 1.0, 0.0
    for count, step in enumerate(_steps(component, what), 1):
        times, more = _growth(step)
        growth, added = growth * times, added * times + more
        if growth > MAX_GROWTH or added > MAX_ADDED or count > MAX_STEPS:
            raise UserError(
                f"{what} can make a text more than {MAX_GROWTH} times as long, or has more than {MAX_STEPS} steps, as no "
                "tokenizer needs: it is not read"
            )
        pattern = step.get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        if isinstance(expression, str) and (why := fault(expression)):
            raise UserError(
                f"{what} has the regular expression {expression!r:.80}, which {why} and could run without end: it is not read"
            )


def _steps(component: Any, what: str) -> Iterator[Mapping[str, Any]]:
    """The steps of a component in their order, those of nested sequences too."""
    waiting, met = [component], 0
    while waiting:
        one = waiting.pop()
        met += 1
        if met > 10 * MAX_STEPS:
            raise UserError(f"{what} has more steps than any tokenizer needs: it is not read")
        if isinstance(one, Mapping):
            inner = [
                one[name]
                for name in ("normalizers", "pretokenizers", "processors", "decoders")
                if isinstance(one.get(name), list)
            ]
            if inner:
                waiting += [step for steps in inner for step in steps][::-1]
            else:
                yield one


def _growth(step: Mapping[str, Any]) -> tuple[float, int]:
    """How many times as long a step can make a text, and how many characters it adds besides."""
    content = step.get("content")
    if "pattern" in step and isinstance(content, str):
        pattern = step["pattern"]
        text = pattern.get("String") if isinstance(pattern, Mapping) else None
        if isinstance(text, str) and text:
            return max(1.0, len(content) / len(text)), 0
        return float(len(content) + 1) if content else 1.0, 0  # an expression may match between all characters
    if isinstance(step.get("prepend"), str):
        return 1.0, len(step["prepend"])
    if isinstance(step.get("precompiled_charsmap"), str):
        return _longest(step["precompiled_charsmap"]), 0
    return 1.0, 0


def _longest(charsmap: str) -> float:
    """Bytes of the longest text that SentencePiece's compiled normalization puts in a character's place.

    Its size of the table (4 bytes), the table, then the texts, each ended by a zero.
    """
    try:
        data = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return 1.0  # the library refuses it
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return float(max((len(text) for text in texts.split(b"\0")), default=1) or 1)


class _Group:
    """What is known of an open group: whether it has an endless repeat or a choice inside, and the largest count."""

    def __init__(self) -> None:
        self.endless = self.choice = False
        self.repeats, self.most, self.count = 0, 0, 1


def fault(expression: str) -> str:
    """Return what makes a regular expression (Oniguruma's syntax) dangerous, "" where nothing does.

    >>> fault(r"(a+)+$"), fault(r"\\s+(?!\\S)|[^(\\s|[.,])]+")
    ('repeats a group that repeats', '')
    """
    groups = [_Group()]
    atom: _Group | None = None  # the group that has just been closed; None for one character
    at, repeated = 0, False  # repeated: a quantifier stands before
    while at < len(expression):
        letter, group = expression[at], groups[-1]
        found = COUNTED.match(expression, at)
        if letter in "*+?" or (letter == "{" and found and (found[1] or found[3])):
            low, high, length = _quantifier(letter, found)
            at += length
            if repeated and (letter in "?+"):  # lazy or possessive
                continue
            if max(low, high) > MAX_COUNT or (atom and atom.count * max(low, high) > MAX_COUNT):
                return f"counts to more than {MAX_COUNT}"
            if high >= ENDLESS or high < 0:
                if repeated or (atom and (atom.endless or atom.choice)):
                    return "repeats a group that repeats" if repeated or (atom and atom.endless) else "repeats a choice"
                group.endless = True
                group.repeats += 1
                if group.repeats > MAX_REPEATS:
                    return f"has more than {MAX_REPEATS} endless repeats in a row"
            elif atom and atom.choice and high > MAX_CHOICES:
                return "repeats a choice"
            elif atom and high > 1 and atom.endless:
                group.repeats += high * max(1, atom.most)
                if group.repeats > MAX_REPEATS:
                    return f"has more than {MAX_REPEATS} endless repeats in a row"
            group.choice |= low != high  # `a?` is a choice too
            group.count = max(group.count, low, high, (atom.count if atom else 1) * max(1, high))
            repeated = True
            continue
        repeated = False
        atom = None
        if letter == "\\":
            if expression[at + 1 : at + 2] in set("123456789kg"):
                return "refers back to a group"
            escaped = CLASS.match(expression, at)
            at += len(escaped[0]) if escaped else 1
        elif letter == "[":
            at = _past_class(expression, at)
        elif letter == "(":
            groups.append(_Group())
            if expression.startswith("(?#", at):
                at = expression.find(")", at) if ")" in expression[at:] else len(expression)
                continue
            head = re.match(r"\((?:\?(?:<?[=!]|>|[:~]|[a-zA-Z-]*[:)]|<\w+>))?", expression[at:])
            at += len(head[0]) if head else 1
            if head and head[0].endswith(")"):  # (?i) sets an option and holds nothing
                groups.pop()
        elif letter == ")" and len(groups) > 1:
            atom = groups.pop()
            atom.most = max(atom.most, atom.repeats)
            outer = groups[-1]
            outer.endless |= atom.endless
            outer.choice |= atom.choice
            outer.repeats += atom.most
            outer.count = max(outer.count, atom.count)
            if outer.repeats > MAX_REPEATS:
                return f"has more than {MAX_REPEATS} endless repeats in a row"
            at += 1
        elif letter == "|":
            group.choice = True
            group.most, group.repeats = max(group.most, group.repeats), 0
            at += 1
        else:
            at += 1
    return ""


def _quantifier(letter: str, found: re.Match[str] | None) -> tuple[int, int, int]:
    """(least, most, characters) of a quantifier; most is -1 where there is none."""
    if letter == "?":
        return 0, 1, 1
    if letter in "*+" or found is None:
        return int(letter == "+"), -1, 1
    low = min(int(found[1] or 0), 1 << 30)
    high = min(int(found[3]), 1 << 30) if found[3] else -1 if found[2] else low
    return low, high, len(found[0])


def _past_class(expression: str, at: int) -> int:
    """The place after a character class, which may hold others, and after `[` or `[^` a `]` of its own."""
    depth = 0
    while at < len(expression):
        if expression[at] == "\\":
            at += 1
        elif expression[at] == "[":
            depth += 1
            if expression.startswith("^", at + 1):
                at += 1
            if expression.startswith("]", at + 1):
                at += 1
        elif expression[at] == "]":
            depth -= 1
            if not depth:
                return at + 1
        at += 1
    return at
