"""The loss on text that is not trained on: each term's mean over everything asked, and bits per byte of text.

Bits per byte do not depend on the tokenizer, so runs with different vocabularies can be compared:

    bits per byte = (nats per token / ln 2) * (tokens / bytes)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from firth.train.step import Reduce, count_targets, no_reduce
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
    """Score `batches` without learning: `Batches.once()` for every held-out example, always seen in the same way.

    bytes_per_target: bytes of text for each token that the objective asks (the store's bytes / its tokens, if every
    token is asked); adds "bits_per_byte". watch: is shown the outputs of every batch.
    Returns "loss", "loss/TERM" if there are several, and the measures.
    """
    device = next(model.parameters()).device
    was = model.training
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
    model.train(was)
    names = sorted(objective.labels | objective.metrics)
    own = torch.tensor([[d.get(t, 0.0) for t in names] for d in (sums, counts)], dtype=torch.float64)
    total = reduce(own.to(device) if device.type == "cuda" else own).tolist()
    means = {t: s / max(n, 1.0) for t, s, n in zip(names, *total, strict=True)}
    found = named(objective, means)
    if bytes_per_target:
        found["bits_per_byte"] = found["loss"] / math.log(2) / bytes_per_target
    return found


def named(objective: Objective, means: Mapping[str, float]) -> dict[str, float]:
    """As metrics.jsonl names them: the terms' sum as "loss", each as "loss/TERM" if there are several, measures, ratios."""
    targets = [t for t in means if t in objective.labels]
    parts = {f"loss/{t}": means[t] for t in targets} if len(targets) > 1 else {}
    rest = {t: v for t, v in means.items() if t not in objective.labels}
    rest |= {t: means[over] / means[under] for t, (over, under) in objective.metric_ratios.items() if means[under]}
    return {"loss": sum(means[t] for t in targets)} | parts | rest


def to(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: x.to(device, non_blocking=True) for name, x in batch.items()}
