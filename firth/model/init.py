"""Initialization of a whole model: empty on the meta device, or with an LM head that predicts the label frequencies.

`init_empty_weights` makes modules on the meta device, to know the names and sizes of their tensors or to be filled from a
file.

>>> from torch import nn
>>> with init_empty_weights():
...     matrix = nn.Linear(1_000_000, 1_000_000).weight
>>> matrix.device.type, tuple(matrix.shape)
('meta', (1000000, 1000000))

`init_head_from_frequencies` makes an untrained model predict the label frequencies. The first steps of a run learn only
which tokens are frequent: the loss falls from log(vocab_size), 9.0 nats for 8,192 tokens, to the entropy of single tokens,
6.4. Counting the labels gives as much before the first step.

    a head with a bias per token (BERT)        the bias is the log frequencies
    an untied head without (NanoChat, T5 1.1)  one number of every token's embedding is set to the same value; it passes
                                               blocks that start as the identity, and the head's column for it holds
                                               the log frequencies, as a bias would
    anything else (GPT-2's tied head)          nothing is done: a bias is not possible

>>> from firth.model.heads import LMHead
>>> from firth.model.config import decoder_config
>>> config = decoder_config(vocab_size=50, hidden_size=384, num_layers=1)
>>> _ = torch.manual_seed(0)
>>> model = LM(config, {"lm": LMHead(config)})
>>> counts = torch.arange(50.0)
>>> init_head_from_frequencies(model, counts, lambda: model({"tokens": torch.arange(50)[None]})[0])
True
>>> p = model.heads["lm"](model({"tokens": torch.tensor([[3]])})).softmax(-1)[0, 0]
>>> bool((p - (counts + 1) / (counts + 1).sum()).abs().max() < 2e-3)
True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.shard_tensors import assign, gathered, is_sharded

FILLS = ("normal_", "uniform_", "kaiming_uniform_", "zeros_", "ones_", "zero_", "fill_")


class _Unfilled(TorchFunctionMode):
    """Skips functions that initialize a tensor, which take 1.5 ms for each normally distributed matrix."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ in FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def init_empty_weights() -> Iterator[None]:
    """Create modules on the meta device, without initialization."""
    with torch.device("meta"), _Unfilled():
        yield


CONSTANT_SHARE = 0.5
"""The shared number, as a share of the root mean square length of the other numbers (docs/decisions/index.md)."""

MIN_MEAN_TO_STD = 4.0
"""Least ratio of mean to standard deviation of that number at the head, for it to serve as a constant."""


@torch.no_grad()
def init_head_from_frequencies(model: LM, counts: Tensor, read: Callable[[], Tensor]) -> bool:
    """Make an untrained model predict the frequencies of counts + 1.

    Args:
        model: An untrained model with an LM head.
        counts: (vocab_size,) label counts.
        read: Runs the model on some examples and returns the hidden states at supervised positions, (N, hidden_size).

    Returns:
        Whether the head could be initialized.
    """
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    counts = counts.to(head.weight.device, head.weight.dtype) + 1
    offsets = (counts / counts.sum()).log()
    offsets -= (offsets.max() + offsets.min()) / 2  # as small as possible: softmax ignores a shift, a soft cap does not
    if head.softcap:
        offsets = head.softcap * torch.atanh(offsets / head.softcap)
    if head.bias is not None:
        assign(head.bias, offsets)
        return True
    table = model.tokens.weight
    if table is head.weight or head.dense is not None:
        return False
    whole = gathered(table.detach())
    before = whole[:, 0].clone()
    _assign_first_column(table, whole, CONSTANT_SHARE * whole[:, 1:].square().sum(-1).mean().sqrt())
    shared = read()[:, 0].float() * head.scale
    if not shared.mean() > MIN_MEAN_TO_STD * shared.std():
        _assign_first_column(table, whole, before)
        return False
    _assign_first_column(head.weight, gathered(head.weight.detach()), offsets / shared.mean())
    return True


def _assign_first_column(weight: Tensor, whole: Tensor, column: Tensor) -> None:
    """Set the first column of a weight, given the whole of it: they are the same memory unless the weight is sharded."""
    whole[:, 0] = column
    if is_sharded(weight):
        assign(weight, whole)
