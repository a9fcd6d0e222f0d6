"""Extractive answers from the span scores of a passage's windows (BERT, Devlin 2019, sections 4.2 and 4.3).

The score of a span is the sum of its start and end scores, for start <= end and at most MAX_ANSWER_TOKENS tokens. All
pairs are compared, not the 20 best of each end as in BERT's run_squad. Where a question may be unanswerable, the answer is
empty if the lowest no-answer score of the windows is above the score of the best span (a threshold of 0).

    windows = [best_span(scores, offsets, no_answer=0) for ...]      of one question
    choose_answer(windows, context, has_unanswerable=True)           {"answer": "Anne Lee", "start": 15, "probability": 0.83}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from firth.data.question_answering import QuestionRecords
from firth.data.source import Source
from firth.evaluate import metrics

MAX_ANSWER_TOKENS = 30
"""Longest answer, in tokens."""


@dataclass(frozen=True)
class FoundSpan:
    """Best span of one window.

    Args:
        score: Sum of the start and end scores; -inf if the window holds no token of the passage.
        start: First character of the span in the passage.
        end: Character after the span.
        probability: Probability of the span among all pairs of positions of the window.
        no_answer_score: Score of the no-answer position.
        no_answer_probability: Probability of the no-answer position.
    """

    score: float
    start: int
    end: int
    probability: float
    no_answer_score: float
    no_answer_probability: float = 0.0


def best_span(scores: np.ndarray, offsets: np.ndarray, no_answer: int) -> FoundSpan:
    """Return the best span of a window.

    A span neither starts nor ends at a token of white space alone, whose two offsets are equal.

    >>> best_span(np.array([[0.0, 0.0], [3.0, 0.0], [1.0, 2.0]]), np.array([[-1, -1], [0, 4], [5, 9]]), 0).end
    9

    Args:
        scores: Start and end scores (T, 2).
        offsets: Characters of each token in the passage (T, 2); -1 outside of it.
        no_answer: Index of the token that represents "no answer".
    """
    scores = scores.astype(np.float64)
    total = np.log(np.exp(scores - scores.max(0)).sum(0)).sum() + scores.max(0).sum()
    no_answer_score = float(scores[no_answer].sum())
    no_answer_probability = float(np.exp(no_answer_score - total))
    inside = offsets[:, 1] > offsets[:, 0]
    if not inside.any():
        return FoundSpan(-np.inf, 0, 0, 0.0, no_answer_score, no_answer_probability)
    starts, ends = (np.where(inside, scores[:, side], -np.inf) for side in (0, 1))
    padded = np.concatenate((ends, np.full(MAX_ANSWER_TOKENS - 1, -np.inf)))
    sums = starts[:, None] + np.lib.stride_tricks.sliding_window_view(
        padded, MAX_ANSWER_TOKENS
    )  # (T, MAX_ANSWER_TOKENS)
    first, more = divmod(int(sums.argmax()), MAX_ANSWER_TOKENS)
    score = float(sums[first, more])
    probability = float(np.exp(score - total))
    start, end = int(offsets[first, 0]), int(offsets[first + more, 1])
    return FoundSpan(score, start, end, probability, no_answer_score, no_answer_probability)


def choose_answer(windows: Sequence[FoundSpan], context: str, has_unanswerable: bool) -> dict[str, Any]:
    """Return the answer to a question from the best spans of its windows.

    Args:
        windows: Best span of each window.
        context: Text of the passage.
        has_unanswerable: Whether "no answer" is allowed.

    Returns:
        {"answer": its text, empty for no answer, "start": its first character or -1, "probability": in its window}.
    """
    top = max(windows, key=lambda one: one.score)
    lowest = min(windows, key=lambda one: one.no_answer_score)
    if has_unanswerable and lowest.no_answer_score > top.score:
        return {"answer": "", "start": -1, "probability": lowest.no_answer_probability}
    return {"answer": context[top.start : top.end], "start": top.start, "probability": top.probability}


def by_question(
    items: QuestionRecords,
    outputs: Iterator[np.ndarray],
    has_unanswerable: bool,
    position: Literal["first", "last"] = "first",
) -> Iterator[dict[str, Any]]:
    """Yield `choose_answer` of each question in order.

    Args:
        items: The questions, an item per window.
        outputs: Scores (T, 2) of each window.
        has_unanswerable: Whether "no answer" is allowed.
        position: Which token of a window represents "no answer".
    """
    spans = (best_span(scores, items.offsets(i), no_answer_index(scores, position)) for i, scores in enumerate(outputs))
    for number, windows in groupby(zip(items.record_ids.tolist(), spans, strict=True), lambda pair: pair[0]):
        yield choose_answer([span for _, span in windows], items.question_of(number).context, has_unanswerable)


def no_answer_index(scores: np.ndarray, position: str) -> int:
    """Return the index of the token of a window that represents "no answer"."""
    return len(scores) - 1 if position == "last" else 0


def squad_metrics(
    source: Source, outputs: Sequence[np.ndarray], has_unanswerable: bool, position: str
) -> dict[str, float]:
    """Return SQuAD's exact match and F1 over the questions of any source of windows.

    Args:
        source: Windows whose metadata has the question and the offsets.
        outputs: Scores (T, 2) of each window.
        has_unanswerable: Whether "no answer" is allowed.
        position: Which token of a window represents "no answer": "first" or "last".
    """
    windows: dict[int, list[FoundSpan]] = {}
    questions = {}
    for i, (record_id, scores) in enumerate(zip(source.record_ids.tolist(), outputs, strict=True)):
        metadata = source.metadata(i)
        questions[record_id] = metadata["question"]
        span = best_span(scores, metadata["offsets"], no_answer_index(scores, position))
        windows.setdefault(record_id, []).append(span)
    pairs = [
        metrics.squad(
            questions[record_id].right,
            choose_answer(spans, questions[record_id].context, has_unanswerable)["answer"],
        )
        for record_id, spans in windows.items()
    ]
    return {"exact_match": metrics.mean([exact for exact, _ in pairs]), "f1": metrics.mean([f1 for _, f1 in pairs])}
