"""Metrics of predictions: accuracy and its kin, named entities, BLEU, chrF and ROUGE.

Metrics as pure NumPy functions of gold labels and predictions, with bootstrap intervals.

Each agrees with scikit-learn or SciPy where those implement it (tests/oracles/evaluate/test_metrics.py).

>>> gold, predicted = [0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 1]
>>> round(accuracy(gold, predicted), 3), round(macro_f1(gold, predicted), 3), round(matthews(gold, predicted), 3)
(0.833, 0.829, 0.707)
>>> bootstrap(accuracy, gold, predicted, seed=0)
(0.5, 1.0)

Precision, recall and F1 of named entities, counted as conlleval does (Tjong Kim Sang & De Meulder 2003).

An entity is correct if its start, end and type are.

>>> gold, predicted = ["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "I-PER", "O", "B-ORG"]
>>> entity_counts(gold, predicted), entity_scores(*np.array([entity_counts(gold, predicted)]).T)["f1"]
((2, 2, 1), 0.5)

BLEU and chrF by sacrebleu and ROUGE by rouge-score, if installed (`pip install sacrebleu rouge-score`).

Their tokenization is what makes scores comparable between papers.

    columns = bleu_counts(references, texts)      # counts per text, so that intervals can be bootstrapped over texts
    bleu(*columns)                          # 31.4
"""

from __future__ import annotations

import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from firth.data.labels import names
from firth.types import UserError

Labels = Sequence[Any] | np.ndarray
"""One label per item: ints, strings or bools."""


def accuracy(gold: Labels, predicted: Labels) -> float:
    """Return the share of correct predictions."""
    gold, predicted = _paired(gold, predicted)
    return float((gold == predicted).mean())


def macro_f1(gold: Labels, predicted: Labels) -> float:
    """Return the unweighted mean of F1 over the classes that occur on either side; 0 for a class never correct."""
    table = confusion(gold, predicted)
    correct = np.diag(table)
    return float((2 * correct / (table.sum(0) + table.sum(1))).mean())


def f1(gold: Labels, predicted: Labels) -> float:
    """Return the F1 of the positive class of two boolean columns; 0 if neither has a positive."""
    gold, predicted = _paired(gold, predicted)
    return float(2 * (gold & predicted).sum() / max(1, gold.sum() + predicted.sum()))


def per_class(gold: Labels, predicted: Labels, classes: Sequence[Any]) -> list[dict[str, float]]:
    """Return for each class the number of examples, precision, recall and F1; 0 where one is undefined."""
    gold, predicted = _paired(gold, predicted)
    rows = []
    for name in classes:
        expected, found = gold == name, predicted == name
        correct = (expected & found).sum()
        rows.append({
            "examples": int(expected.sum()), "precision": float(correct / max(1, found.sum())),
            "recall": float(correct / max(1, expected.sum())), "f1": f1(expected, found),
        })  # fmt: skip
    return rows


def pearson(gold: Labels, predicted: Labels) -> float:
    """Return Pearson's correlation of two numeric columns; 0 if one is constant."""
    gold, predicted = (np.asarray(column, np.float64) for column in _paired(gold, predicted))
    a, b = gold - gold.mean(), predicted - predicted.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return 0.0 if size == 0 else float(a @ b) / size


def spearman(gold: Labels, predicted: Labels) -> float:
    """Return Spearman's rank correlation; ties share the mean of their ranks."""
    return pearson(ranks(gold), ranks(predicted))


def ranks(column: Labels) -> np.ndarray:
    """Return the rank of each number from 1; ties share the mean of their ranks.

    >>> ranks([10.0, 20.0, 10.0]).tolist()
    [1.5, 3.0, 1.5]
    """
    _, index, count = np.unique(np.asarray(column, np.float64), return_inverse=True, return_counts=True)
    mean = np.cumsum(count) - (count - 1) / 2
    return np.asarray(mean[index])


def roc_auc(positive: Labels, scores: Labels) -> float:
    """Return the area under the ROC curve: how often a positive item scores above a negative one, ties counting half.

    It is undefined, and returned as 0.5, where one side holds no item.

    >>> roc_auc([True, False, True], [0.9, 0.1, 0.1])
    0.75
    """
    chosen, scores = _paired(positive, scores)
    chosen = np.asarray(chosen, bool)
    above, below = int(chosen.sum()), int((~chosen).sum())
    if not above or not below:
        return 0.5
    return float((ranks(scores)[chosen].sum() - above * (above + 1) / 2) / (above * below))


def root_mean_square(gold: Labels, predicted: Labels) -> float:
    """Return the root of the mean squared error."""
    gold, predicted = (np.asarray(column, np.float64) for column in _paired(gold, predicted))
    return float(np.sqrt(np.mean((gold - predicted) ** 2)))


