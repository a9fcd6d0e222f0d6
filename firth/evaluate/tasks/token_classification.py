"""Token classification: a tag for each word, and for tags of entities their precision, recall and F1.

Every word counts: a word lost to truncation, or without tokens, is predicted as O.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from firth.data.labeled import TaggedConfig, written
from firth.data.labels import has_spans, to_bio2
from firth.data.records import Records
from firth.evaluate import metrics
from firth.evaluate.heads import HeadOutput, softmax
from firth.evaluate.prediction_inputs import FormField, InputSchema
from firth.evaluate.task import Answers, EvaluatedModel, HeadTask, MetricFunction, Progress, Task
from firth.evaluate.tasks.classification import check_head, class_names
from firth.objectives.token_tasks import TokenClassification

OUTSIDE = "O"
"""Prediction for a word that the model did not read."""


def load(evaluated: EvaluatedModel, paths: Sequence[str], labeled: bool = True) -> Records:
    """Load sentences with the fields and the maximum length of the run's recipe, if it has one."""
    check_head(evaluated, "tags", "tags", "token_classification")
    return evaluated.records(TaggedConfig, paths, labeled, classes=class_names(evaluated, "tags"))


def objective(evaluated: EvaluatedModel, items: Records) -> TokenClassification:
    """Return the objective that reads the head."""
    causal = "bidirectional" not in evaluated.model.config.supported_patterns
    return TokenClassification(class_names=items.classes, causal=causal)


def by_word(items: Records, found: Iterator[np.ndarray]) -> Iterator[tuple[list[str], list[str], list[float]]]:
    """Yield gold tags, predicted tags and probabilities of the words of every sentence, from given scores.

    Args:
        items: The sentences.
        found: Scores (labeled words, tags) of each example.
    """
    record_ids, at = items.record_ids.tolist(), 0
    for number in range(items.num_records):
        words, tags = written(items, number)
        predicted, probabilities = [OUTSIDE] * len(words), [0.0] * len(words)
        if at < len(record_ids) and record_ids[at] == number:
            shares = softmax(next(found))
            for word, best, share in zip(items.column("words")[at], shares.argmax(-1), shares.max(-1), strict=True):
                predicted[word], probabilities[word] = items.classes[best], round(float(share), 6)
            at += 1
        yield to_bio2(tags) if has_spans(tags) else tags, predicted, probabilities


def respond(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return the counts of words, correct words, gold, predicted and correct entities of each sentence."""
    outputs = HEAD.outputs(evaluated, items, progress)
    counts = count_correct(items, by_word(items, (scores for _, scores in outputs)))
    next(outputs, None)  # exhaust the generator, which restores the mode of the model
    return counts


def count_correct(items: Records, tagged: Iterator[tuple[list[str], list[str], list[float]]]) -> Answers:
    """Return the columns of `respond` for given gold tags, predicted tags and probabilities of each sentence."""
    found = [(gold, predicted) for gold, predicted, _ in tagged]
    words = [len(gold) for gold, _ in found]
    correct = [sum(a == b for a, b in zip(gold, predicted, strict=True)) for gold, predicted in found]
    if not has_spans(items.classes):
        return words, correct
    return words, correct, *np.array([metrics.entity_counts(gold, predicted) for gold, predicted in found]).T


def _accuracy(words: Any, correct: Any, *_: Any) -> float:
    return float(np.sum(correct) / np.sum(words))


def extra_metrics(items: Records) -> Mapping[str, MetricFunction]:
    """Return precision, recall and F1 of entities, if the tags mark entities."""

    def of(name: str) -> MetricFunction:
        return lambda words, correct, *counts: metrics.entity_scores(*(np.asarray(column) for column in counts))[name]

    return {name: of(name) for name in ("precision", "recall", "f1")} if has_spans(items.classes) else {}


def input_schema(evaluated: EvaluatedModel) -> InputSchema:
    """Return the schema of words: a list, CoNLL columns, or a line split at blanks."""
    fields = TaggedConfig.of(evaluated.examples)

    def texts(record: dict[str, Any]) -> Sequence[Any]:
        words = record.get(fields.words_field)
        return words if isinstance(words, list) else [None]

    return InputSchema(
        fields.words_field,
        lambda text: {fields.words_field: text.split()},
        texts,
        fields.column_names,
        tags=class_names(evaluated, "tags"),
    )


def form(evaluated: EvaluatedModel) -> list[FormField]:
    """Return the field of a sentence."""
    note = "Words are separated by blanks, punctuation too."
    return [FormField(TaggedConfig.of(evaluated.examples).words_field, "Sentence", "words", note)]


def rows(evaluated: EvaluatedModel, items: Records, outputs: Iterator[HeadOutput]) -> Iterator[dict[str, Any]]:
    """Yield {"tokens", "tags", "probabilities": one per tag} for each sentence."""
    for number, (_, tags, probabilities) in enumerate(by_word(items, (scores for _, scores in outputs))):
        words, _ = written(items, number)
        yield {"tokens": words, "tags": tags, "probabilities": probabilities}


HEAD = HeadTask("tags", objective, rows)
TOKEN_CLASSIFICATION = Task(
    "token_classification",
    load,
    respond,
    {"accuracy": _accuracy},
    predict=HEAD.predict,
    input_schema=input_schema,
    route="tag",
    form=form,
    head=HEAD,
    extra_metrics=extra_metrics,
)
