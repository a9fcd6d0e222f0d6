"""Predictions of task heads, and extractive answers from span scores.

Outputs of task heads per example, shared by validation during training, `evaluate` and `predict`.

    classes   a score for each class        score   one number              choice   a score for each option
    tags      a score for each tag, of each labeled word                    span     two scores for each token

`HeadReader.metrics` are computed over all outputs, because sums over batches cannot give them: F1, Matthews' and rank
correlation, SQuAD's metrics.

Extractive answers from the span scores of a passage's windows (BERT, Devlin 2019, sections 4.2 and 4.3).

The score of a span is the sum of its start and end scores, for start <= end and at most MAX_ANSWER_TOKENS tokens. All
pairs are compared, not the 20 best of each end as in BERT's run_squad. Where a question may be unanswerable, the answer is
empty if the lowest no-answer score of the windows is above the score of the best span (a threshold of 0).

    windows = [best_span(scores, offsets, no_answer=0) for ...]      of one question
    choose_answer(windows, context, has_unanswerable=True)           {"answer": "Anne Lee", "start": 15, "probability": 0.83}
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeVar

import numpy as np

from firth.data.collate import collate, label_fields_of
from firth.data.labels import has_spans
from firth.data.question_answering import offsets_of, question_of
from firth.data.records import Records
from firth.data.source import Source
from firth.evaluate import metrics
from firth.evaluate.perplexity import groups
from firth.generate.decoding_batch import inference_mode
from firth.model.model import LM
from firth.objectives.classification import MultipleChoice
from firth.objectives.objective import Objective, components, supervised
from firth.objectives.token_tasks import QuestionAnswering
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Batch, Example, Outputs

HeadOutput = tuple[np.ndarray, np.ndarray]
"""Label of one example, as in the batch, and its scores."""

MAX_BATCH_TOKENS = 8192
"""Most padded tokens of a batch."""

Kind = TypeVar("Kind", bound=Objective)


def component(objective: Objective, kind: type[Kind]) -> Kind:
    """Return the component of class `kind` of an objective that has one."""
    return next(one for one in reversed(components(objective)) if isinstance(one, kind))


def _one(field: str, head: str) -> Callable[[LM, Objective, Outputs, Batch], list[HeadOutput]]:
    """Return the reader of a head with one output per text, whose labels are in `field` of the batch."""

    def read(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
        states, labels = supervised(outputs["hidden"], batch[field])
        scores = model.heads[head](states).float().cpu().numpy()
        return list(zip(labels.cpu().numpy(), scores, strict=True))

    return read


def _choice(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
    scores = component(objective, MultipleChoice).scores(model, outputs, batch)
    return list(zip(batch["choice"].cpu().numpy(), scores.cpu().numpy(), strict=True))


def _tags(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
    states, labels = supervised(outputs["hidden"], batch["tags"])
    ends = np.cumsum((batch["tags"] != IGNORE).sum(-1).cpu().numpy())[:-1]
    scores = model.heads["tags"](states).float().cpu().numpy()
    return list(zip(np.split(labels.cpu().numpy(), ends), np.split(scores, ends), strict=True))


def _span(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
    scores = model.heads["span"](outputs["hidden"]).float().cpu().numpy()  # (B, T, 2)
    labels = np.stack([(batch[field] != IGNORE).int().argmax(-1).cpu().numpy() for field in ("starts", "ends")], -1)
    lengths = [scores.shape[1]] * len(scores)
    if "key_time" in batch:
        lengths = (batch["key_time"] != NEVER).sum(-1).tolist()
    return [(label, s[:n]) for label, s, n in zip(labels, scores, lengths, strict=True)]


def _replaced(model: LM, objective: Objective, outputs: Outputs, batch: Batch) -> list[HeadOutput]:
    """Return one output per text: whether each of its tokens is replaced, and the detector's score of each."""
    at = batch["real"] != IGNORE
    ends = np.cumsum(at.sum(-1).flatten().cpu().numpy())[:-1]
    scores = model.heads["replaced"](outputs["hidden"][at])[:, 0].float().cpu().numpy()
    replaced = (outputs["shown"][at] != batch["real"][at]).cpu().numpy()
    return list(zip(np.split(replaced, ends), np.split(scores, ends), strict=True))