def mean(column: Labels) -> float:
    """Return the mean score of the items."""
    return float(np.mean(np.asarray(column, np.float64)))


def matthews(gold: Labels, predicted: Labels) -> float:
    """Return Matthews' correlation for any number of classes (Gorodkin 2004): 1 is perfect, 0 is chance.

    It is undefined, and returned as 0, where one side holds a single class.
    """
    table = confusion(gold, predicted).astype(np.float64)
    n, gold_counts, counts = table.sum(), table.sum(1), table.sum(0)
    covariance = np.trace(table) * n - gold_counts @ counts
    variance = (n**2 - counts @ counts) * (n**2 - gold_counts @ gold_counts)
    return float(covariance / math.sqrt(variance)) if variance > 0 else 0.0


def calibration_error(probability: Labels, correct: Labels, bins: int = 10) -> float:
    """Return the expected calibration error (Guo 2017): the mean distance between the probability and the share correct of a bin.

    Args:
        probability: Probability that the prediction of each item is correct, 0 to 1.
        correct: Whether it is.
        bins: Number of bins of equal width between 0 and 1.

    >>> calibration_error([0.75, 0.75, 0.75, 0.75], [1, 1, 1, 0]), calibration_error([1.0, 1.0], [1, 0])
    (0.0, 0.5)
    """
    rows = calibration_bins(probability, correct, bins)
    return sum(abs(mean - share) * count for mean, share, count in rows) / sum(count for *_, count in rows)


def calibration_bins(probability: Labels, correct: Labels, bins: int = 10) -> list[tuple[float, float, int]]:
    """Return the mean probability, the share correct and the number of items of each bin that has items.

    The arguments are those of `calibration_error`.

    >>> calibration_bins([0.75, 0.75, 0.75, 0.75, 0.5], [1, 1, 1, 0, 1])
    [(0.5, 1.0, 1), (0.75, 0.75, 4)]
    """
    probability, correct = _paired(probability, correct)
    at = np.minimum((probability * bins).astype(int), bins - 1)
    counts = np.bincount(at, minlength=bins)
    means, shares = (
        np.bincount(at, x, minlength=bins) / np.maximum(counts, 1) for x in (probability, correct.astype(float))
    )
    return [(float(means[i]), float(shares[i]), int(counts[i])) for i in np.flatnonzero(counts)]


def confusion(gold: Labels, predicted: Labels) -> np.ndarray:
    """Return the confusion matrix (K, K), gold by row and prediction by column, over the K labels present, sorted.

    >>> confusion(["a", "b", "b"], ["a", "a", "b"]).tolist()
    [[1, 0], [1, 1]]
    """
    gold, predicted = _paired(gold, predicted)
    names, index = np.unique(np.concatenate((gold, predicted)), return_inverse=True)
    flat = index[: len(gold)] * len(names) + index[len(gold) :]
    return np.bincount(flat, minlength=len(names) ** 2).reshape(len(names), len(names))


def perplexity(nll: float, tokens: int) -> float:
    """Return exp of the mean -log p per token; it depends on the tokenizer, unlike bits per byte."""
    return math.exp(nll / tokens) if nll / tokens < 700 else math.inf


def bits_per_byte(nll: float, size: int) -> float:
    """Return bits per byte of a text of `size` UTF-8 bytes and `nll` nats; comparable across tokenizers.

    >>> bits_per_byte(math.log(256), 1)
    8.0
    """
    return nll / math.log(2) / size


