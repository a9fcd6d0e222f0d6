"""Comparisons: preferences in records; how often a reward model prefers what was chosen. A tie is wrong.

Dialogues are read and encoded as in training (`firth.data.records.Preferences`), up to the last token of the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from firth.data.collate import collate
from firth.data.records import Preferences
from firth.evaluate import metrics
from firth.evaluate.perplexity import groups
from firth.evaluate.task import Answers, Progress, Subject, Task, likeliest
from firth.generate.decoding import reading
from firth.objectives.reward_model import rewards, whole
from firth.types import Example, UserError

SIDES = ("chosen", "rejected")


def source(subject: Subject, paths: Sequence[str]) -> Preferences:
    """The comparisons of the files, as far as both answers have a place in a row."""
    if "reward" not in subject.model.parts:
        raise UserError(f"{subject.directory}: this model has no reward head: train one with `firth train reward`")
    return Preferences(paths, subject.tokenizer, subject.context)


def answer(subject: Subject, items: Preferences, progress: Progress) -> Answers:
    """Which of the two has the higher reward, "" for a tie."""

    def shown() -> Iterator[Example]:
        for i in range(len(items)):
            pair = items[i]
            for side in SIDES:
                yield whole(pair[f"{side}_tokens"], pair[f"{side}_mask"])

    scores: list[float] = []
    with reading(subject.model):
        for group in groups(shown(), room=8192):
            batch = {name: x.to(subject.device) for name, x in collate(group).items()}
            scores += rewards(subject.model, subject.model(batch), batch).tolist()
            progress(len(scores) / (2 * len(items)))
    said = [likeliest(SIDES, pair) for pair in zip(scores[::2], scores[1::2], strict=True)]
    return ["chosen"] * len(said), said


COMPARISONS = Task("comparisons", source, answer, {"accuracy": metrics.accuracy})