def _class_metrics(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    gold, predicted = np.array([label for label, _ in found]), np.array([s.argmax() for _, s in found])
    out = {"macro_f1": metrics.macro_f1(gold, predicted), "matthews": metrics.matthews(gold, predicted)}
    return out | ({"f1": metrics.f1(gold == 1, predicted == 1)} if len(objective.constraints.class_names) == 2 else {})


def _score_metrics(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    gold, predicted = np.array([label for label, _ in found]), np.array([s[0] for _, s in found])
    return {"pearson": metrics.pearson(gold, predicted), "spearman": metrics.spearman(gold, predicted)}


def _tag_metrics(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    classes = objective.constraints.class_names
    if not has_spans(classes):
        return {}
    pairs = [([classes[i] for i in labels], [classes[i] for i in s.argmax(-1)]) for labels, s in found]
    return metrics.entity_scores(*np.array([metrics.entity_counts(*pair) for pair in pairs]).T)


def _replaced_metrics(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    replaced, scores = (np.concatenate([pair[i] for pair in found]) for i in (0, 1))
    return {"auc": metrics.roc_auc(replaced, scores)}


def _span_metrics(found: Sequence[HeadOutput], objective: Objective, source: Source) -> dict[str, float]:
    """Return exact match and F1 of the answer texts over all windows of a question, as `firth evaluate` does."""
    qa = component(objective, QuestionAnswering)
    outputs = [scores for _, scores in found]
    return squad_metrics(source, outputs, bool(qa.has_unanswerable), qa.position)


@dataclass(frozen=True)
class HeadReader:
    """How to read a task head.

    Args:
        read: Returns the outputs of a batch that is not packed, one per example.
        metrics: Computes metrics from all outputs, the objective and the source of the examples in the same order.
    """

    read: Callable[[LM, Objective, Outputs, Batch], list[HeadOutput]]
    metrics: Callable[[Sequence[HeadOutput], Objective, Source], dict[str, float]]


HEADS: dict[str, HeadReader] = {
    "classes": HeadReader(_one("class", "classes"), _class_metrics),
    "score": HeadReader(_one("score", "score"), _score_metrics),
    "choice": HeadReader(_choice, lambda found, objective, source: {}),
    "tags": HeadReader(_tags, _tag_metrics),
    "span": HeadReader(_span, _span_metrics),
}
"""Name of a task head -> how it is read."""

READERS = HEADS | {"replaced": HeadReader(_replaced, _replaced_metrics)}
"""Name of a head -> how it is read in validation: task heads, and ELECTRA's detector."""


def head_of(heads: Mapping[str, object]) -> str:
    """Return the name of the task head among a model's heads; empty if there is none."""
    return next((name for name in HEADS if name in heads), "")


def validated_head_of(heads: Mapping[str, object]) -> str:
    """Return the name of the head whose outputs validation reads; empty if there is none."""
    return next((name for name in READERS if name in heads), "")


def head_batches(
    model: LM, objective: Objective, head: str, examples: Iterable[Example], vocab: Vocab, max_tokens: int = MAX_BATCH_TOKENS
) -> Iterator[list[HeadOutput]]:  # fmt: skip
    """Yield the outputs of a head for examples in their order, those of a forward pass together.

    Args:
        model: The model.
        objective: Its objective, whose `build_example` must draw no random numbers.
        head: Name of the head.
        examples: The examples.
        vocab: The vocabulary of the model.
        max_tokens: Most padded tokens of a forward pass, or those of one example.
    """
    rng, device = np.random.default_rng(0), model.tokens.weight.device
    label_fields = label_fields_of(objective)
    built = (objective.build_example(example, vocab, rng) for example in examples)
    with inference_mode(model):
        for group in groups(built, max_tokens):
            batch = {name: field.to(device) for name, field in collate(group, label_fields).items()}
            yield HEADS[head].read(model, objective, objective.forward(model, batch), batch)


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis.

    >>> softmax(np.array([0.0, 0.0, -np.inf])).tolist()
    [0.5, 0.5, 0.0]
    """
    shifted = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


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
    items: Records,
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
    spans = (
        best_span(scores, offsets_of(items, i), no_answer_index(scores, position)) for i, scores in enumerate(outputs)
    )
    for number, windows in groupby(zip(items.record_ids.tolist(), spans, strict=True), lambda pair: pair[0]):
        yield choose_answer([span for _, span in windows], question_of(items, number).context, has_unanswerable)


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