def exact_match(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """Return the share of answers equal to the gold answer after SQuAD's normalization.

    >>> exact_match(["The Globe Theatre"], ["globe theatre."])
    1.0
    """
    return accuracy([normalize(text) for text in gold], [normalize(text) for text in predicted])


def squad(golds: Sequence[str], answer: str) -> tuple[float, float]:
    """Return SQuAD's exact match and F1 of an answer against the best gold answer; no gold answer counts as an empty one.

    >>> squad(["the Globe Theatre", "Globe"], "globe theatre."), squad([], "")
    ((1.0, 1.0), (1.0, 1.0))
    >>> squad(["in the Globe Theatre"], "Globe")
    (0.0, 0.5)
    """
    normalized = [normalize(gold) for gold in golds] or [""]
    found = normalize(answer)
    return float(found in normalized), max(_token_f1(gold.split(), found.split()) for gold in normalized)


def _token_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    if not gold or not predicted:
        return float(gold == predicted)
    shared = (Counter(gold) & Counter(predicted)).total()
    return 2 * shared / (len(gold) + len(predicted))


def normalize(text: str) -> str:
    """Return the text in lower case without punctuation, English articles and repeated spaces (SQuAD's official script)."""
    bare = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def bootstrap(
    statistic: Callable[..., float], *columns: Labels, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return a percentile bootstrap interval of `statistic(*columns)` (Efron 1979).

    Args:
        statistic: Function of the columns.
        *columns: One value per item each, resampled together. For text the items are documents, not tokens, because
            the tokens of a document are correlated.
        level: Coverage.
        draws: Number of resamples.
        seed: Seed of the resampling.

    Returns:
        The low and the high end.
    """
    arrays = [np.asarray(column) for column in columns]
    n = _length(*arrays)
    rng = np.random.default_rng(seed)
    picks = (rng.integers(n, size=n) for _ in range(draws))
    values = [statistic(*(a[pick] for a in arrays)) for pick in picks]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of several runs and the half-width of its 95% Student's t interval (NaN for a single run).

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
"""97.5% quantiles of Student's t with 1, 2, ... degrees of freedom; the last is conservative for more."""


def _paired(gold: Labels, predicted: Labels) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(gold), np.asarray(predicted)
    _length(first, second)
    return first, second


def _length(*arrays: np.ndarray) -> int:
    lengths = {len(a) for a in arrays}
    if len(lengths) != 1:
        raise ValueError(f"columns of different lengths: {sorted(lengths)}")
    if lengths == {0}:
        raise UserError("there is nothing to score: the held-out data holds no item")
    return lengths.pop()


def entity_counts(gold: Sequence[str], predicted: Sequence[str]) -> tuple[int, int, int]:
    """Return the number of gold, of predicted and of correct entities in one sentence."""
    expected, found = names(gold), names(predicted)
    return len(expected), len(found), len({*expected} & {*found})


def entity_scores(gold: np.ndarray, predicted: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Return precision, recall and F1 over sentences; 0 where there is no entity.

    Args:
        gold: Gold entities of each sentence (n,), as `counts` has them.
        predicted: Predicted entities (n,).
        correct: Correct entities (n,).
    """
    right = float(correct.sum())
    return {
        "precision": right / max(1, int(predicted.sum())),
        "recall": right / max(1, int(gold.sum())),
        "f1": entity_f1(gold, predicted, correct),
    }


def entity_f1(gold: np.ndarray, predicted: np.ndarray, correct: np.ndarray) -> float:
    """Return the harmonic mean of precision and recall."""
    return 2 * float(correct.sum()) / max(1, int(gold.sum() + predicted.sum()))


def by_kind(sentences: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, Any]]:
    """Return a row for each entity type: number of gold entities, precision, recall and F1.

    Args:
        sentences: Gold and predicted tags of each sentence.
    """
    expected, found, correct = Counter[str](), Counter[str](), Counter[str]()
    for gold, predicted in sentences:
        a, b = names(gold), names(predicted)
        expected.update(kind for kind, *_ in a)
        found.update(kind for kind, *_ in b)
        correct.update(kind for kind, *_ in {*a} & {*b})
    return [
        {"class": kind, "examples": expected[kind]}
        | entity_scores(np.array([expected[kind]]), np.array([found[kind]]), np.array([correct[kind]]))
        for kind in sorted({*expected, *found})
    ]


def library(name: str, package: str) -> Any:
    """Import a library that is not a dependency of firth; UserError with the install command if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this metric needs {package}, which is not installed: pip install {package}") from None


def bleu_counts(references: Sequence[str], texts: Sequence[str]) -> list[np.ndarray]:
    """Return ten columns (n,): matched and possible n-grams of orders 1 to 4 and both lengths of each text."""
    scorer = library("sacrebleu", "sacrebleu").BLEU()
    rows = []
    for gold, text in zip(references, texts, strict=True):
        one = scorer.corpus_score([text], [[gold]])
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    return list(np.array(rows).T)


def bleu(*columns: np.ndarray) -> float:
    """Return the corpus BLEU (Papineni 2002) from `bleu_counts`, 0 to 100, with sacrebleu's smoothing."""
    sums = [int(np.sum(column)) for column in columns]
    scorer = library("sacrebleu", "sacrebleu").BLEU
    return float(scorer.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9]).score)


def chrf(references: Sequence[str], texts: Sequence[str]) -> float:
    """Return the corpus chrF (Popovic 2015), 0 to 100."""
    return float(library("sacrebleu", "sacrebleu").corpus_chrf(list(texts), [list(references)]).score)


ROUGE = ("rouge1", "rouge2", "rougeLsum")


def rouge_scores(references: Sequence[str], texts: Sequence[str]) -> list[np.ndarray]:
    """Return three columns (n,): ROUGE-1, ROUGE-2 and ROUGE-Lsum F1 of each text, with stemming (Lin 2004)."""
    scorer = library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(ROUGE, use_stemmer=True)
    pairs = zip(references, texts, strict=True)
    rows = [[scorer.score(gold, text)[name].fmeasure for name in ROUGE] for gold, text in pairs]
    return list(np.array(rows).T)
