"""Classification: labelled records through the head that a finetuned run has for its classes.

Records are read and shown exactly as in training (`firth.data.records.Labelled`, the objective's own view), so this is
the accuracy that training logged, with what one number hides beside it: macro-F1, Matthews' correlation, intervals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np

from firth.data.batch import collate
from firth.data.records import Labelled
from firth.evaluate import metrics
from firth.evaluate.likelihood import groups
from firth.evaluate.task import Answers, Progress, Subject, Task, likeliest
from firth.generate.rows import reading
from firth.model.parts import answered, described
from firth.objectives.classification import Classification, Place, place
from firth.objectives.mixed import Mixed
from firth.objectives.objective import Objective, asked
from firth.types import Example, UserError


def source(subject: Subject, paths: Sequence[str]) -> Labelled:
    """The records of the files, read with the fields and the length of the run's recipe if it has one."""
    if "classes" not in subject.model.parts:
        raise UserError(
            f"{subject.directory}: this model has no head for classes: finetune it with `firth train classify`"
        )
    told = subject.segment
    return Labelled(
        paths,
        subject.tokenizer,
        subject.context,
        text=told.get("text", "text"),
        label=told.get("label", "label"),
        pair=told.get("pair", ""),
        classes=class_names(subject),
    )


def class_names(subject: Subject) -> tuple[str, ...]:
    """The classes in the order of the head's rows: of the model's facts, else of the run's recipe.

    Raises UserError where neither says, or not as many as the head has rows.
    """
    facts = subject.place / "firth.json"
    said = json.loads(facts.read_text("utf-8"))["facts"].get("classes") if facts.exists() else None
    objective = subject.recipe.get("objective")
    if said is None and isinstance(objective, dict):
        said = objective.get("classes")
    rows = answered(described(subject.model.parts["classes"]))
    if said is None or len(said) != rows:
        there = "says no names" if said is None else f"names {len(said)}"
        raise UserError(
            f"{subject.directory}: the head has {rows} classes and the run {there}: name the run, not its model/"
        )
    return tuple(str(name) for name in said)


def where(subject: Subject) -> Place:
    """Where the class is read: as the run's recipe says, else as suits the shape."""
    told = subject.recipe.get("objective")
    said = told.get("at") if isinstance(told, dict) else None
    return place(subject.model.shape) if said is None else said


def answer(subject: Subject, items: Labelled, progress: Progress) -> Answers:
    """The class that the head gives the highest score, "" for a tie."""
    objective: Objective = Classification(classes=items.classes, at=where(subject))
    if "mixture" in subject.model.parts:
        objective = Mixed() + objective
    rng = np.random.default_rng(0)  # the view draws nothing

    def shown() -> Iterator[Example]:
        for i in range(len(items)):
            yield objective.view(items[i], subject.vocab, rng)

    right: list[str] = []
    said: list[str] = []
    with reading(subject.model):
        for group in groups(shown(), room=8192):
            batch = {n: x.to(subject.device) for n, x in collate(group, set(objective.targets.values())).items()}
            states, labels = asked(objective.run(subject.model, batch)["hidden"], batch["class"])
            scores = subject.model.parts["classes"](states).float().cpu().numpy()
            said += [likeliest(items.classes, row) for row in scores]
            right += [items.classes[int(label)] for label in labels]
            progress(len(said) / len(items))
    return right, said


CLASSIFICATION = Task(
    "classification",
    source,
    answer,
    {"accuracy": metrics.accuracy, "macro_f1": metrics.macro_f1, "matthews": metrics.matthews},
    commonest=True,
)
