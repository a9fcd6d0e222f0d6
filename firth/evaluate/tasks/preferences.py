"""Preferences: how often a reward model scores the chosen answer above the rejected one; a tie is wrong.

The calibration error compares sigma(difference of the rewards), the probability that the higher reward is the better answer
(Bradley & Terry 1952), with how often it is.

Dialogues are read and encoded as in training (`firth.data.dialogues.PreferencesConfig`), up to the last token of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from firth.data.collate import collate
from firth.data.dialogues import PreferencesConfig
from firth.data.records import Records
from firth.evaluate import metrics
from firth.evaluate.perplexity import groups
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task, most_likely
from firth.generate.decoding_batch import inference_mode
from firth.objectives.reward_model import answer_row, rewards
from firth.types import Example, UserError

SIDES = ("chosen", "rejected")


def load(evaluated: EvaluatedModel, paths: Sequence[str]) -> Records:
    """Load the preference pairs whose two answers both fit into a row."""
    if "reward" not in evaluated.model.heads:
        raise UserError(
            f"{evaluated.directory}: this model has no reward head: train one with `firth train reward_model`"
        )
    return evaluated.records(PreferencesConfig, paths)


def respond(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return "chosen", the side with the higher reward of each pair ("" for a tie), and the probability of that side."""

    def build_examples() -> Iterator[Example]:
        for i in range(len(items)):
            pair = items[i]
            for side in SIDES:
                yield answer_row(pair[f"{side}_tokens"], pair[f"{side}_mask"])

    scores: list[float] = []
    with inference_mode(evaluated.model):
        for group in groups(build_examples(), max_tokens=8192):
            batch = {name: x.to(evaluated.device) for name, x in collate(group).items()}
            scores += rewards(evaluated.model, evaluated.model(batch), batch).tolist()
            progress(len(scores) / (2 * len(items)))
    preferred = [most_likely(SIDES, pair) for pair in zip(scores[::2], scores[1::2], strict=True)]
    margins = np.abs(np.subtract(scores[::2], scores[1::2]))
    return ["chosen"] * len(preferred), preferred, (1 / (1 + np.exp(-margins))).tolist()


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
)
