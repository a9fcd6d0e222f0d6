"""Preferences: how often a reward model scores the chosen answer above the rejected one; a tie is wrong.

The calibration error compares sigma(difference of the rewards), the probability that the higher reward is the better answer
(Bradley & Terry 1952), with how often it is.

Dialogues are read and encoded as in training (`firth.data.dialogues.PreferencesConfig`), up to the last token of the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from firth.data.collate import collate
from firth.data.dialogues import PreferencesConfig
from firth.data.records import Records
from firth.evaluate import metrics
from firth.evaluate.heads import MAX_BATCH_TOKENS
from firth.evaluate.perplexity import groups
from firth.evaluate.prediction_inputs import FormField
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task, most_likely
from firth.generate.decoding_batch import inference_mode
from firth.generate.slices import Slices, can_read_in_chunks, read_in_chunks
from firth.objectives.reward_model import answer_row, rewards
from firth.tokenizer.chat import Message, encode
from firth.types import Example, UserError

SIDES = ("chosen", "rejected")


def load(evaluated: EvaluatedModel, paths: Sequence[str]) -> Records:
    """Load the preference pairs whose two answers both fit into a row."""
    check_reward_head(evaluated)
    return evaluated.records(PreferencesConfig, paths)


def check_reward_head(evaluated: EvaluatedModel) -> None:
    """Raise a UserError if a model has no reward head."""
    if "reward" not in evaluated.model.heads:
        raise UserError(
            f"{evaluated.directory}: this model has no reward head: train one with `firth train reward_model`"
        )


def respond(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return "chosen", the side with the higher reward of each pair ("" for a tie), and the probability of that side."""

    def build_examples() -> Iterator[Example]:
        for i in range(len(items)):
            pair = items[i]
            for side in SIDES:
                yield answer_row(pair[f"{side}_tokens"], pair[f"{side}_mask"])

    scores: list[float] = []
    for found in row_rewards(evaluated, build_examples()):
        scores += found
        progress(len(scores) / (2 * len(items)))
    preferred = [most_likely(SIDES, pair) for pair in zip(scores[::2], scores[1::2], strict=True)]
    margins = np.abs(np.subtract(scores[::2], scores[1::2]))
    return ["chosen"] * len(preferred), preferred, (1 / (1 + np.exp(-margins))).tolist()


def row_rewards(evaluated: EvaluatedModel, rows: Iterable[Example]) -> Iterator[list[float]]:
    """Yield the rewards of rows (`answer_row`), in order and in batches."""
    with inference_mode(evaluated.model):
        for group in groups(rows, MAX_BATCH_TOKENS):
            batch = {name: x.to(evaluated.device) for name, x in collate(group).items()}
            yield rewards(evaluated.model, evaluated.model(batch), batch).tolist()


def dialogue_rewards(
    evaluated: EvaluatedModel, dialogues: Sequence[Sequence[Message]], max_tokens: int = MAX_BATCH_TOKENS
) -> Slices[list[float]]:
    """Return the reward of the last answer of each dialogue, in slices of a forward pass.

    Args:
        evaluated: The model.
        dialogues: The dialogues.
        max_tokens: Most padded tokens of a forward pass. A longer dialogue is a pass of its own, unless a decoder reads it, in
            chunks.

    Raises:
        UserError: The model has no reward head, or a dialogue has no answer or is longer than its context.
    """
    check_reward_head(evaluated)
    rows = []
    for i, messages in enumerate(dialogues):
        tokens, mask = encode(evaluated.tokenizer, messages)
        if not mask.any() or len(tokens) > evaluated.model.context:
            raise UserError(
                f"dialogue {i} has {len(tokens)} tokens, {int(mask.sum())} of them in answers: it needs an answer of the "
                f"assistant and at most {evaluated.model.context} tokens"
            )
        rows.append(answer_row(tokens, mask))
    model, found = evaluated.model, list[float]()
    with inference_mode(model):
        for group in groups(rows, max_tokens):
            batch = {name: x.to(evaluated.device) for name, x in collate(group).items()}
            if batch["tokens"].shape[-1] > max_tokens and can_read_in_chunks(model):  # one row: a group holds no more
                hidden = yield from read_in_chunks(model, batch | {"positions": batch["query_time"]}, max_tokens)
            else:
                hidden = model(batch)
            found += rewards(model, hidden, batch).tolist()
            yield
    return found


def form(evaluated: EvaluatedModel) -> list[FormField]:
    """Return the fields of a prompt and the answer that is rated."""
    return [FormField("prompt", "Prompt"), FormField("completion", "Answer")]


PREFERENCES = Task(
    "preferences",
    load,
    respond,
    {
        "accuracy": lambda gold, preferred, _: metrics.accuracy(gold, preferred),
        "calibration_error": lambda gold, preferred, p: metrics.calibration_error(
            p, np.asarray(gold) == np.asarray(preferred)
        ),
    },
    route="reward",
    form=form,
)
