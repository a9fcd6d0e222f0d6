"""Multiple choice by log-likelihood: of records {"prompt", "options", "answer"}, the most likely option is predicted.

Prompt and option are tokenized together and split after the prompt's own length, so that the option is tokenized as in
running text; blanks at the end of the prompt go to the option. Both are as in lm-evaluation-harness, whose `acc` this is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from firth.corpora.readers import records, text_field
from firth.evaluate import metrics
from firth.evaluate.perplexity import leading_bos
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task, most_likely
from firth.generate.engine import Engine
from firth.generate.scoring import scoring_mode
from firth.types import UserError


@dataclass(frozen=True)
class Question:
    """One item.

    Args:
        prompt: Text before the options.
        options: The options.
        answer: The correct option.
    """

    prompt: str
    options: tuple[str, ...]
    answer: str


def load(evaluated: EvaluatedModel, paths: Sequence[str]) -> list[Question]:
    """Load questions; UserError with the file and line of an invalid record."""
    if scoring_mode(evaluated.model.config) == "masked" or not evaluated.model.has_lm_head:
        raise UserError(
            f"{evaluated.directory}: this model generates no text, so it cannot score options after a prompt: use a decoder"
        )
    return [question(record, location) for location, record in records(paths)]


def question(record: Mapping[str, Any], location: str) -> Question:
    """Parse a record such as {"prompt": "2 + 2 =", "options": ["3", "4"], "answer": 1}.

    Args:
        record: The record; its answer is an option or the index of one, from 0.
        location: File and line, for error messages.
    """
    text = text_field(dict(record), "prompt", location)
    options, answer = record.get("options"), record.get("answer")
    if not isinstance(options, list) or len(options) < 2:
        raise UserError(f"{location}: the field 'options' must be a list of two or more")
    texts = [str(option) for option in options]
    at = answer if isinstance(answer, int) else texts.index(str(answer)) if str(answer) in texts else -1
    if not 0 <= at < len(texts):
        raise UserError(f"{location}: the answer {answer!r} is neither one of the options nor the index of one")
    return Question(text, tuple(texts), texts[at])


def encode(evaluated: EvaluatedModel, text: str, option: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of the prompt, and of the option after the prompt and one blank."""
    text, blank = text.rstrip(), text[len(text.rstrip()) :]
    whole = evaluated.tokenizer.encode(text + (blank or " ") + option.lstrip())
    before = len(evaluated.tokenizer.encode(text))
    return whole[:before], whole[before:]


def respond(evaluated: EvaluatedModel, items: Sequence[Question], progress: Progress) -> Answers:
    """Return the gold option and the most likely option of each question, "" for a tie."""
    engine = Engine(evaluated.model, evaluated.tokenizer)
    encoder = evaluated.model.config.encoder.num_layers > 0
    bos, _ = (None, False) if encoder else leading_bos(evaluated.model_directory, evaluated.tokenizer)
    head = [] if bos is None else [bos]
    tail = [evaluated.vocab.eos] if encoder else []
    predicted = []
    for done, item in enumerate(items, 1):
        pairs = [encode(evaluated, item.prompt, option) for option in item.options]
        prompts = [np.concatenate((head, before, tail)).astype(np.int32) for before, _ in pairs]
        predicted.append(most_likely(item.options, engine.score(prompts, [after for _, after in pairs])))
        progress(done / len(items))
    return [item.answer for item in items], predicted


OPTION_SCORING = Task("option_scoring", load, respond, {"accuracy": metrics.accuracy})
