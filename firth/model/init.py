"""Begin where counting ends: an untrained model that gives each token its frequency among the answers.

The first steps of a run learn which tokens are common and nothing else: from log(vocabulary), 9.0 nats for 8,192 tokens,
down to the entropy of single tokens, 6.4. Counting the answers says as much before the first step.

    a head with an offset per token (BERT)     the offsets are the log frequencies
    an untied head without (NanoChat, T5 1.1)  one number of every token's vector is set to the same value; it goes through
                                               a trunk whose blocks begin as the identity, and the head's column for it
                                               holds the log frequencies: an offset made of what the shape has
    anything else (GPT-2's tied head)          nothing is done: there is no place for an offset

>>> from firth.model.heads import LMHead
>>> from firth.model.config import decoder_config
>>> shape = decoder_config(vocab_size=50, hidden_size=384, num_layers=1)
>>> _ = torch.manual_seed(0)
>>> model = LM(shape, {"lm": LMHead(shape)})
>>> counts = torch.arange(50.0)
>>> init_head_from_frequencies(model, counts, lambda: model({"tokens": torch.arange(50)[None]})[0])
True
>>> p = model.heads["lm"](model({"tokens": torch.tensor([[3]])})).softmax(-1)[0, 0]
>>> bool((p - (counts + 1) / (counts + 1).sum()).abs().max() < 2e-3)
True
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from firth.model.heads import LMHead
from firth.model.model import LM

CONSTANT_SHARE = 0.5
"""The number that all vectors share, as a share of the others' length (docs/decisions/index.md has what was tried)."""

MIN_MEAN_TO_STD = 4.0
"""How many standard deviations it must arrive with at the head, to serve as a constant there."""


@torch.no_grad()
def init_head_from_frequencies(model: LM, counts: Tensor, read: Callable[[], Tensor]) -> bool:
    """Make an untrained model predict the frequencies of `counts` (vocab,), each one more; whether it could.

    read: runs the model on some examples and returns hidden states at asked positions, (N, width).
    """
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    counts = counts.to(head.weight) + 1
    offsets = (counts / counts.sum()).log()
    offsets -= (offsets.max() + offsets.min()) / 2  # as small as they can be: a softmax does not mind, a soft cap does
    if head.softcap:
        offsets = head.softcap * torch.atanh(offsets / head.softcap)
    if head.bias is not None:
        head.bias.copy_(offsets)
        return True
    table = model.tokens.weight
    if table is head.weight or head.dense is not None:
        return False
    before = table[:, 0].clone()
    table[:, 0] = CONSTANT_SHARE * table[:, 1:].square().sum(-1).mean().sqrt()
    there = read()[:, 0].float() * head.scale
    if not there.mean() > MIN_MEAN_TO_STD * there.std():
        table[:, 0] = before
        return False
    head.weight[:, 0] = offsets / there.mean()
    return True
