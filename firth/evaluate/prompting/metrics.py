"""Metrics of answers: filters that read an answer in generated text, metrics of one answer, and metrics that are no mean over items.

Filters and metrics have the names and the behavior of lm-evaluation-harness 0.4, whose task files use them.

>>> apply_filters([Filter("regex", {"regex_pattern": r"#### (-?[0-9.,]+)"}), Filter("take_first")], ["so #### 1,234"])
['1,234']
>>> apply_filters([Filter("regex", {"regex_pattern": "[a-z]"}), Filter("majority_vote"), Filter("take_first")], ["b", "a", "b"])
['b']
>>> exact_match("$1,234.", "1234", ignore=(",", r"\\$", r"\\.$"))
1.0

F1, Matthews' correlation and BLEU are functions of counts that are summed over items:

>>> round(value_of([Counts("f1", (1, 1, 1)), Counts("f1", (0, 1, 0)), Counts("f1", (0, 0, 0))]), 3)
0.667
>>> value_of([Counts("mcc", (1, 0, 0, 0)), Counts("mcc", (0, 0, 0, 1))])
1.0

BLEU and ROUGE are computed without other libraries: BLEU is sacrebleu's with the tokenizer "intl" and exponential smoothing, ROUGE
is rouge-score's without stemming. These are the settings of T5's and BIG-bench's evaluations
(tests/oracles/evaluate/test_text_overlap.py compares them with both libraries).

>>> round(bleu(bleu_counts("the cat sat on the mat", ["the cat sat on a mat"])), 2)
53.73
>>> round(rouge_n("the cat sat", "the cat sat down", 1), 3), rouge_l("a b c d", "a c d b")
(0.857, 0.75)
"""

from __future__ import annotations

import functools
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from firth.evaluate.metrics import squad
from firth.types import UserError

MAX_ORDER = 4
"""Longest n-grams of BLEU."""


@functools.cache
def _tokenizer() -> list[tuple[re.Pattern[str], str]]:
    """Return the substitutions of mteval-v14's international tokenization: punctuation not within numbers, and symbols."""
    classes: dict[str, list[str]] = {"P": [], "S": [], "N": []}
    for code in range(sys.maxunicode + 1):
        kind = unicodedata.category(chr(code))[0]
        if kind in classes:
            classes[kind].append(re.escape(chr(code)))
    marks, symbols, digits = ("".join(classes[kind]) for kind in "PSN")
    return [
        (re.compile(f"([^{digits}])([{marks}])"), r"\1 \2 "),
        (re.compile(f"([{marks}])([^{digits}])"), r" \1 \2"),
        (re.compile(f"([{symbols}])"), r" \1 "),
    ]


def tokenize(text: str) -> list[str]:
    """Return the tokens of a text for BLEU ("intl").

    >>> tokenize('"No," she wrote: $1,000.50 more!')
    ['"', 'No', ',', '"', 'she', 'wrote', ':', '$', '1,000.50', 'more', '!']
    """
    text = text.rstrip()
    for pattern, replacement in _tokenizer():
        text = pattern.sub(replacement, text)
    return text.split()


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + order]) for i in range(len(tokens) - order + 1))


def bleu_counts(text: str, references: Sequence[str]) -> tuple[float, ...]:
    """Return what BLEU sums over texts: matched and possible n-grams of orders 1 to 4, and both lengths (10 numbers).

    The length of the references is that of the one closest in length.
    """
    tokens, golds = tokenize(text), [tokenize(one) for one in references]
    matched, possible = [], []
    for order in range(1, MAX_ORDER + 1):
        found = _ngrams(tokens, order)
        most: Counter[tuple[str, ...]] = Counter()
        for gold in golds:
            most |= _ngrams(gold, order)
        matched.append((found & most).total())
        possible.append(found.total())
    closest = min((abs(len(gold) - len(tokens)), len(gold)) for gold in golds)[1]
    return (*matched, *possible, len(tokens), closest)


def bleu(counts: Sequence[float] | np.ndarray) -> float:
    """Return BLEU (Papineni 2002), 0 to 100, of `bleu_counts` summed over texts."""
    matched, possible = counts[:MAX_ORDER], counts[MAX_ORDER : 2 * MAX_ORDER]
    size, reference = counts[-2:]
    if not any(matched) or not all(possible):
        return 0.0
    smoothing, logs = 1.0, 0.0
    for found, total in zip(matched, possible, strict=True):
        if not found:
            smoothing *= 2
        logs += math.log(found / total if found else 1 / (smoothing * total))
    penalty = min(0.0, 1 - reference / size)
    return 100 * math.exp(penalty + logs / MAX_ORDER)


def words(text: str) -> list[str]:
    """Return the words of a text for ROUGE: runs of ASCII letters and digits, in lower case."""
    return re.findall(r"[a-z0-9]+", text.lower())


def rouge_n(text: str, reference: str, order: int) -> float:
    """Return the F1 of shared n-grams (Lin 2004), 0 to 1."""
    found, gold = _ngrams(words(text), order), _ngrams(words(reference), order)
    return _overlap_f1((found & gold).total(), found.total(), gold.total())


