"""Multiple choice by likelihood: records {"prompt", "options", "answer"}; the option that the model finds likeliest.

Prompt and option are tokenized together and cut apart after the prompt's own length, so that the option begins as it
would in running text; blanks at the prompt's end go to the option (both as the lm-evaluation-harness does, whose
`acc` this is).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from firth.evaluate import metrics
from firth.evaluate.task import Progress, Question, Record, Subject, Task, likeliest
from firth.evaluate.text import leading, reads_of
from firth.generate.engine import Engine
from firth.text.read import records, text_field
from firth.types import UserError


def prompt(record: Record) -> Question:
    """{"prompt": "2 + 2 =", "options": ["3", "4"], "answer": 1}; the answer is an option or its place, from 0."""
    text = text_field(dict(record), "prompt", "this record")
    options, right = record.get("options"), record.get("answer")
    if not isinstance(options, list) or len(options) < 2:
        raise UserError("the field 'options' holds no list of two or more")
    told = [str(option) for option in options]
    place = right if isinstance(right, int) else told.index(str(right)) if str(right) in told else -1
    if not 0 <= place < len(told):
        raise UserError(f"the answer {right!r} is neither one of the options nor the place of one")
    return Question(text, told[place], tuple(told))


def cut(subject: Subject, text: str, option: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the prompt and of the option as it follows the prompt, with one blank between them."""
    text, blank = text.rstrip(), text[len(text.rstrip()) :]
    whole = subject.tokenizer.encode(text + (blank or " ") + option.lstrip())
    before = len(subject.tokenizer.encode(text))
    return whole[:before], whole[before:]


def answer(subject: Subject, questions: Sequence[Question], progress: Progress) -> list[str]:
    """The likeliest option of each question, "" for a tie."""
    reads = reads_of(subject.model.shape)
    if reads == "masked" or "lm" not in subject.model.parts:
        raise UserError(f"{subject.directory}: this model writes no text, so no option follows a prompt: use a decoder")
    engine = Engine(subject.model, subject.tokenizer)
    bos = leading(subject.place, subject.tokenizer) if reads == "causal" else None
    head = [] if bos is None else [bos]
    tail = [subject.vocab.eos] if reads == "halves" else []
    said = []
    for done, question in enumerate(questions, 1):
        pairs = [cut(subject, str(question.prompt), option) for option in question.options]
        prompts = [np.concatenate((head, before, tail)).astype(np.int32) for before, _ in pairs]
        scores = engine.score(prompts, [after for _, after in pairs])
        said.append(likeliest(question.options, scores))
        progress(done / len(questions))
    return said


CHOICES = Task("choices", records, prompt, answer, {"accuracy": metrics.accuracy})
