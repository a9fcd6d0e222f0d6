"""Translations and summaries: the model writes, greedily, and what it wrote is laid beside what is right.

Records are read and asked as `answers` does, with the forms of the run's recipe ("translate to French: {en}").
"""

from __future__ import annotations

from firth.data.records import Seq2SeqRecords
from firth.evaluate import metrics, overlap_metrics
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task
from firth.evaluate.tasks.generation import answer, source, tell, wanted

LONGEST = 200
"""Tokens: the longest text that is waited for."""


def translated(evaluated: EvaluatedModel, items: Seq2SeqRecords, progress: Progress) -> Answers:
    """Counts of n-grams, text by text."""
    overlap_metrics.library("sacrebleu", "sacrebleu")  # before an hour of writing
    return tuple(overlap_metrics.bleu_counts(*answer(evaluated, items, progress, LONGEST)))


def summarised(evaluated: EvaluatedModel, items: Seq2SeqRecords, progress: Progress) -> Answers:
    """ROUGE, text by text."""
    overlap_metrics.library("rouge_score.rouge_scorer", "rouge-score")
    return tuple(overlap_metrics.rouge_scores(*answer(evaluated, items, progress, LONGEST)))


TRANSLATION = Task("translation", source, translated, {"bleu": overlap_metrics.bleu}, predict=tell, input_schema=wanted)
SUMMARIZATION = Task(
    "summaries", source, summarised,
    {name: lambda *columns, at=at: metrics.mean(columns[at]) for at, name in enumerate(overlap_metrics.ROUGE)},
    predict=tell, input_schema=wanted,
)  # fmt: skip
