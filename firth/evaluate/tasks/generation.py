"""Answers: the model writes, greedily, and what it wrote is compared with what is right (closed-book questions, SQuAD).

Records are those of dialogues and of text to text ({"prompt", "completion"}, {"messages"}, ...), read as in finetuning, with the
forms of the run's recipe; a line of text is a prompt, or the one field of which the recipe's form makes one.

    encoder-decoders               the prompt goes to the encoder
    decoders, tuned on dialogues   the tokenizer's chat template writes the prompt, and the answer ends with its turn
    other decoders                 the prompt is running text, and the answer ends with its line

Exact match and F1 are SQuAD's, after its normalization, as is the score of the commonest right answer alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from firth.data.completion_prompts import CompletionPrompts
from firth.data.records import Seq2SeqRecords
from firth.data.templates import field_names
from firth.data.text_prompts import TextPrompts
from firth.evaluate import metrics
from firth.evaluate.prediction_inputs import InputSchema
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task
from firth.evaluate.text_perplexity import leading, reads_of
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.generate.streaming import Completion
from firth.types import UserError

AT_ONCE = 256
LONGEST = 64
"""Tokens: how long an answer is waited for, at least; a longer right answer is given its own length."""
LONGEST_TURN = 256
"""Tokens: how long the answer of a decoder is waited for where no right answer is known."""


def source(evaluated: EvaluatedModel, paths: Sequence[str], asked: bool = True) -> Seq2SeqRecords:
    """The questions of the files, as the model reads them; UserError for a model that does not write."""
    config = evaluated.model.config
    if not writes_answers(evaluated):
        raise UserError(
            f"{evaluated.directory}: this model does not write answers: finetune one that does (firth train sft, or "
            "text_to_text)"
        )
    if config.num_encoder_layers:
        kind = Seq2SeqRecords if asked else CompletionPrompts
        return kind(paths, evaluated.tokenizer, evaluated.context, forms=forms(evaluated))
    bos, _ = (None, False) if config.prefix_lm else leading(evaluated.model_directory, evaluated.tokenizer)
    return TextPrompts(
        paths, evaluated.tokenizer, evaluated.model.context, forms=forms(evaluated), dialogue=evaluated.is_chat_model,
        begin=() if bos is None else (bos,), answered=asked,
    )  # fmt: skip


def writes_answers(evaluated: EvaluatedModel) -> bool:
    """Whether a model writes from left to right, behind a prompt."""
    config = evaluated.model.config
    return evaluated.model.has_lm_head and not config.latent_size and reads_of(config) != "masked"


def forms(evaluated: EvaluatedModel) -> tuple[str, str]:
    """How a prompt and an answer are made of a record's fields, as the run's recipe says."""
    return evaluated.examples.get("prompt_template", ""), evaluated.examples.get("completion_template", "")


def completions(
    evaluated: EvaluatedModel, items: Seq2SeqRecords, longest: int, progress: Progress
) -> Iterator[Completion]:
    """What the model writes to each prompt, greedily and of at most `longest` tokens; nothing where there is no room."""
    engine = Engine(evaluated.model, evaluated.tokenizer)
    running = not evaluated.model.config.num_encoder_layers and not evaluated.is_chat_model
    greedy = Sampling(
        temperature=0, max_new_tokens=min(longest, evaluated.model.context), stop_strings=("\n",) if running else ()
    )
    for first in range(0, len(items), AT_ONCE):
        some = [items[i]["source"] for i in range(first, min(first + AT_ONCE, len(items)))]
        written = iter(engine.generate([prompt for prompt in some if engine.room(prompt)], greedy))
        yield from (next(written) if engine.room(prompt) else NOTHING for prompt in some)
        progress(min(first + AT_ONCE, len(items)) / len(items))


NOTHING = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), "", "context")
"""The answer to a prompt that leaves no room for one."""


def answer(evaluated: EvaluatedModel, items: Seq2SeqRecords, progress: Progress, longest: int = LONGEST) -> Answers:
    """What is right and what the model writes, as text."""
    targets = [items[i]["target"] for i in range(len(items))]
    longest = max(longest, *(len(target) + 1 for target in targets))
    right = [evaluated.tokenizer.decode(target) for target in targets]
    return right, [written.text.strip() for written in completions(evaluated, items, longest, progress)]


def wanted(evaluated: EvaluatedModel) -> InputSchema:
    """A prompt, or the fields of which the form of one is made."""
    form, _ = forms(evaluated)
    fields = field_names(form) if form else ["prompt"]

    def line(text: str) -> dict[str, Any]:
        if len(fields) != 1:
            raise UserError(
                f"a prompt is made of {', '.join(fields) or 'no field'} here, so lines of text do not say which: give JSON lines"
            )
        return {fields[0]: text}

    return InputSchema(
        fields[0] if fields else "", line, lambda record: [record.get(name) for name in fields] or [None]
    )


def tell(evaluated: EvaluatedModel, items: Seq2SeqRecords, progress: Progress) -> Iterator[dict[str, Any]]:
    """{"answer", "probability": of its tokens together, "finish": "stop", or "length" or "context" where it was not at its end}."""
    longest = LONGEST if evaluated.model.config.num_encoder_layers else LONGEST_TURN
    for found in completions(evaluated, items, int(evaluated.examples.get("max_target_length", longest)), progress):
        chance = round(float(np.exp(found.logprobs.sum(dtype=np.float64))), 6) if len(found.tokens) else 0.0
        yield {"answer": found.text.strip(), "probability": chance, "finish": found.finish}


def f1(right: Sequence[str], written: Sequence[str]) -> float:
    """The mean of SQuAD's F1 over the words of each answer."""
    return metrics.mean([metrics.squad([text], one)[1] for text, one in zip(right, written, strict=True)])


GENERATION = Task(
    "answers",
    source,
    answer,
    {"exact_match": metrics.exact_match, "f1": f1},
    majority_baseline=True,
    predict=tell,
    input_schema=wanted,
)
