"""The only training step there is.

Every loss term is a SUM; it is divided by the number of targets it has in the *whole* step: over all
micro-batches and all ranks, known before the first backward pass. So the gradient does not depend on how the
step was cut up (the mean-of-means fault of gradient accumulation cannot arise), and adding terms needs no weights
beyond those the objective states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from firth.types import IGNORE, Batch

if TYPE_CHECKING:
    from firth.model.model import LM
    from firth.objectives.objective import Objective

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""


def no_reduce(x: Tensor) -> Tensor:
    """The sum over one rank."""
    return x


def count_targets(objective: Objective, batches: Sequence[Batch], reduce: Reduce = no_reduce) -> dict[str, Tensor]:
    """Supervised targets per term over all micro-batches and ranks: scalars, float32."""
    terms = objective.labels | objective.metrics
    fields = sorted(set(terms.values()))
    local = torch.stack([sum(((b[f] != IGNORE).sum() for b in batches), torch.zeros(())) for f in fields])
    total = dict(zip(fields, reduce(local.float()), strict=True))
    return {term: total[field] for term, field in terms.items()}


def step(
    model: LM,
    objective: Objective,
    batches: Sequence[Batch],
    reduce: Reduce = no_reduce,
    precision: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Tensor]:
    """Leave the step's gradient in the parameters; return each term's mean over the whole step.

    On several ranks each holds the gradient of its own share: the caller sums them.
    """
    count = count_targets(objective, batches, reduce)
    share = {t: 1 / n.clamp(min=1) for t, n in count.items()}
    total: dict[str, Tensor] = {}
    for batch in batches:
        with precision():
            terms = objective.loss(model, objective.forward(model, batch), batch)
        loss = sum((terms[t] * share[t] for t in objective.labels), torch.zeros((), device=share_device(share)))
        torch.autograd.backward(loss)
        for term, value in terms.items():
            total[term] = total.get(term, 0) + value.detach().float() * share[term]
    names = sorted(total)
    reduced = reduce(torch.stack([total[n] for n in names]))
    return dict(zip(names, reduced, strict=True))


def share_device(share: dict[str, Tensor]) -> torch.device:
    """Where the counts live, which is where the loss is summed."""
    return next(iter(share.values())).device