def rouge_l(text: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of words, 0 to 1."""
    found, gold = words(text), words(reference)
    return _overlap_f1(len(_common(gold, found)), len(found), len(gold))


def rouge_lsum(text: str, reference: str) -> float:
    """Return the F1 of the longest common subsequences of lines, 0 to 1 (ROUGE-Lsum; " . " ends a line, as in T5)."""
    found, gold = ([words(one) for one in side.replace(" . ", " .\n").split("\n")] for side in (text, reference))
    left, wanted = (Counter(word for line in side for word in line) for side in (found, gold))
    sizes, hits = (left.total(), wanted.total()), 0
    for line in gold:
        for position in sorted({i for other in found for i in _common(line, other)}):
            if left[line[position]] > 0 and wanted[line[position]] > 0:
                left[line[position]] -= 1
                wanted[line[position]] -= 1
                hits += 1
    return _overlap_f1(hits, *sizes)


def _common(gold: Sequence[str], found: Sequence[str]) -> list[int]:
    """Return the positions in `gold` of a longest common subsequence of two lists of words."""
    table = [[0] * (len(found) + 1)]
    for word in gold:
        above, row = table[-1], [0]
        for j, other in enumerate(found):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    i, j, positions = len(gold), len(found), []
    while i and j:
        if gold[i - 1] == found[j - 1]:
            i, j = i - 1, j - 1
            positions.append(i)
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return positions[::-1]


def _overlap_f1(hits: int, found: int, gold: int) -> float:
    return 2 * hits / (found + gold) if hits else 0.0


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


@dataclass(frozen=True)
class Counts:
    """What one item adds to a metric.

    Args:
        kind: Name in `AGGREGATES`.
        values: The counts; as many for every item.
    """

    kind: str
    values: tuple[float, ...]


def class_counts(kind: str, gold: int, predicted: int, classes: int) -> Counts:
    """Return the counts of a classified item for "f1" (of class 1), or "mcc" and "macro_f1" (the confusion matrix)."""
    if kind == "f1":
        return Counts(kind, (float(gold == predicted == 1), float(gold == 1), float(predicted == 1)))
    return Counts(kind, tuple(float(i == gold * classes + predicted) for i in range(classes**2)))


def _f1(sums: np.ndarray) -> float:
    hits, gold, predicted = sums
    return float(2 * hits / (gold + predicted)) if hits else 0.0


def _square(sums: np.ndarray) -> np.ndarray:
    size = math.isqrt(len(sums))
    return sums.reshape(size, size)


def _mcc(sums: np.ndarray) -> float:
    """Return Matthews' correlation for any number of classes (Gorodkin 2004); 0 where one side has a single class."""
    table = _square(sums)
    n, gold, predicted = table.sum(), table.sum(1), table.sum(0)
    variance = (n**2 - predicted @ predicted) * (n**2 - gold @ gold)
    return float((np.trace(table) * n - gold @ predicted) / math.sqrt(variance)) if variance > 0 else 0.0


def _macro_f1(sums: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur as gold answer or prediction."""
    table = _square(sums)
    sizes = table.sum(0) + table.sum(1)
    present = sizes > 0
    return float((2 * np.diag(table)[present] / sizes[present]).mean())


AGGREGATES: dict[str, Callable[[np.ndarray], float]] = {
    "f1": _f1, "mcc": _mcc, "macro_f1": _macro_f1, "bleu": bleu,
}  # fmt: skip
"""Kind of counts -> the metric of their sum."""


def value_of(counts: Sequence[Counts]) -> float:
    """Return the metric over items."""
    return AGGREGATES[counts[0].kind](np.sum([one.values for one in counts], 0))


def jackknife_error(counts: Sequence[Counts], groups: Sequence[str]) -> float:
    """Return the standard error of a metric by leaving out one item at a time, or one group where there are several.

    Args:
        counts: Counts of each item.
        groups: Group of each item.
    """
    sums = cluster_sums(counts, groups)
    n = len(sums)
    if n < 2:
        return math.nan
    function, total = AGGREGATES[counts[0].kind], sums.sum(0)
    values = np.array([function(total - one) for one in sums])
    return float(math.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum()))


def cluster_sums(counts: Sequence[Counts], groups: Sequence[str]) -> np.ndarray:
    """Return the counts summed by group where there are several, otherwise those of each item, (clusters, numbers)."""
    rows = np.array([one.values for one in counts], np.float64)
    names, index = np.unique(np.array(groups, dtype=str), return_inverse=True)
    if len(names) < 2:
        return rows
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, index, rows)
    return sums


def bootstrap_difference(
    first: Sequence[Counts], second: Sequence[Counts], groups: Sequence[str], draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the difference of a metric between two models in each of `draws` samples of the items (or groups), (draws,)."""
    function = AGGREGATES[first[0].kind]
    sums, other = cluster_sums(first, groups), cluster_sums(second, groups)
    n = len(sums)
    weights = (rng.multinomial(n, np.full(n, 1 / n)) for _ in range(draws))
    return np.array([function(w @ sums) - function(w @ other) for w in weights])
