"""Tagging: a tag for each word of sentences, and where the tags mark names, precision, recall and F1 of whole names.

Every word counts: one that was cut away with the end of its sentence, or of which no token is left, is said to be O.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from firth.data.labeled import TagFields, TaggedSentences
from firth.data.tags import has_spans, to_bio2
from firth.evaluate import entity_metrics
from firth.evaluate.heads import readings, softmax
from firth.evaluate.prediction_inputs import InputSchema
from firth.evaluate.task import Answers, EvaluatedModel, Metric, Progress, Task
from firth.evaluate.tasks.classification import class_names, examples, needs
from firth.objectives.token_classification import TokenClassification

NONE = "O"
"""What is said of a word that the model did not see."""


def source(evaluated: EvaluatedModel, paths: Sequence[str], asked: bool = True) -> TaggedSentences:
    """The sentences of the files, read with the fields and the length of the run's recipe if it has one."""
    needs(evaluated, "tags", "tags", "tag")
    fields, classes = TagFields.of(evaluated.examples), class_names(evaluated, "tags")
    return TaggedSentences(
        paths, evaluated.tokenizer, evaluated.context, fields, classes=classes, asked=asked, keep=True
    )


def read(
    evaluated: EvaluatedModel, items: TaggedSentences, progress: Progress
) -> Iterator[tuple[list[str], list[str], list[float]]]:
    """(right, said, how sure) of every sentence of the files, word by word."""
    config = evaluated.model.config
    objective = TokenClassification(class_names=items.classes, causal="bidirectional" not in config.supported_patterns)
    found = readings(evaluated.model, objective, "tags", examples(items, progress), evaluated.vocab)
    yield from by_word(items, (scores for _, scores in found))
    next(found, None)  # the model is left in the mode it was in


def by_word(items: TaggedSentences, found: Iterator[np.ndarray]) -> Iterator[tuple[list[str], list[str], list[float]]]:
    """`read`, of anybody's scores: of each example one (words asked, tags)."""
    assert items.written is not None
    owners, at = items.record_ids.tolist(), 0
    for number, (words, tags) in enumerate(items.written):
        said, sure = [NONE] * len(words), [0.0] * len(words)
        if at < len(owners) and owners[at] == number:
            shares = softmax(next(found))
            for word, best, share in zip(items.words(at), shares.argmax(-1), shares.max(-1), strict=True):
                said[word], sure[word] = items.classes[best], round(float(share), 6)
            at += 1
        yield to_bio2(tags) if has_spans(tags) else tags, said, sure


def answer(evaluated: EvaluatedModel, items: TaggedSentences, progress: Progress) -> Answers:
    """Of each sentence: words, words right, names there, names said, names right."""
    return counted(items, read(evaluated, items, progress))


def counted(items: TaggedSentences, told: Iterator[tuple[list[str], list[str], list[float]]]) -> Answers:
    """`answer`, of what was told of each sentence."""
    found = [(right, said) for right, said, _ in told]
    words = [len(right) for right, _ in found]
    well = [sum(a == b for a, b in zip(right, said, strict=True)) for right, said in found]
    if not has_spans(items.classes):
        return words, well
    return words, well, *np.array([entity_metrics.counts(right, said) for right, said in found]).T


def _share(words: Any, well: Any, *_: Any) -> float:
    return float(np.sum(well) / np.sum(words))


def more(items: TaggedSentences) -> Mapping[str, Metric]:
    """Precision, recall and F1 of names, where the tags mark names."""

    def of(name: str) -> Metric:
        return lambda words, well, *counted: entity_metrics.scores(*(np.asarray(column) for column in counted))[name]

    return {name: of(name) for name in ("precision", "recall", "f1")} if has_spans(items.classes) else {}


def wanted(evaluated: EvaluatedModel) -> InputSchema:
    """Words: of a list, of CoNLL's columns, or of a line, parted by blanks."""
    told = TagFields.of(evaluated.examples)

    def says(record: dict[str, Any]) -> Sequence[Any]:
        words = record.get(told.words_field)
        return words if isinstance(words, list) else [None]

    return InputSchema(
        told.words_field,
        lambda text: {told.words_field: text.split()},
        says,
        told.column_names,
        tags=class_names(evaluated, "tags"),
    )


def tell(evaluated: EvaluatedModel, items: TaggedSentences, progress: Progress) -> Iterator[dict[str, Any]]:
    """{"tokens", "tags", "probabilities": of each tag}."""
    assert items.written is not None
    for (words, _), (_, said, sure) in zip(items.written, read(evaluated, items, progress), strict=True):
        yield {"tokens": words, "tags": said, "probabilities": sure}


TOKEN_CLASSIFICATION = Task(
    "tagging", source, answer, {"accuracy": _share}, predict=tell, input_schema=wanted, extra_metrics=more
)
