"""Sample answers on several ranks, each to its share of the prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from firth.generate.engine import Engine
from firth.generate.output import Completion, Finish, IncrementalDecoder
from firth.generate.sampling import Sampling
from firth.types import RankGroup

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
    cuts = [len(prompts) * r // ranks.world for r in range(ranks.world + 1)]
    seeds = [sampling.seed + i for i in range(len(prompts))]
    span = slice(cuts[ranks.rank], cuts[ranks.rank + 1])
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
