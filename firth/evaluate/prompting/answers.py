"""Read answers: filters that turn generated text into an answer, and metrics of answers.

Filters and metrics have the names and the behavior of lm-evaluation-harness 0.4, whose task files use them.

>>> apply_filters([Filter("regex", {"regex_pattern": r"#### (-?[0-9.,]+)"}), Filter("take_first")], ["so #### 1,234"])
['1,234']
>>> apply_filters([Filter("regex", {"regex_pattern": "[a-z]"}), Filter("majority_vote"), Filter("take_first")], ["b", "a", "b"])
['b']
>>> exact_match("$1,234.", "1234", ignore=(",", r"\\$", r"\\.$"))
1.0
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from firth.evaluate.metrics import squad
from firth.evaluate.text_overlap import rouge_l, rouge_lsum, rouge_n
from firth.types import UserError

INVALID = "[invalid]"
"""Answer of a text in which a regular expression finds nothing."""


@dataclass(frozen=True)
class Filter:
    """One step of reading an answer.

    Args:
        function: Name in `FILTERS`.
        options: Its options.
    """

    function: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FilterChain:
    """Filters that are applied in order; each chain of a task gives an answer of its own.

    Args:
        name: Name of the chain, for the table of results.
        filters: The filters.
    """

    name: str
    filters: tuple[Filter, ...]


def _regex(texts: Sequence[str], regex_pattern: str, group_select: int = 0, fallback: str = INVALID) -> list[str]:
    """Replace each text by a match of a regular expression: the `group_select`-th, and of its groups the first not empty."""
    pattern, found = re.compile(regex_pattern), []
    for text in texts:
        matches = pattern.findall(text)
        if not matches or not -len(matches) <= group_select < len(matches):
            found.append(fallback)
            continue
        match = matches[group_select]
        parts = [part for part in match if part] if isinstance(match, tuple) else [match]
        found.append(parts[0].strip() if parts else fallback)
    return found


def _search(texts: Sequence[str], regex_pattern: str) -> list[str]:
    """Replace each text by the first match of a regular expression, "" if there is none (`output_regex` of BIG-bench)."""
    pattern = re.compile(regex_pattern)
    return [found.group(0) if (found := pattern.search(text)) else "" for text in texts]


def _map(texts: Sequence[str], mapping_dict: Mapping[str, str], default_value: str | None = None) -> list[str]:
    return [mapping_dict.get(text, text if default_value is None else default_value) for text in texts]


FILTERS: dict[str, Callable[..., list[str]]] = {
    "regex": _regex,
    "search": _search,
    "take_first": lambda texts: list(texts[:1]),
    "take_first_k": lambda texts, k: list(texts[:k]),
    "majority_vote": lambda texts: [Counter(texts).most_common(1)[0][0]],
    "remove_whitespace": lambda texts: [text.strip() for text in texts],
    "lowercase": lambda texts: [text.lower() for text in texts],
    "uppercase": lambda texts: [text.upper() for text in texts],
    "map": _map,
}
"""Name -> function of the samples of an item."""
SAMPLE_FILTERS = frozenset({"take_first_k", "majority_vote"})
"""Filters that need all samples of an item at once."""


def check_filter(step: Filter, location: str) -> Filter:
    """Return a filter after a trial; UserError with the location if its name or options are wrong."""
    if step.function not in FILTERS:
        raise UserError(f"{location}: there is no filter {step.function!r}: the filters are {', '.join(FILTERS)}")
    try:
        FILTERS[step.function]([""], **step.options)
    except (TypeError, re.error, ValueError) as error:
        raise UserError(
            f"{location}: the filter {step.function!r} does not work with {dict(step.options)}: {error}"
        ) from error
    return step


def apply_filters(filters: Sequence[Filter], texts: Sequence[str]) -> list[str]:
    """Apply filters to the samples of an item, in order."""
    out = list(texts)
    for step in filters:
        out = FILTERS[step.function](out, **step.options)
    return out


def exact_match(
    answer: str,
    gold: str,
    ignore: Sequence[str] = (),
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_numbers: bool = False,
) -> float:
    """Return 1.0 if an answer equals the gold answer, 0.0 otherwise.

    Args:
        answer: The answer.
        gold: The gold answer.
        ignore: Regular expressions whose matches are removed from both.
        ignore_case: Whether case is ignored.
        ignore_punctuation: Whether ASCII punctuation is ignored.
        ignore_numbers: Whether digits are ignored.
    """

    def reduced(text: str) -> str:
        for pattern in ignore:
            text = re.sub(pattern, "", text)
        text = text.lower() if ignore_case else text
        dropped = string.punctuation * ignore_punctuation + string.digits * ignore_numbers
        return text.translate(str.maketrans("", "", dropped))

    return float(reduced(answer) == reduced(gold))


def _numeric_match(answer: str, gold: str) -> float:
    """Return 1.0 if an answer is a number within a tenth of the gold one, 0.0 otherwise."""
    try:
        found, wanted = float(answer), float(gold)
    except ValueError:
        return 0.0
    return float(abs(found - wanted) <= 0.1 * (abs(wanted) or 1))


def _sequence_match(answer: str, gold: str) -> float:
    """Return the share of words that equal the gold word at their place, times 100 (BIG-bench's sequence_f1)."""
    wanted = gold.split(" ")
    found = [*answer.split(" "), *["O"] * len(wanted)]
    return 100 * sum(a == b for a, b in zip(found, wanted, strict=False)) / len(wanted)


TEXT_METRICS: dict[str, Callable[..., float]] = {
    "exact_match": exact_match,
    "f1": lambda answer, gold: squad([gold], answer)[1],
    "exact_str_match": lambda answer, gold: float(answer == gold),
    "case_insensitive_str_match": lambda answer, gold: float(answer.strip().lower() == gold.strip().lower()),
    "numeric_match_with_0_1_relative_error": _numeric_match,
    "sequence_f1": _sequence_match,
    "rouge1": lambda answer, gold: 100 * rouge_n(answer, gold, 1),
    "rouge2": lambda answer, gold: 100 * rouge_n(answer, gold, 2),
    "rougeL": lambda answer, gold: 100 * rouge_l(answer, gold),
    "rougeLsum": lambda answer, gold: 100 * rouge_lsum(answer, gold),
}
"""Metric -> value of an answer against a gold answer; of several gold answers the best counts."""
