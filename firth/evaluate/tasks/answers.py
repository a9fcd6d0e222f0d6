"""Answers: the model writes, greedily, and what it wrote is compared with what is right (closed-book questions, SQuAD).

Records are those of text to text ({"prompt", "completion"}), read as in finetuning, with the forms of the run's recipe; a
line of text is a prompt, or the one field of which the recipe's form makes one. Exact match is after SQuAD's normalisation;
what the commonest right answer alone would get stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from firth.data.forms import field_names
from firth.data.records import Prompted
from firth.data.unanswered import Unanswered
from firth.evaluate import metrics
from firth.evaluate.given import Wanted
from firth.evaluate.task import Answers, Progress, Subject, Task
from firth.generate.engine import Engine
from firth.generate.sample import Sampling
from firth.types import UserError

AT_ONCE = 256
LONGEST = 64
"""Tokens: the longest answer that is waited for."""


def source(subject: Subject, paths: Sequence[str], asked: bool = True) -> Prompted:
    """The questions of the files; UserError for a model that has no encoder to read them."""
    if not subject.model.shape.encoder or "lm" not in subject.model.parts:
        raise UserError(
            f"{subject.directory}: questions are asked of an encoder-decoder that writes: finetune one first"
        )
    kind = Prompted if asked else Unanswered
    return kind(paths, subject.tokenizer, subject.context, forms=forms(subject))


def forms(subject: Subject) -> tuple[str, str]:
    """How a prompt and an answer are made of a record's fields, as the run's recipe says."""
    return subject.segment.get("prompt", ""), subject.segment.get("answer_is", "")


def answer(subject: Subject, items: Prompted, progress: Progress, longest: int = LONGEST) -> Answers:
    """What is right and what the model writes, of at most so many tokens, as text."""
    engine = Engine(subject.model, subject.tokenizer)
    greedy = Sampling(temperature=0, max_new=min(longest, subject.model.context))
    right: list[str] = []
    said: list[str] = []
    for first in range(0, len(items), AT_ONCE):
        some = [items[i] for i in range(first, min(first + AT_ONCE, len(items)))]
        right += [subject.tokenizer.decode(item["target"]) for item in some]
        said += [answered.text.strip() for answered in engine.generate([item["source"] for item in some], greedy)]
        progress(len(said) / len(items))
    return right, said


def wanted(subject: Subject) -> Wanted:
    """A prompt, or the fields of which the form of one is made."""
    form, _ = forms(subject)
    fields = field_names(form) if form else ["prompt"]

    def line(text: str) -> dict[str, Any]:
        if len(fields) != 1:
            raise UserError(
                f"a prompt is made of {', '.join(fields) or 'no field'} here, so lines of text do not say which: give JSON lines"
            )
        return {fields[0]: text}

    return Wanted(fields[0] if fields else "", line, lambda record: [record.get(name) for name in fields] or [None])


def tell(subject: Subject, items: Prompted, progress: Progress) -> Iterator[dict[str, Any]]:
    """{"answer", "probability": of its tokens together, "finish": "stop", or "length" where it was not at its end}."""
    engine = Engine(subject.model, subject.tokenizer)
    longest = int(subject.segment.get("answer", LONGEST))
    greedy = Sampling(temperature=0, max_new=min(longest, subject.model.context))
    for first in range(0, len(items), AT_ONCE):
        last = min(first + AT_ONCE, len(items))
        for found in engine.generate([items[i]["source"] for i in range(first, last)], greedy):
            chance = round(float(np.exp(found.logprobs.sum(dtype=np.float64))), 6)
            yield {"answer": found.text.strip(), "probability": chance, "finish": found.finish}
        progress(last / len(items))


ANSWERS = Task(
    "answers", source, answer, {"exact_match": metrics.exact_match}, commonest=True, tell=tell, wanted=wanted
)
