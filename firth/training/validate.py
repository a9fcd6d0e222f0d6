"""Validation: the mean of each loss term and metric over all labels, and bits per byte of text.

Bits per byte do not depend on the tokenizer, so runs with different vocabularies can be compared:

    bits per byte = (nats per token / ln 2) * (tokens / bytes)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from firth.data.collate import counted_fields
from firth.training.step import Reduce, count_targets, no_reduce
from firth.types import Batch, Outputs

if TYPE_CHECKING:
    from firth.model.model import LM
    from firth.objectives.objective import Objective


@torch.no_grad()
def validate(
    model: LM,
    objective: Objective,
    batches: Iterable[Batch],
    *,
    bytes_per_target: float = 0.0,
    reduce: Reduce = no_reduce,
    watch: Callable[[Outputs, Batch], None] | None = None,
) -> dict[str, float]:
    """Compute validation metrics.

    Args:
        model: The model; its training mode is restored.
        objective: Its loss and metrics.
        batches: `Batches.all_batches()` has every example once, with the same randomness in every call.
        bytes_per_target: Bytes of text per label (bytes / tokens of the token store if every token is a label); if it is not
            0, "bits_per_byte" is added.
        reduce: Sums a tensor over all ranks.
        watch: Called with the outputs of every batch.

    Returns:
        "loss", "loss/TERM" if there are several terms, and the metrics.
    """
    device = next(model.parameters()).device
    training = model.training
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    model.eval()
    for batch in (to(batch, device) for batch in batches):
        for term, n in count_targets(objective, [batch]).items():
            counts[term] = counts.get(term, 0.0) + float(n)
        outputs = objective.forward(model, batch)
        terms = objective.loss(model, outputs, batch)
        if watch is not None:
            watch(outputs, batch)
        for term, value in terms.items():
            sums[term] = sums.get(term, 0.0) + float(value)
    model.train(training)
    names = sorted(counted_fields(objective))
    local = torch.tensor([[d.get(t, 0.0) for t in names] for d in (sums, counts)], dtype=torch.float64)
    total = reduce(local.to(device) if device.type == "cuda" else local).tolist()
    means = {t: s / max(n, 1.0) for t, s, n in zip(names, *total, strict=True)}
    metrics = named_metrics(objective, means)
    if bytes_per_target:
        metrics["bits_per_byte"] = metrics["loss"] / math.log(2) / bytes_per_target
    return metrics


def named_metrics(objective: Objective, means: Mapping[str, float]) -> dict[str, float]:
    """Return means by their name in metrics.jsonl: "loss", the sum of the terms, "loss/TERM" if there are several, metrics, ratios."""
    terms = [t for t in means if t in objective.labels]
    by_term = {f"loss/{t}": means[t] for t in terms} if len(terms) > 1 else {}
    rest = {t: v for t, v in means.items() if t not in objective.labels}
    ratios = {name: metric.ratio for name, metric in objective.metrics.items() if metric.ratio is not None}
    rest |= {name: means[top] / means[bottom] for name, (top, bottom) in ratios.items() if means[bottom]}
    return {"loss": sum(means[t] for t in terms)} | by_term | rest


def to(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device."""
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}
