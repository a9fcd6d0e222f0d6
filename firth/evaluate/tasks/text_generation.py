"""Translation and summarization: greedy completions scored against references by BLEU and ROUGE.

Records are read and prompted as in the task `generation`, with the templates of the run's recipe ("translate to French: {en}").
"""

from __future__ import annotations

from firth.data.records import Records
from firth.evaluate import metrics
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task
from firth.evaluate.tasks.generation import input_schema, load, predict, respond

MAX_NEW_TOKENS = 200
"""Token limit of a completion; a longer reference raises it to its own length."""


def translate(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return the n-gram counts of each text for BLEU."""
    metrics.library("sacrebleu", "sacrebleu")  # fail before a long generation
    return tuple(metrics.bleu_counts(*respond(evaluated, items, progress, MAX_NEW_TOKENS)))


def summarize(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return the ROUGE scores of each text."""
    metrics.library("rouge_score.rouge_scorer", "rouge-score")
    return tuple(metrics.rouge_scores(*respond(evaluated, items, progress, MAX_NEW_TOKENS)))


TRANSLATION = Task("translation", load, translate, {"bleu": metrics.bleu}, predict=predict, input_schema=input_schema)
SUMMARIZATION = Task(
    "summarization", load, summarize,
    {name: lambda *columns, at=at: metrics.mean(columns[at]) for at, name in enumerate(metrics.ROUGE)},
    predict=predict, input_schema=input_schema,
)  # fmt: skip
