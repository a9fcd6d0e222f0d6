"""What a model that begins from nothing is given before its first step: the frequencies of the answers it will be asked."""

from __future__ import annotations

import torch

from firth.data.collate import Batches
from firth.model import init
from firth.model.model import LM
from firth.objectives.objective import Objective, supervised
from firth.train.validate import to
from firth.types import IGNORE

ANSWERS, STEPS = 500_000, 256
"""Answers that are counted, and the most steps that are looked at for them."""

EXAMPLES = 64
"""Most examples of the first step on which the hidden states are read: as many as one CPU pass holds."""

LABELS = "labels"
"""The field of answers that are tokens."""


def init_head(model: LM, objective: Objective, batches: Batches) -> int:
    """Initialize the LM head so that an untrained model predicts the label frequencies of the first steps.

    Whole steps are counted, not the share of this rank or its first micro-batch, so the result is a function of the recipe
    and the data: it is the same on any number of ranks and for any `accumulate`. Every rank builds the same examples,
    which takes as long as on one rank.

    Args:
        model: The model, with random weights.
        objective: What it is trained on.
        batches: The batches of the run.

    Returns:
        How many answers were counted; 0 where nothing is done: an objective without token labels, or a head that has no
        place for the frequencies (`firth.model.init`).
    """
    writer = objective.lm_model(model)
    if LABELS not in objective.labels.values() or "lm" not in writer.heads:
        return 0
    counts = torch.zeros(model.config.vocab_size)
    for step in range(STEPS):
        labels = batches.batch(step, 0, batches.batch_size)[LABELS]
        counts += torch.bincount(labels[labels != IGNORE], minlength=len(counts))
        if counts.sum() >= ANSWERS:
            break
    example = to(batches.batch(0, 0, min(batches.batch_size, EXAMPLES)), next(model.parameters()).device)

    def read() -> torch.Tensor:
        hidden = objective.forward(model, example)["hidden"] if writer is model else writer(example)
        return supervised(hidden, example[LABELS])[0]

    return int(counts.sum()) if init.init_head_from_frequencies(writer, counts, read) else 0
