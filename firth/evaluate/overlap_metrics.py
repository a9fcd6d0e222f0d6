"""BLEU and chrF by sacrebleu and ROUGE by rouge-score, if installed (`pip install sacrebleu rouge-score`).

Their tokenization is what makes scores comparable between papers.

    columns = bleu_counts(references, texts)      # counts per text, so that intervals can be bootstrapped over texts
    bleu(*columns)                          # 31.4
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from firth.types import UserError


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
