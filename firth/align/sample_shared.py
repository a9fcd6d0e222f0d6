"""Sample and score answers on several ranks, each its share of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from firth.align.rewards import RewardError, Rollout, WeightedRewards
from firth.generate.engine import Engine
from firth.generate.output import Completion, Finish, IncrementalDecoder
from firth.generate.sampling import Sampling
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
