"""The training step: loss, backward pass and gradient accumulation, for every objective.

Every loss term is a SUM; it is divided by the number of its labels in the *whole* step, over all micro-batches and all ranks,
which is known before the first backward pass. So the gradient does not depend on how the step is split (no mean of means
in gradient accumulation), and terms are added without weights other than those of the objective. `firth.training.trainer`
calls it and then the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from firth.data.collate import counted_fields
from firth.types import IGNORE, Batch

if TYPE_CHECKING:
    from firth.model.model import LM
    from firth.objectives.objective import Objective

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks."""


def no_reduce(x: Tensor) -> Tensor:
    """Return `x`: the sum over a single rank."""
    return x


def count_targets(objective: Objective, batches: Sequence[Batch], reduce: Reduce = no_reduce) -> dict[str, Tensor]:
    """Return the number of labels of each term over all micro-batches and ranks: scalars, float32."""
    terms = counted_fields(objective)
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
    """Compute the gradients of a step into the parameters and return the mean of each term over the whole step.

    On several ranks, each has the gradient of its own share: the caller sums them.

    Args:
        model: The model.
        objective: Its loss and metrics.
        batches: The micro-batches of this rank.
        reduce: Sums a tensor over all ranks.
        precision: The context of the forward pass.

    Returns:
        Term -> mean, a scalar float32.
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
    """Return the device of the counts, on which the loss is summed."""
    return next(iter(share.values())).device
