"""Initialize the LM head so that an untrained model predicts the label frequencies."""

from __future__ import annotations

import torch

from firth.data.collate import Batches
from firth.model import init
from firth.model.model import LM
from firth.objectives.objective import Objective, supervised
from firth.training.data_parallel import Parallel
from firth.training.step import SINGLE, to
from firth.types import IGNORE

MAX_LABELS, MAX_STEPS = 500_000, 256
"""Labels to count, and the most steps to read for them."""

EXAMPLES = 64
"""Most examples of the first step whose hidden states are computed: as many as one CPU pass holds."""

LABELS = "labels"
"""The batch field of token labels."""


def init_head(model: LM, objective: Objective, batches: Batches, parallel: Parallel = SINGLE) -> int:
    """Initialize the LM head so that an untrained model predicts the label frequencies of the first steps.

    Labels of whole steps are counted, not only those of this rank or its first micro-batch, so the result is the same for any
    number of ranks and of gradient accumulation steps. Every rank builds the same examples, which takes as long as on one rank.

    Args:
        model: The model, with random weights.
        objective: The training objective.
        batches: The batches of the run.
        parallel: Runs the forward pass on the ranks.

    Returns:
        The number of labels counted; 0 if nothing was initialized, because the objective has no token labels or the head has
        no place for an offset (`firth.model.init`).
    """
    writer = model.language_model
    if LABELS not in objective.labels.values() or "lm" not in writer.heads:
        return 0
    counts = torch.zeros(model.config.vocab_size)
    for step in range(MAX_STEPS):
        labels = batches.batch(step, 0, batches.batch_size)[LABELS]
        counts += torch.bincount(labels[labels != IGNORE], minlength=len(counts))
        if counts.sum() >= MAX_LABELS:
            break
    example = to(batches.batch(0, 0, min(batches.batch_size, EXAMPLES)), next(model.parameters()).device)

    def read() -> torch.Tensor:
        hidden = objective.forward(model, example)["hidden"] if writer is model else writer(example)
        return supervised(hidden, example[LABELS])[0]

    return int(counts.sum()) if init.init_head_from_frequencies(writer, counts, lambda: parallel.forward(read)) else 0
