"""BLEU and ROUGE against sacrebleu and rouge-score; F1 and Matthews' correlation of tasks in prompts against scikit-learn."""

import random

import numpy as np
import pytest

from firth.evaluate.prompting.metrics import bleu, bleu_counts, class_counts, rouge_l, rouge_lsum, rouge_n, value_of

WORDS = [
    "the", "cat", "sat", "on", "a", "mat", ",", ".", "!", "$5", "1,000", "3.5%", "don't", '"quoted"', "naïve", "—", "A", "\n", " . ",
]  # fmt: skip


def text(rng: random.Random, shortest: int) -> str:
    """Return random words with punctuation, symbols and line breaks."""
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(shortest, 15)))


def test_bleu_against_sacrebleu() -> None:
    """T5's settings, which BIG-bench uses; several references, empty texts."""
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = random.Random(0)
    for _ in range(100):
        texts = [text(rng, 0) for _ in range(rng.randint(1, 5))]
        references = [[text(rng, 1) for _ in range(rng.randint(1, 3))] for _ in texts]
        padded = [[(golds + golds[:1] * 3)[i] for golds in references] for i in range(3)]
        expected = sacrebleu.corpus_bleu(texts, padded, smooth_method="exp", tokenize="intl").score
        found = bleu(np.sum([bleu_counts(*pair) for pair in zip(texts, references, strict=True)], 0))
        assert found == pytest.approx(expected, abs=1e-9)


def test_rouge_against_rouge_score() -> None:
    """Without stemming."""
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    rng = random.Random(1)
    for _ in range(200):
        answer, gold = text(rng, 0), text(rng, 1)
        expected = scorer.score(gold.replace(" . ", " .\n"), answer.replace(" . ", " .\n"))
        assert rouge_n(answer, gold, 1) == pytest.approx(expected["rouge1"].fmeasure)
        assert rouge_n(answer, gold, 2) == pytest.approx(expected["rouge2"].fmeasure)
        assert rouge_l(answer, gold) == pytest.approx(expected["rougeL"].fmeasure)
        assert rouge_lsum(answer, gold) == pytest.approx(expected["rougeLsum"].fmeasure)


def test_class_metrics_against_scikit_learn() -> None:
    """Sums of counts over items."""
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    for classes in (2, 2, 3, 5):
        gold, predicted = rng.integers(classes, size=(2, 40))
        pairs = [(int(a), int(b)) for a, b in zip(gold, predicted, strict=True)]
        found = {
            kind: value_of([class_counts(kind, a, b, classes) for a, b in pairs]) for kind in ("f1", "mcc", "macro_f1")
        }
        assert found["mcc"] == pytest.approx(metrics.matthews_corrcoef(gold, predicted))
        assert found["macro_f1"] == pytest.approx(metrics.f1_score(gold, predicted, average="macro"))
        assert found["f1"] == pytest.approx(metrics.f1_score(gold == 1, predicted == 1))
