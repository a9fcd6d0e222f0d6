"""Multiple choice by likelihood: records {"prompt", "options", "answer"}; the option that the model finds likeliest.

Prompt and option are tokenized together and cut apart after the prompt's own length, so that the option begins as it
would in running text; blanks at the prompt's end go to the option (both as the lm-evaluation-harness does, whose
`acc` this is).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from firth.corpora.readers import records, text_field
from firth.evaluate import metrics
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task, most_likely
from firth.evaluate.text_perplexity import leading, reads_of
from firth.generate.engine import Engine
from firth.types import UserError


@dataclass(frozen=True)
class Question:
    """One item: what stands before the options, the options, and which of them is right."""

    prompt: str
    options: tuple[str, ...]
    right: str


def source(evaluated: EvaluatedModel, paths: Sequence[str]) -> list[Question]:
    """The questions of the files; UserError with the file and line of a record that is none."""
    if reads_of(evaluated.model.config) == "masked" or not evaluated.model.has_lm_head:
        raise UserError(
            f"{evaluated.directory}: this model writes no text, so no option follows a prompt: use a decoder"
        )
    return [question(record, place) for place, record in records(paths)]


def question(record: Mapping[str, Any], place: str) -> Question:
    """{"prompt": "2 + 2 =", "options": ["3", "4"], "answer": 1}; the answer is an option or its place, from 0."""
    text = text_field(dict(record), "prompt", place)
    options, right = record.get("options"), record.get("answer")
    if not isinstance(options, list) or len(options) < 2:
        raise UserError(f"{place}: the field 'options' holds no list of two or more")
    told = [str(option) for option in options]
    at = right if isinstance(right, int) else told.index(str(right)) if str(right) in told else -1
    if not 0 <= at < len(told):
        raise UserError(f"{place}: the answer {right!r} is neither one of the options nor the place of one")
    return Question(text, tuple(told), told[at])


def cut(evaluated: EvaluatedModel, text: str, option: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of the prompt and of the option as it follows the prompt, with one blank between them."""
    text, blank = text.rstrip(), text[len(text.rstrip()) :]
    whole = evaluated.tokenizer.encode(text + (blank or " ") + option.lstrip())
    before = len(evaluated.tokenizer.encode(text))
    return whole[:before], whole[before:]


def answer(evaluated: EvaluatedModel, items: Sequence[Question], progress: Progress) -> Answers:
    """The likeliest option of each question, "" for a tie."""
    engine = Engine(evaluated.model, evaluated.tokenizer)
    encoder = evaluated.model.config.num_encoder_layers > 0
    bos, _ = (None, False) if encoder else leading(evaluated.model_directory, evaluated.tokenizer)
    head = [] if bos is None else [bos]
    tail = [evaluated.vocab.eos] if encoder else []
    said = []
    for done, item in enumerate(items, 1):
        pairs = [cut(evaluated, item.prompt, option) for option in item.options]
        prompts = [np.concatenate((head, before, tail)).astype(np.int32) for before, _ in pairs]
        said.append(most_likely(item.options, engine.score(prompts, [after for _, after in pairs])))
        progress(done / len(items))
    return [item.right for item in items], said


OPTION_SCORING = Task("choices", source, answer, {"accuracy": metrics.accuracy}, notes=lambda items: ())
