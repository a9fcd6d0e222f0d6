"""Classification: records {"text", "label"} through the head that a finetuned run has for its classes.

The text is framed and shown exactly as the training objective shows it, so this is the accuracy that training logged,
with what a single number hides beside it: macro-F1, Matthews' correlation and their intervals.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import yaml

from firth.data.batch import collate
from firth.evaluate import metrics
from firth.evaluate.likelihood import groups
from firth.evaluate.task import Progress, Question, Record, Subject, Task, likeliest
from firth.evaluate.text import reads_of
from firth.generate.rows import reading
from firth.objectives.classification import Classification
from firth.objectives.objective import asked
from firth.text.read import records, text_field
from firth.types import Example, UserError


def prompt(record: Record) -> Question:
    """{"text": "To be or not to be", "label": "verse"}; a label may be a number."""
    if "label" not in record:
        raise UserError(f"there is no field 'label'; it has {', '.join(record) or 'none'}")
    return Question(text_field(dict(record), "text", "this record"), str(record["label"]))


def class_names(subject: Subject) -> tuple[str, ...]:
    """The classes in the order of the head's rows: of the model's facts, else of the run's recipe.

    Raises UserError where neither says, or not as many as the head has rows.
    """
    facts = subject.place / "firth.json"
    recipe = subject.directory / "recipe.yaml"
    said = json.loads(facts.read_text("utf-8"))["facts"].get("classes") if facts.exists() else None
    if said is None and recipe.exists():
        said = (yaml.safe_load(recipe.read_text("utf-8")) or {}).get("objective", {}).get("classes")
    rows = subject.model.parts["classes"].out_features
    if said is None or len(said) != rows:
        there = "says no names" if said is None else f"names {len(said)}"
        raise UserError(f"{subject.directory}: the head has {rows} classes and the run {there}: train it again")
    return tuple(str(name) for name in said)


def answer(subject: Subject, questions: Sequence[Question], progress: Progress) -> list[str]:
    """The class that the head gives the highest score, "" for a tie."""
    if "classes" not in subject.model.parts:
        raise UserError(
            f"{subject.directory}: this model has no head for classes: finetune it with `firth train classify`"
        )
    names = class_names(subject)
    unknown = sorted({q.answer for q in questions} - set(names))
    if unknown:
        raise UserError(f"the label {unknown[0]!r} is none of the classes that this run knows: {', '.join(names)}")
    both_ways = reads_of(subject.model.shape) == "masked"
    objective = Classification(classes=names, at="first" if both_ways else "last")
    rng = np.random.default_rng(0)  # the view draws nothing

    def shown() -> Iterator[Example]:
        for question in questions:
            label = names.index(question.answer)
            yield objective.view({"tokens": encoded(subject, str(question.prompt)), "label": label}, subject.vocab, rng)

    said: list[str] = []
    with reading(subject.model):
        for group in groups(shown(), room=8192):
            batch = {n: x.to(subject.device) for n, x in collate(group, set(objective.targets.values())).items()}
            states, _ = asked(objective.run(subject.model, batch)["hidden"], batch["class"])
            scores = subject.model.parts["classes"](states).float().cpu().numpy()
            said += [likeliest(names, row) for row in scores]
            progress(len(said) / len(questions))
    return said


def encoded(subject: Subject, text: str) -> np.ndarray:
    """The text as training framed it, cut to the context at its end."""
    tokens = subject.tokenizer.encode(text)
    return subject.vocab.frame(tokens[: subject.model.shape.context - 2])


CLASSIFICATION = Task(
    "classification",
    records,
    prompt,
    answer,
    {"accuracy": metrics.accuracy, "macro_f1": metrics.macro_f1, "matthews": metrics.matthews},
)
