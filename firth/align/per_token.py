"""Numbers of each token of sampled answers, under a policy and its reference, by the forward pass of training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from firth.align.rewards import Rollout
from firth.generate.decoding_batch import inference_mode, rectangle
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.policy_gradient import critic_states, has_critic, values

POSITIONS_PER_CHUNK = 512
"""Positions whose full distributions are held in memory at once."""


def answer_mask(lengths: Sequence[int]) -> np.ndarray:
    """Return where answers of some lengths have a token: (N, longest) bool."""
    return np.arange(max(lengths)) < np.array(lengths)[:, None]


def per_token_numbers(model: LM, reference: LM, samples: Sequence[Rollout], batch_size: int) -> dict[str, np.ndarray]:
    """Return numbers of each sampled token.

    Args:
        model: The policy; its critic gives the values.
        reference: The frozen reference model.
        samples: The answers.
        batch_size: Sequences per forward pass.

    Returns:
        `real` (N, T) bool, True on the tokens, and (N, T) float64 each, 0 elsewhere: `old` and `reference`, the
        log-probabilities under policy and reference; `values`, 0 without a critic; `kl`, the exact divergence at each state;
        `entropy`.
    """
    real = answer_mask([len(s.answer) for s in samples])
    out = {name: np.zeros(real.shape) for name in ("old", "reference", "values", "kl", "entropy")}
    for first in range(0, len(samples), batch_size):
        part = slice(first, first + batch_size)
        for name, numbers in batch_numbers(model, reference, samples[part]).items():
            out[name][part][real[part]] = numbers.double().cpu().numpy()
    return out | {"real": real}


def batch_numbers(model: LM, reference: LM, samples: Sequence[Rollout]) -> dict[str, Tensor]:
    """Return one number per sampled token of these answers, in row order: (tokens,) each."""
    device = model.tokens.weight.device
    batch = rectangle([s.tokens[:-1] for s in samples], device)
    is_label = rectangle([s.mask[1:] for s in samples], device)["tokens"].bool()
    labels = torch.from_numpy(np.concatenate([s.answer for s in samples]).astype(np.int64)).to(device)
    with inference_mode(model), inference_mode(reference):
        hidden, frozen = model(batch), reference(batch)[is_label]
        states = hidden[is_label]
        policy_head: LMHead = model.heads["lm"]  # type: ignore[assignment]
        ref_head: LMHead = reference.heads["lm"]  # type: ignore[assignment]
        chunks: dict[str, list[Tensor]] = {"old": [], "reference": [], "kl": [], "entropy": []}
        for at in range(0, len(labels), POSITIONS_PER_CHUNK):
            span = slice(at, at + POSITIONS_PER_CHUNK)
            p = policy_head(states[span]).float().log_softmax(-1)  # (chunk, V)
            q = ref_head(frozen[span]).float().log_softmax(-1)
            label = labels[span, None]
            chunks["old"].append(p.gather(-1, label)[:, 0])
            chunks["reference"].append(q.gather(-1, label)[:, 0])
            # Over the whole vocabulary rather than the sampled token: exact at each state, and never negative.
            chunks["kl"].append((p.exp() * (p - q)).sum(-1).clamp(min=0))
            chunks["entropy"].append(-(p.exp() * p).sum(-1))
        out = {name: torch.cat(pieces) for name, pieces in chunks.items()}
        if has_critic(model):
            out["values"] = values(model, critic_states(model, hidden, batch)[is_label])
    return out
