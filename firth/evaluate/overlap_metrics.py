"""How much of a written answer stands in the right one: BLEU and chrF by sacrebleu, ROUGE by rouge-score, where those are
installed (`pip install sacrebleu rouge-score`): their tokenization is what makes two figures comparable.

    columns = bleu_counts(right, said)      # a row of counts for each text, so that intervals can be drawn over texts
    bleu(*columns)                          # 31.4
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from firth.types import UserError


def library(name: str, package: str) -> Any:
    """A library that is no dependency of firth; UserError with what to type where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this score is {package}'s, which is not installed: pip install {package}") from None


def bleu_counts(right: Sequence[str], said: Sequence[str]) -> list[np.ndarray]:
    """Of each text: matched and possible n-grams of orders 1 to 4, both lengths; ten columns (n,)."""
    scorer = library("sacrebleu", "sacrebleu").BLEU()
    rows = []
    for gold, text in zip(right, said, strict=True):
        one = scorer.corpus_score([text], [[gold]])
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    return list(np.array(rows).T)


def bleu(*columns: np.ndarray) -> float:
    """BLEU of a corpus (Papineni 2002) from `bleu_counts`, 0 to 100, as sacrebleu smooths it."""
    sums = [int(np.sum(column)) for column in columns]
    scorer = library("sacrebleu", "sacrebleu").BLEU
    return float(scorer.compute_bleu(sums[:4], sums[4:8], sums[8], sums[9]).score)


def chrf(right: Sequence[str], said: Sequence[str]) -> float:
    """chrF of a corpus (Popovic 2015), 0 to 100."""
    return float(library("sacrebleu", "sacrebleu").corpus_chrf(list(said), [list(right)]).score)


ROUGE = ("rouge1", "rouge2", "rougeLsum")


def rouge_scores(right: Sequence[str], said: Sequence[str]) -> list[np.ndarray]:
    """F of single words, pairs and the longest common order (Lin 2004), stemmed, of each text; three columns (n,)."""
    scorer = library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(ROUGE, use_stemmer=True)
    rows = [[scorer.score(gold, text)[name].fmeasure for name in ROUGE] for gold, text in zip(right, said, strict=True)]
    return list(np.array(rows).T)
