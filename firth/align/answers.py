"""Answers of a policy: sampled and scored by all ranks, and the numbers of their tokens by the forward pass of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from firth.align.rewards import RewardError, Rollout, WeightedRewards
from firth.generate.decoding_batch import inference_mode, rectangle
from firth.generate.engine import Engine
from firth.generate.output import Completion, Finish, IncrementalDecoder
from firth.generate.sampling import Sampling
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.policy_gradient import critic_states, has_critic, values
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import RankGroup, UserError

FINISHES: tuple[Finish, ...] = get_args(Finish)


def sample_shared(
    engine: Engine, prompts: Sequence[np.ndarray], sampling: Sampling, ranks: RankGroup | None
) -> list[Completion]:
    """Return an answer to each prompt, on every rank; each rank samples a contiguous share of them.

    Each prompt has a seed of its own, so the answers do not depend on the number of ranks (up to rounding, since a share is
    decoded in other batches than the whole).

    Args:
        engine: The model, the same on every rank.
        prompts: Token ids (n,) each.
        sampling: How tokens are drawn, without stop strings.
        ranks: The ranks; None for one.
    """
    if ranks is None or ranks.world == 1:
        return engine.generate(prompts, sampling)
    seeds = [sampling.seed + i for i in range(len(prompts))]
    span = _share(len(prompts), ranks)
    own = engine.generate(prompts[span], sampling, seeds=seeds[span])
    sizes, finishes = (
        np.concatenate(ranks.gather_arrays(np.array(numbers, np.int64)))
        for numbers in ([len(c.tokens) for c in own], [FINISHES.index(c.finish) for c in own])
    )
    tokens, logprobs = (
        np.split(np.concatenate(ranks.gather_arrays(np.concatenate([none, *arrays]))), np.cumsum(sizes)[:-1])
        for none, arrays in (
            (np.zeros(0, np.int32), [c.tokens for c in own]),
            (np.zeros(0, np.float32), [c.logprobs for c in own]),
        )
    )
    contexts = [prompt if engine.start is None else prompt[:0] for prompt in prompts]
    return [
        Completion(t, p, IncrementalDecoder(engine.tokenizer, context).text(t.tolist()), FINISHES[finish])
        for context, t, p, finish in zip(contexts, tokens, logprobs, finishes.tolist(), strict=True)
    ]


def score_shared(
    rewards: WeightedRewards, samples: Sequence[Rollout], tokenizer: Tokenizer, ranks: RankGroup | None
) -> dict[str, np.ndarray]:
    """Return the rewards of all samples by name, (N,) each, the same on every rank; each rank scores its share.

    Args:
        rewards: The rewards, which may be random or cost money.
        samples: The answers, the same on every rank.
        tokenizer: Decodes them for error messages.
        ranks: The ranks; None for one.

    Raises:
        UserError: A reward failed on some rank; all ranks raise, and the others name the first that failed.
    """
    if ranks is None or ranks.world == 1:
        return rewards.scores(samples, tokenizer)
    own: dict[str, np.ndarray] = {}
    failure: UserError | None = None
    try:
        own = rewards.scores(samples[_share(len(samples), ranks)], tokenizer)
    except UserError as error:
        failure = error
    errors = ranks.errors(failure)
    if failure is not None:
        raise failure
    for rank, message in enumerate(errors):
        if message:
            raise UserError(f"rank {rank} failed: {message}") from RewardError(samples[0], f"failed on rank {rank}")
    return {name: np.concatenate(ranks.gather_arrays(x)) for name, x in own.items()}


def _share(count: int, ranks: RankGroup) -> slice:
    """Return the contiguous share of this rank of `count` items."""
    return slice(count * ranks.rank // ranks.world, count * (ranks.rank + 1) // ranks.world)


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
