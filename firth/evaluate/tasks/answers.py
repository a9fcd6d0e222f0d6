"""Answers: the model writes, greedily, and what it wrote is compared with what is right (closed-book questions, SQuAD).

Records are those of text to text ({"prompt", "completion"}), read as in finetuning. Exact match is after SQuAD's
normalisation; what the commonest right answer alone would get stands beside it.
"""

from __future__ import annotations

from collections.abc import Sequence

from firth.data.records import Prompted
from firth.evaluate import metrics
from firth.evaluate.task import Answers, Progress, Subject, Task
from firth.generate.engine import Engine
from firth.generate.sample import Sampling
from firth.types import UserError

AT_ONCE = 256
LONGEST = 64
"""Tokens: the longest answer that is waited for."""


def source(subject: Subject, paths: Sequence[str]) -> Prompted:
    """The questions of the files; UserError for a model that has no encoder to read them."""
    if not subject.model.shape.encoder or "lm" not in subject.model.parts:
        raise UserError(
            f"{subject.directory}: questions are asked of an encoder-decoder that writes: finetune one first"
        )
    forms = subject.segment.get("prompt", ""), subject.segment.get("answer_is", "")
    return Prompted(paths, subject.tokenizer, subject.context, forms=forms)


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


ANSWERS = Task("answers", source, answer, {"exact_match": metrics.exact_match}, commonest=True)
