"""Classification: labelled records through the head that a finetuned run has for its classes.

Records are read and shown exactly as in training (`firth.data.labeled.LabeledTexts`, the objective's own view), so this is
the accuracy that training logged, with what one number hides beside it: F1, Matthews' correlation, intervals.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from firth.data.annotations import ClassifiedAnnotations
from firth.data.labeled import LabeledTexts, TextFields
from firth.data.source import Source
from firth.evaluate import metrics
from firth.evaluate.heads import HeadOutput, readings, softmax
from firth.evaluate.prediction_inputs import InputSchema
from firth.evaluate.task import Answers, EvaluatedModel, Metric, Progress, Task, most_likely
from firth.model.head_descriptions import describe_head, num_outputs
from firth.objectives.classification import Classification, Readout, readout_of
from firth.pretrained import load_save
from firth.pretrained.families.heads import UNNAMED
from firth.types import Example, UserError


def source(evaluated: EvaluatedModel, paths: Sequence[str], asked: bool = True) -> LabeledTexts:
    """The records of the files, read with the fields and the length of the run's recipe if it has one."""
    needs(evaluated, "classes", "classes", "classification")
    told, classes = evaluated.examples, class_names(evaluated, "classes")
    if told.get("kind") == "multi_annotator":  # what most of them say is right
        fields = TextFields(told.get("text_field", "text"), told.get("labels_field", "labels"))
        return ClassifiedAnnotations(
            paths, evaluated.tokenizer, evaluated.context, fields, classes=classes, labeled=asked
        )
    return LabeledTexts(
        paths, evaluated.tokenizer, evaluated.context, TextFields.of(told), classes=classes, labeled=asked
    )


def needs(evaluated: EvaluatedModel, part: str, what: str, recipe: str) -> None:
    """Raise a UserError if a model has no such head."""
    if part not in evaluated.model.heads:
        raise UserError(
            f"{evaluated.directory}: this model has no head for {what}: finetune it with `firth train {recipe}`"
        )


def class_names(evaluated: EvaluatedModel, part: str) -> tuple[str, ...]:
    """The classes in the order of the head's rows: as the model's own files say, else the run's recipe; numbered as
    transformers does (LABEL_0) where a stranger's files name none.

    Raises UserError where neither says, or not as many as the head has rows.
    """
    said = load_save.class_names(evaluated.model_directory) or evaluated.objective.get("class_names")
    rows = num_outputs(describe_head(evaluated.model.heads[part]))
    strange = not evaluated.recipe and not (evaluated.model_directory / "firth.json").is_file()
    if strange and (not said or len(said) != rows):
        return tuple(f"{UNNAMED}{i}" for i in range(rows))
    if not said or len(said) != rows:
        there = "says no names" if not said else f"names {len(said)}"
        raise UserError(
            f"{evaluated.directory}: the head has {rows} classes and the run {there}: name the run, not its model/"
        )
    return tuple(str(name) for name in said)


def where(evaluated: EvaluatedModel) -> Readout:
    """Where an answer is read: as the run's recipe says, else as suits the shape.

    Raises UserError for classifiers of others that read it where none of ours does: XLNet's behind a text that it reads both
    ways, T5's and BART's behind a text that the decoder has read once more.
    """
    said: Any = evaluated.objective.get("position", "auto")
    config = evaluated.model.config
    ours = bool(evaluated.objective) or "recipe" in load_save.metadata_of(evaluated.model_directory)
    if not ours and (config.num_encoder_layers or config.position == "xlnet"):
        raise UserError(
            f"{evaluated.directory}: this classifier of others reads its answer behind the text, where firth reads none: "
            f"finetune it here (firth train classification init_from={evaluated.directory})"
        )
    return readout_of(config) if said == "auto" else said


def examples(items: Source, progress: Progress) -> Iterator[Example]:
    """All of them, in their order."""
    for i in range(len(items)):
        yield items[i]
        progress((i + 1) / len(items))


def read(evaluated: EvaluatedModel, items: LabeledTexts, progress: Progress) -> Iterator[HeadOutput]:
    """What the head says of each text."""
    objective = Classification(class_names=items.classes, position=where(evaluated))
    return readings(evaluated.model, objective, "classes", examples(items, progress), evaluated.vocab)


def answer(evaluated: EvaluatedModel, items: LabeledTexts, progress: Progress) -> Answers:
    """The class that the head gives the highest score, "" for a tie."""
    found = list(read(evaluated, items, progress))
    names = items.classes
    return [names[int(right)] for right, _ in found], [most_likely(names, scores.tolist()) for _, scores in found]


def more(items: LabeledTexts) -> Mapping[str, Metric]:
    """F1 of the second of two classes, as GLUE has it."""
    if len(items.classes) != 2:
        return {}
    name = items.classes[1]
    return {"f1": lambda right, said: metrics.f1(np.asarray(right) == name, np.asarray(said) == name)}


def texts(evaluated: EvaluatedModel) -> InputSchema:
    """One text of each record, which may be a line, or two."""
    told = TextFields.of(evaluated.examples)

    def line(text: str) -> dict[str, Any]:
        if told.text_pair_field:
            raise UserError(
                "this task reads two texts of each record, so lines of text are not enough: give JSON lines"
            )
        return {told.text_field: text}

    fields = [told.text_field, told.text_pair_field] if told.text_pair_field else [told.text_field]
    return InputSchema(told.text_field, line, lambda record: [record.get(name) for name in fields], told.column_names)


def tell(evaluated: EvaluatedModel, items: LabeledTexts, progress: Progress) -> Iterator[dict[str, Any]]:
    """{"label", "probability", "probabilities": class -> share}."""
    for _, scores in read(evaluated, items, progress):
        shares = [round(float(share), 6) for share in softmax(scores)]
        best = int(np.argmax(shares))
        told = dict(zip(items.classes, shares, strict=True))
        yield {"label": items.classes[best], "probability": shares[best], "probabilities": told}


CLASSIFICATION = Task(
    "classification",
    source,
    answer,
    {"accuracy": metrics.accuracy, "macro_f1": metrics.macro_f1, "matthews": metrics.matthews},
    majority_baseline=True,
    predict=tell,
    input_schema=texts,
    extra_metrics=more,
)
