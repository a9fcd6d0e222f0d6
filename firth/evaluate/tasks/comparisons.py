"""Comparisons: records {"prompt", "chosen", "rejected"}; how often a reward model prefers what was chosen.

The dialogue is encoded as training encodes it, and read at the last token of the answer. A tie is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from firth.data.batch import collate
from firth.evaluate import metrics
from firth.evaluate.likelihood import groups
from firth.evaluate.task import Progress, Question, Record, Subject, Task, likeliest
from firth.generate.rows import reading
from firth.objectives.reward import rewards, whole
from firth.text import chat
from firth.text.read import records
from firth.types import Example, UserError


def prompt(record: Record) -> Question:
    """{"prompt": "Hail!", "chosen": "Well met.", "rejected": "No."}, each a string or a list of messages."""
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in record]
    if missing:
        raise UserError(f"there is no field {missing[0]!r}; it has {', '.join(record) or 'none'}")
    asked = chat.prompt_of(record["prompt"])
    dialogues = tuple((*asked, *chat.answer_of(record[name])) for name in ("chosen", "rejected"))
    return Question(asked[-1]["content"] if asked else "", "chosen", ("chosen", "rejected"), dialogues)


def answer(subject: Subject, questions: Sequence[Question], progress: Progress) -> list[str]:
    """Which of the two has the higher reward, "" for a tie."""
    if "reward" not in subject.model.parts:
        raise UserError(f"{subject.directory}: this model has no reward head: train one with `firth train reward`")

    def rows() -> Iterator[Example]:
        for question in questions:
            for dialogue in question.dialogues:
                yield whole(*chat.encode(subject.tokenizer, dialogue))

    scores: list[float] = []
    with reading(subject.model):
        for group in groups(rows(), room=8192):
            batch = {name: x.to(subject.device) for name, x in collate(group).items()}
            scores += rewards(subject.model, subject.model(batch), batch).tolist()
            progress(len(scores) / (2 * len(questions)))
    pairs = zip(scores[::2], scores[1::2], strict=True)
    return [likeliest(q.options, pair) for q, pair in zip(questions, pairs, strict=True)]


COMPARISONS = Task("comparisons", records, prompt, answer, {"accuracy": metrics.accuracy})
