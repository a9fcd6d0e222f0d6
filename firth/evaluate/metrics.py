"""Numbers that say how well: pure functions of what was right and what was answered, NumPy only.

Each agrees with scikit-learn or SciPy where those have it (tests/test_evaluate_metrics.py); the intervals say how
much of a difference is luck, which a score alone never does.

>>> gold, answered = [0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1]
>>> round(accuracy(gold, answered), 3), round(macro_f1(gold, answered), 3), round(matthews(gold, answered), 3)
(0.833, 0.829, 0.707)
>>> bootstrap(accuracy, gold, answered, seed=0)
(0.5, 1.0)
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from firth.types import UserError

Labels = Sequence[Any] | np.ndarray
"""One label per item: ints, strings or bools."""


def accuracy(gold: Labels, answered: Labels) -> float:
    """The share answered right."""
    gold, answered = _paired(gold, answered)
    return float((gold == answered).mean())


def macro_f1(gold: Labels, answered: Labels) -> float:
    """The unweighted mean over classes (all that occur on either side) of F1; a class never right counts 0."""
    table = confusion(gold, answered)
    right = np.diag(table)
    return float((2 * right / (table.sum(0) + table.sum(1))).mean())


def f1(gold: Labels, answered: Labels) -> float:
    """F1 of what is true, of two columns of bools; 0 where nothing is."""
    gold, answered = _paired(gold, answered)
    return float(2 * (gold & answered).sum() / max(1, gold.sum() + answered.sum()))


def per_class(gold: Labels, answered: Labels, classes: Sequence[Any]) -> list[dict[str, float]]:
    """For each class: how many there are, precision, recall, F1; 0 where one is not defined."""
    gold, answered = _paired(gold, answered)
    rows = []
    for name in classes:
        there, said = gold == name, answered == name
        right = (there & said).sum()
        rows.append({
            "examples": int(there.sum()), "precision": float(right / max(1, said.sum())),
            "recall": float(right / max(1, there.sum())), "f1": f1(there, said),
        })  # fmt: skip
    return rows


def pearson(gold: Labels, answered: Labels) -> float:
    """Pearson's correlation of two columns of numbers; 0 where one of them does not vary."""
    gold, answered = (np.asarray(column, np.float64) for column in _paired(gold, answered))
    a, b = gold - gold.mean(), answered - answered.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return 0.0 if size == 0 else float(a @ b) / size


def spearman(gold: Labels, answered: Labels) -> float:
    """Spearman's: Pearson's of the ranks, equals sharing the mean of theirs."""
    return pearson(ranks(gold), ranks(answered))


def ranks(column: Labels) -> np.ndarray:
    """The rank of each number, from 1, equals with the mean of theirs.

    >>> ranks([10.0, 20.0, 10.0]).tolist()
    [1.5, 3.0, 1.5]
    """
    _, place, count = np.unique(np.asarray(column, np.float64), return_inverse=True, return_counts=True)
    mean = np.cumsum(count) - (count - 1) / 2
    return np.asarray(mean[place])


def root_mean_square(gold: Labels, answered: Labels) -> float:
    """The root of the mean squared error."""
    gold, answered = (np.asarray(column, np.float64) for column in _paired(gold, answered))
    return float(np.sqrt(np.mean((gold - answered) ** 2)))


def mean(column: Labels) -> float:
    """The mean of what each item scored."""
    return float(np.mean(np.asarray(column, np.float64)))


def matthews(gold: Labels, answered: Labels) -> float:
    """Matthews' correlation, for any number of classes (Gorodkin 2004): 1 perfect, 0 no better than chance.

    0 where one side holds a single class only, for which it is not defined.
    """
    table = confusion(gold, answered).astype(np.float64)
    n, truth, said = table.sum(), table.sum(1), table.sum(0)
    covariance = np.trace(table) * n - truth @ said
    spread = (n**2 - said @ said) * (n**2 - truth @ truth)
    return float(covariance / math.sqrt(spread)) if spread > 0 else 0.0


