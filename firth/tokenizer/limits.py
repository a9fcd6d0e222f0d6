"""Limits on what a tokenizer.json can do: text that grows without bound, and regular expressions that never end.

A normalizer may replace every character by a text, repeatedly: thirty short steps make gigabytes of one letter. An
expression such as `(a+)+$` takes time that doubles with each letter. Neither shows when the file is read, only when text is
tokenized, inside the library, where it cannot be interrupted. So the file is checked without running it:

    growth       the product of what each step can multiply a text by is at most MAX_GROWTH, what it adds MAX_ADDED
    templates    a post-processor has each text once and adds at most MAX_ADDED tokens: a second `$A` doubles every text
    words        WordPiece tries all prefixes of all suffixes of a word, each in time linear in its length: at most MAX_WORD
    expressions  nothing that repeats without limit, and no choice (a|b, a?), inside a group that repeats without limit; at
                 most MAX_REPEATS unlimited repeats in a row; no backreferences. The time is then a small power of the length.

All published tokenizers in the tests (GPT-2, GPT-4, Llama 3, Qwen, T5, BERT, DeepSeek) are far within the limits.
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
"""Maximum factor by which all steps of a normalizer or decoder together may lengthen a text."""
MAX_ADDED = 10_000
"""Maximum number of characters that they may add, and of tokens that a post-processor may add."""
MAX_WORD = 1000
"""Maximum `max_input_chars_per_word` of WordPiece; BERT's is 100. A word of 1,000 letters takes 0.2 s, one of 10,000 36 s."""
MAX_STEPS = 100
"""Maximum number of steps of a normalizer, pre-tokenizer, post-processor or decoder."""
MAX_REPEATS = 4
"""Maximum number of unlimited repeats (`*`, `+`, `{n,}`) in one alternative of an expression. GPT-4's and Llama's have two."""
MAX_COUNT = 1000
"""Maximum counted repeat (`{n}`), and product of nested ones; a count of ENDLESS or more is treated as unlimited."""
ENDLESS = 100
MAX_CHOICES = 8
"""Maximum number of repeats of a group with a choice: each repeat multiplies the ways to match."""

STEPS = ("normalizer", "pre_tokenizer", "decoder")
CLASS = re.compile(r"\\[pP]\{[^{}]*\}|\\x\{[^{}]*\}|\\.", re.S)
COUNTED = re.compile(r"\{(\d*)(,?)(\d*)\}")


def check_bounds(definition: Any, file: Path) -> None:
    """Check a tokenizer.json against the limits.

    Args:
        definition: Its content.
        file: Its path, for error messages.

    Raises:
        UserError: It exceeds a limit.
    """
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
    """Check that a post-processor repeats no text. The library follows the template even if no tokens are added."""
    added = 0
    for count, step in enumerate(_steps(component, what), 1):
        for name, texts in (("single", ["A"]), ("pair", ["A", "B"])):
            parts = step.get(name)
            if not isinstance(parts, list):
                continue
            used = sorted(id for part in parts if isinstance(id := _part(part, "Sequence"), str))
            if used != texts and (name == "single" or not set(used) <= set(texts) or len(set(used)) < len(used)):
                raise UserError(
                    f"{what} has a template {name!r} of the texts {', '.join(used) or '(none)':.40}, and "
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
    """Return the id in a part of a template, {"Sequence": {"id": "A"}} or {"SpecialToken": {"id": "[CLS]"}}."""
    inner = part.get(kind) if isinstance(part, Mapping) else None
    name = inner.get("id") if isinstance(inner, Mapping) else None
    return name if isinstance(name, str) else None


def check_growth(component: Any, what: str) -> None:
    """Check a component and all components nested in it.

    Args:
        component: A normalizer, pre-tokenizer or decoder.
        what: Its name, for error messages.

    Raises:
        UserError: It exceeds a limit.
    """
    growth, added = 1.0, 0.0
    for count, step in enumerate(_steps(component, what), 1):
        times, more = _growth(step)
        growth, added = growth * times, added * times + more
        if growth > MAX_GROWTH or added > MAX_ADDED or count > MAX_STEPS:
            raise UserError(
                f"{what} can make a text more than {MAX_GROWTH} times as long, or has more than {MAX_STEPS} steps: "
                "it is not read"
            )
        pattern = step.get("pattern")
        expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
        if isinstance(expression, str) and (why := fault(expression)):
            raise UserError(
                f"{what} has the regular expression {expression!r:.80}, which {why} and could run without end: it is not read"
            )


def _steps(component: Any, what: str) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a component in order, including those of nested sequences."""
    pending, visited = [component], 0
    while pending:
        one = pending.pop()
        visited += 1
        if visited > 10 * MAX_STEPS:
            raise UserError(f"{what} has more steps than any tokenizer needs: it is not read")
        if isinstance(one, Mapping):
            inner = [
                one[name]
                for name in ("normalizers", "pretokenizers", "processors", "decoders")
                if isinstance(one.get(name), list)
            ]
            if inner:
                pending += [step for steps in inner for step in steps][::-1]
            else:
                yield one


def _growth(step: Mapping[str, Any]) -> tuple[float, int]:
    """Return the factor by which a step can lengthen a text, and the number of characters that it adds."""
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
    """Return the length of the longest replacement in SentencePiece's precompiled normalization, in bytes.

    The format is the size of the table (4 bytes), the table, then the replacements, each ended by a zero.
    """
    try:
        data = base64.b64decode(charsmap)
    except (binascii.Error, ValueError):
        return 1.0  # the library refuses it
    texts = data[4 + int.from_bytes(data[:4], "little") :]
    return float(max((len(text) for text in texts.split(b"\0")), default=1) or 1)


class _Group:
    """State of an open group: whether it contains an unlimited repeat or a choice, and its largest count."""

    def __init__(self) -> None:
        self.endless = self.choice = False
        self.repeats, self.most, self.count = 0, 0, 1


def fault(expression: str) -> str:
    """Return why a regular expression (Oniguruma's syntax) is dangerous; "" if it is not.

    >>> fault(r"(a+)+$"), fault(r"\\s+(?!\\S)|[^(\\s|[.,])]+")
    ('repeats a group that repeats', '')
    """
    groups = [_Group()]
    atom: _Group | None = None  # the group that has just been closed; None for one character
    at, repeated = 0, False  # repeated: the previous token is a quantifier
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
    """Return (minimum, maximum, length in characters) of a quantifier; a maximum of -1 means no limit."""
    if letter == "?":
        return 0, 1, 1
    if letter in "*+" or found is None:
        return int(letter == "+"), -1, 1
    low = min(int(found[1] or 0), 1 << 30)
    high = min(int(found[3]), 1 << 30) if found[3] else -1 if found[2] else low
    return low, high, len(found[0])


def _past_class(expression: str, at: int) -> int:
    """Return the position after a character class, which may be nested and may start with `]` or `^]`."""
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
