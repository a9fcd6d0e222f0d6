"""What a model that begins from nothing is given before its first step: the frequencies of the answers it will be asked."""

from __future__ import annotations

import torch

from firth.data.batch import Batches
from firth.model import unigram
from firth.model.lm import LM
from firth.objectives.objective import Objective, asked
from firth.train.validate import to
from firth.types import IGNORE, Batch

ANSWERS, STEPS = 500_000, 256
"""Answers that are counted, and the most steps that are looked at for them."""

LABELS = "labels"
"""The field of answers that are tokens."""


def begin(model: LM, objective: Objective, batches: Batches) -> int:
    """Let the model predict each token with its frequency among the answers of the first steps.

    Returns how many answers were counted; 0 where nothing is to be done: an objective that asks no tokens, or a head
    that has no place for it (`firth.model.unigram`). A pure function of the run's seed.
    """
    writer = objective.writer(model)
    if LABELS not in objective.targets.values() or "lm" not in writer.parts:
        return 0
    counts = torch.zeros(model.shape.vocab)
    first: list[Batch] = []
    for step in range(STEPS):
        here = batches.batches(step)
        first = first or here
        for batch in here:
            labels = batch[LABELS]
            counts += torch.bincount(labels[labels != IGNORE], minlength=len(counts))
        if counts.sum() >= ANSWERS:
            break
    example = to(first[0], next(model.parameters()).device)

    def read() -> torch.Tensor:
        hidden = objective.run(model, example)["hidden"] if writer is model else writer(example)
        return asked(hidden, example[LABELS])[0]

    return int(counts.sum()) if unigram.begin(writer, counts, read) else 0
