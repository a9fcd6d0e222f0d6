"""BLEU and ROUGE between a text and its references, computed without other libraries.

BLEU is sacrebleu's with the tokenizer "intl" and exponential smoothing, ROUGE is rouge-score's without stemming. These are the
settings of T5's and BIG-bench's evaluations (tests/oracles/evaluate/test_text_overlap.py compares them with both libraries).

>>> round(bleu(bleu_counts("the cat sat on the mat", ["the cat sat on a mat"])), 2)
53.73
>>> round(rouge_n("the cat sat", "the cat sat down", 1), 3), rouge_l("a b c d", "a c d b")
(0.857, 0.75)
"""

from __future__ import annotations

import functools
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

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
    return _f1((found & gold).total(), found.total(), gold.total())


def rouge_l(text: str, reference: str) -> float:
    """Return the F1 of the longest common subsequence of words, 0 to 1."""
    found, gold = words(text), words(reference)
    return _f1(len(_common(gold, found)), len(found), len(gold))


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
    return _f1(hits, *sizes)


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


def _f1(hits: int, found: int, gold: int) -> float:
    return 2 * hits / (found + gold) if hits else 0.0