def confusion(gold: Labels, answered: Labels) -> np.ndarray:
    """Counts (K, K), gold by row and answer by column, over the K labels that occur, in sorted order.

    >>> confusion(["a", "b", "b"], ["a", "a", "b"]).tolist()
    [[1, 0], [1, 1]]
    """
    gold, answered = _paired(gold, answered)
    names, index = np.unique(np.concatenate((gold, answered)), return_inverse=True)
    flat = index[: len(gold)] * len(names) + index[len(gold) :]
    return np.bincount(flat, minlength=len(names) ** 2).reshape(len(names), len(names))


def perplexity(nll: float, tokens: int) -> float:
    """exp of the mean -log p per token. Depends on the tokenizer: compare bits per byte across tokenizers."""
    return math.exp(nll / tokens) if nll / tokens < 700 else math.inf


def bits_per_byte(nll: float, size: int) -> float:
    """nll in nats over text of `size` UTF-8 bytes -> bits per byte, comparable across tokenizers.

    >>> bits_per_byte(math.log(256), 1)
    8.0
    """
    return nll / math.log(2) / size


def exact_match(gold: Sequence[str], answered: Sequence[str]) -> float:
    """The share of answers equal to the gold one after SQuAD's normalisation.

    >>> exact_match(["The Globe Theatre"], ["globe theatre."])
    1.0
    """
    return accuracy([normalize(text) for text in gold], [normalize(text) for text in answered])


def squad(golds: Sequence[str], said: str) -> tuple[float, float]:
    """Exact match and F1 of an answer against the best of the right ones, by SQuAD's definition; no answer is the empty one.

    >>> squad(["the Globe Theatre", "Globe"], "globe theatre."), squad([], "")
    ((1.0, 1.0), (1.0, 1.0))
    >>> squad(["in the Globe Theatre"], "Globe")
    (0.0, 0.5)
    """
    told = [normalize(gold) for gold in golds] or [""]
    found = normalize(said)
    return float(found in told), max(_token_f1(gold.split(), found.split()) for gold in told)


def _token_f1(gold: Sequence[str], said: Sequence[str]) -> float:
    if not gold or not said:
        return float(gold == said)
    shared = (Counter(gold) & Counter(said)).total()
    return 2 * shared / (len(gold) + len(said))


def normalize(text: str) -> str:
    """Lower case without punctuation, English articles and runs of space (SQuAD's official evaluation script)."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def bootstrap(
    statistic: Callable[..., float], *columns: Labels, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """A percentile interval of `statistic(*columns)` over items drawn anew with replacement (Efron 1979).

    columns: one value per item each, resampled together; for text the items are documents, not tokens, since
    the tokens of a document stand or fall together.
    """
    arrays = [np.asarray(column) for column in columns]
    n = _length(*arrays)
    rng = np.random.default_rng(seed)
    picks = (rng.integers(n, size=n) for _ in range(draws))
    values = [statistic(*(a[pick] for a in arrays)) for pick in picks]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """The mean of a few runs and the half-width of its 95% interval by Student's t; half-width NaN for a single run.

    >>> mean, half = over_seeds([0.70, 0.72, 0.74])
    >>> f"{mean:.3f} +- {half:.3f}"
    '0.720 +- 0.050'
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, STUDENT[min(n - 1, len(STUDENT)) - 1] * deviation / math.sqrt(n)


STUDENT = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
)  # fmt: skip
"""The 97.5% quantile of Student's t with 1, 2, ... degrees of freedom; with more than the last, the last is safe."""


def _paired(gold: Labels, answered: Labels) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(gold), np.asarray(answered)
    _length(first, second)
    return first, second


def _length(*arrays: np.ndarray) -> int:
    lengths = {len(a) for a in arrays}
    if len(lengths) != 1:
        raise ValueError(f"columns of different lengths: {sorted(lengths)}")
    if lengths == {0}:
        raise UserError("there is nothing to score: the held-out data holds no item")
    return lengths.pop()
