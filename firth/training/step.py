"""One training step and its batches, and the held-out loss.

The training step: loss, backward pass and gradient accumulation, for every objective.

Every loss term is a SUM; it is divided by the number of its labels in the *whole* step, over all micro-batches and all ranks,
which is known before the first backward pass. So the gradient does not depend on how the step is split (no mean of means
in gradient accumulation), and terms are added without weights other than those of the objective. `firth.training.trainer`
calls it and then the optimizer.

Validation: the mean of each loss term and metric over all labels, and bits per byte of text.

Bits per byte do not depend on the tokenizer, so runs with different vocabularies can be compared:

    bits per byte = (nats per token / ln 2) * (tokens / bytes)

Batches of the next step are built in a thread while the current step runs. They are a function of the step, so losses are the same
bit for bit, and a batch that was built but not trained on is built again after a resume. Sources that depend on the current model
(`Source.on_policy`) are read after the previous step instead.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from firth.data.collate import counted_fields
from firth.training.distributed import Parallel
from firth.types import IGNORE, Batch, Outputs, UserError, with_host_copy

if TYPE_CHECKING:
    from firth.model.model import LM
    from firth.objectives.objective import Objective


class Prefetcher:
    """Builds the batches of a step ahead of time.

    A context manager: its thread ends on exit, after the batch that it is building.

    Args:
        make: Step -> its batches; a function of the step only that no other thread calls at the same time.
        enabled: Whether batches are built ahead; if False, `take` builds them.
    """

    def __init__(self, make: Callable[[int], list[Batch]], enabled: bool = True) -> None:
        self._make, self._enabled = make, enabled
        self._thread = ThreadPoolExecutor(1, "firth-batches", initializer=use_one_thread)
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[Batch]:
        """Return the batches of a step, or raise the exception of the thread that built them."""
        if self._next is None or self._next[0] != step:
            return self._make(step)
        future, self._next = self._next[1], None
        return future.result()

    def begin(self, step: int) -> None:
        """Start to build the batches of a step."""
        if self._enabled:
            self._next = step, self._thread.submit(self._make, step)


def use_one_thread() -> None:
    """Let torch use one thread for operations of the calling thread only.

    `torch.set_num_threads` would also affect MKL and later threads; OpenMP's own setting is per thread.
    """
    torch.get_num_threads()  # torch sets the number of a thread at its first call there, and only then
    set_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_threads is not None:
        set_threads(1)


SINGLE = Parallel()

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
    parallel: Parallel = SINGLE,
) -> dict[str, Tensor]:
    """Compute the gradients of a step into the parameters and return the mean of each term over the whole step.

    Args:
        model: The model.
        objective: Its loss and metrics.
        batches: The micro-batches of this rank.
        reduce: Sums a tensor over all ranks.
        precision: The context of the forward pass.
        parallel: Runs the passes on the ranks, and sums the gradients over them.

    Returns:
        Term -> mean, a scalar float32.
    """
    count = count_targets(objective, batches, reduce)
    share = {t: 1 / n.clamp(min=1) for t, n in count.items()}
    total: dict[str, Tensor] = {}
    for number, batch in enumerate(batches, 1):
        with precision():
            terms = parallel.forward(partial(_terms, model, objective, batch))
        loss = sum((terms[t] * share[t] for t in objective.labels), torch.zeros((), device=share_device(share)))
        parallel.backward(loss, last=number == len(batches))
        for term, value in terms.items():
            total[term] = total.get(term, 0) + value.detach().float() * share[term]
    names = sorted(total)
    reduced = reduce(torch.stack([total[n] for n in names]))
    return dict(zip(names, reduced, strict=True))


def _terms(
    model: LM, objective: Objective, batch: Batch, watch: Callable[[Outputs, Batch], None] | None = None
) -> dict[str, Tensor]:
    """Return the sum of each term over a batch, after calling `watch` with the outputs."""
    outputs = objective.forward(model, batch)
    terms = objective.loss(model, outputs, batch)
    if missing := sorted(objective.labels.keys() - terms.keys()):
        raise UserError(
            f"loss of {type(objective).__name__} returned {', '.join(terms)} and not {missing[0]!r}, a term of its labels"
        )
    if watch is not None:
        watch(outputs, batch)
    return terms


def share_device(share: dict[str, Tensor]) -> torch.device:
    """Return the device of the counts, on which the loss is summed."""
    return next(iter(share.values())).device


@torch.no_grad()
def validate(
    model: LM,
    objective: Objective,
    batches: Iterable[Batch],
    *,
    bytes_per_target: float = 0.0,
    reduce: Reduce = no_reduce,
    watch: Callable[[Outputs, Batch], None] | None = None,
    parallel: Parallel = SINGLE,
    filler: Sequence[Batch] = (),
) -> dict[str, float]:
    """Compute validation metrics.

    Args:
        model: The model; its training mode is restored.
        objective: Its loss and metrics.
        batches: `Batches.all_batches()` has every example once, with the same randomness in every call.
        bytes_per_target: Bytes of text per label (bytes / tokens of the token store if every token is a label); if it is not
            0, "bits_per_byte" is added.
        reduce: Sums a tensor over all ranks.
        watch: Called with the outputs of every batch, where the weights can be used.
        parallel: Runs the passes on the ranks.
        filler: Batches to run without counting them: all ranks of a sharded model must run as many.

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
        for term, value in parallel.forward(partial(_terms, model, objective, batch, watch)).items():
            sums[term] = sums.get(term, 0.0) + float(value)
    for batch in filler:
        parallel.forward(partial(_terms, model, objective, to(batch, device)))
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


@dataclass(frozen=True)
class StepNumbers:
    """A step whose numbers are on the device.

    Args:
        step: Optimizer steps, this one included.
        tokens: Tokens read so far.
        flops: Counted work so far.
        rate: The learning rate.
        names: The terms of the loss and the metrics.
        numbers: Their means, the norm of the gradient, and whether the step was skipped (1 or 0).
    """

    step: int
    tokens: int
    flops: float
    rate: float
    names: tuple[str, ...]
    numbers: Tensor


def to(batch: Batch, device: torch.device) -> Batch:
    """Move a batch to a device. Tensors that are copied keep the original for `host_copy`."""
    moved = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
    return {name: x if x is batch[name] else with_host_copy(x, batch[name]) for name, x in moved.items()}


def pinned(batches: list[Batch]) -> list[Batch]:
    """Return batches in page-locked memory, from which a GPU copies them while it computes."""
    return [{name: x.pin_memory() for name, x in batch.items()} for batch in batches]
