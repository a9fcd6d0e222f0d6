"""Classification of labeled records with the head of a finetuned run.

Records are read and built into examples exactly as in training (`firth.data.labeled.LabeledConfig`,
`Classification.build_example`), so the accuracy is the one that training logged. F1, Matthews' correlation and intervals
complete it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from firth.data.labeled import LabeledConfig, TextsConfig
from firth.data.records import Records
from firth.data.semi_supervised import MultiAnnotatorConfig
from firth.evaluate import metrics
from firth.evaluate.heads import HeadOutput, softmax
from firth.evaluate.prediction_inputs import FormField, InputSchema
from firth.evaluate.task import Answers, EvaluatedModel, HeadTask, MetricFunction, Progress, Task, most_likely
from firth.model.heads import describe_head, num_outputs
from firth.objectives.classification import Classification, Readout, readout_of
from firth.pretrained import load_save
from firth.pretrained.families.conversion import UNNAMED
from firth.types import UserError


def load(evaluated: EvaluatedModel, paths: Sequence[str], labeled: bool = True) -> Records:
    """Load records with the fields and the maximum length of the run's recipe, if it has one."""
    check_head(evaluated, "classes", "classes", "classification")
    voted = evaluated.examples.get("kind") == "multi_annotator"  # the majority vote is the label
    kind: type[TextsConfig] = MultiAnnotatorConfig if voted else LabeledConfig
    return evaluated.records(kind, paths, labeled, classes=class_names(evaluated, "classes"))


def check_head(evaluated: EvaluatedModel, head: str, outputs: str, recipe: str) -> None:
    """Raise an error if a model lacks a head.

    Args:
        evaluated: The model.
        head: Name of the head.
        outputs: What the head scores, for the message.
        recipe: Recipe that trains such a head, for the message.
    """
    if head not in evaluated.model.heads:
        raise UserError(
            f"{evaluated.directory}: this model has no head for {outputs}: finetune it with `firth train {recipe}`"
        )


def class_names(evaluated: EvaluatedModel, head: str) -> tuple[str, ...]:
    """Return the class names in the order of the head's outputs.

    They come from the model's own files, else from the run's recipe. A model not written by firth that has no names gets
    those of transformers (LABEL_0).

    Raises:
        UserError: There are no names, or not as many as the head has outputs.
    """
    names = load_save.class_names(evaluated.model_directory) or evaluated.objective.get("class_names")
    rows = num_outputs(describe_head(evaluated.model.heads[head]))
    foreign = not evaluated.recipe and not (evaluated.model_directory / "firth.json").is_file()
    if foreign and (not names or len(names) != rows):
        return tuple(f"{UNNAMED}{i}" for i in range(rows))
    if not names or len(names) != rows:
        problem = "gives no names" if not names else f"names {len(names)}"
        raise UserError(
            f"{evaluated.directory}: the head has {rows} classes and the run {problem}: name the run, not its model/"
        )
    return tuple(str(name) for name in names)


def readout_position(evaluated: EvaluatedModel) -> Readout:
    """Return the position whose state the head reads: that of the run's recipe, else the default of the architecture.

    Raises:
        UserError: The classifier is not of firth and reads a position that firth does not support: after a text read
            bidirectionally (XLNet), or after a text repeated in the decoder (T5, BART).
    """
    position: Any = evaluated.objective.get("position", "auto")
    config = evaluated.model.config
    ours = bool(evaluated.objective) or "recipe" in load_save.metadata_of(evaluated.model_directory)
    if not ours and (config.encoder.num_layers or config.position.type == "xlnet"):
        raise UserError(
            f"{evaluated.directory}: this classifier was not trained by firth and reads its label from a position after the "
            f"text, which firth does not support: finetune it with firth (firth train classification init_from={evaluated.directory})"
        )
    return readout_of(config) if position == "auto" else position


def objective(evaluated: EvaluatedModel, items: Records) -> Classification:
    """Return the objective that reads the head."""
    return Classification(class_names=items.classes, position=readout_position(evaluated))


def respond(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return the gold class and the class with the highest score of each text, "" for a tie."""
    found = list(HEAD.outputs(evaluated, items, progress))
    names = items.classes
    return [names[int(label)] for label, _ in found], [most_likely(names, scores.tolist()) for _, scores in found]


def extra_metrics(items: Records) -> Mapping[str, MetricFunction]:
    """Return the F1 of the second of two classes, as in GLUE; nothing for more classes."""
    if len(items.classes) != 2:
        return {}
    name = items.classes[1]
    return {"f1": lambda gold, found: metrics.f1(np.asarray(gold) == name, np.asarray(found) == name)}


def input_schema(evaluated: EvaluatedModel) -> InputSchema:
    """Return the schema of one text per record, which may be a line, or of two texts."""
    fields = LabeledConfig.of(evaluated.examples)

    def line(text: str) -> dict[str, Any]:
        if fields.text_pair_field:
            raise UserError("this task reads two texts per record, which lines of text cannot give: give JSON lines")
        return {fields.text_field: text}

    def texts(record: dict[str, Any]) -> Sequence[Any]:
        return [record.get(name) for name in fields.read_fields]

    return InputSchema(fields.text_field, line, texts, fields.column_names)


def form(evaluated: EvaluatedModel) -> list[FormField]:
    """Return the fields of one text, or of two."""
    names = LabeledConfig.of(evaluated.examples).read_fields
    labels = ["Text"] if len(names) == 1 else ["First text", "Second text"]
    return [FormField(name, label) for name, label in zip(names, labels, strict=True)]


def rows(evaluated: EvaluatedModel, items: Records, outputs: Iterator[HeadOutput]) -> Iterator[dict[str, Any]]:
    """Yield {"label", "probability", "probabilities": class -> probability} for each text."""
    for _, scores in outputs:
        shares = [round(float(share), 6) for share in softmax(scores)]
        best = int(np.argmax(shares))
        by_class = dict(zip(items.classes, shares, strict=True))
        yield {"label": items.classes[best], "probability": shares[best], "probabilities": by_class}


HEAD = HeadTask("classes", objective, rows)
CLASSIFICATION = Task(
    "classification",
    load,
    respond,
    {"accuracy": metrics.accuracy, "macro_f1": metrics.macro_f1, "matthews": metrics.matthews},
    majority_baseline=True,
    predict=HEAD.predict,
    input_schema=input_schema,
    route="classify",
    form=form,
    head=HEAD,
    extra_metrics=extra_metrics,
)
