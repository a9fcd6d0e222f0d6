"""Fill the gaps of a text with a model that has no mask: one that writes what is missing, or two that read from both ends.

    encoder-decoders, prefix language models     the objective says how a text with gaps is shown (`Objective.show_gaps`)
        marks (T5)     the answer holds what fills each gap behind a mark: `fill_spans`, candidates of any length
        none (BART)    the answer is the whole text, written anew: `rewrite`
    two-way language models (ELMo)               `fill_two_way`, one token for each gap

Candidates for a span are what the model writes in SAMPLES draws and greedily; their probability is the model's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from firth.data.layout import InfillPrompt
from firth.generate.decoding import attention_pattern_of, rectangle
from firth.generate.engine import Engine
from firth.generate.fill_mask import Candidate
from firth.generate.sampling import Sampling
from firth.generate.streaming import Completion
from firth.model.heads import LMHead
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

SAMPLES = 32
"""Answers that are drawn for the candidates of a text's gaps."""
MAX_SPAN_TOKENS = 12
"""Tokens of what fills a gap: span corruption drops 3 on average."""


def split_gaps(tokenizer: Tokenizer, text: str, mark: str) -> list[np.ndarray]:
    """Return the token ids of the pieces of a text between its gaps: one piece more than there are gaps.

    The blank before a gap belongs to the word that is missing, for a tokenizer whose pieces begin with it.

    Raises:
        UserError: There is no gap in the text.
    """
    parts = text.split(mark)
    if len(parts) == 1:
        raise UserError(f"there is nothing to fill: write {mark} where a token is missing")
    return [tokenizer.encode(part.removesuffix(" ")) for part in parts[:-1]] + [tokenizer.encode(parts[-1])]


def fill_spans(engine: Engine, shown: InfillPrompt, k: int = 5, seed: int = 0) -> list[list[Candidate]]:
    """Return the k likeliest spans for each gap, among those that the model writes; the likeliest first.

    The probability of a span is that of its tokens and of the mark behind it, given what the same answer has in the gaps
    before. `Candidate.token` is the first token of a span, -1 for an empty one.

    Args:
        engine: A model that writes; the answer ends with the last mark.
        shown: What is shown of the text, with one mark for each gap and one more.
        k: How many candidates to return for each gap.
        seed: Of the draws.
    """
    gaps = len(shown.marks) - 1
    stops = [*engine.stops, int(shown.marks[-1])]
    writer = Engine(engine.model, engine.tokenizer, stops=stops, batch_size=engine.rows)
    room = (MAX_SPAN_TOKENS + 1) * gaps + 1
    greedy = writer.generate([shown.prompt], Sampling(temperature=0, max_new_tokens=room))
    drawn = writer.generate([shown.prompt] * SAMPLES, Sampling(max_new_tokens=room, seed=seed))
    found: list[dict[str, Candidate]] = [{} for _ in range(gaps)]
    for answer in (*greedy, *drawn):
        for gap, (start, stop) in enumerate(_spans(answer.tokens, shown.marks, answer.finish == "stop")):
            tokens = answer.tokens[start:stop].tolist()
            chance = float(np.exp(answer.logprobs[start : stop + 1].sum(dtype=np.float64)))
            text = engine.tokenizer.decode(tokens).strip()
            one = Candidate(tokens[0] if tokens else -1, text, chance)
            found[gap][text] = max(found[gap].get(text, one), one, key=lambda c: c.probability)
    return [sorted(some.values(), key=lambda c: -c.probability)[:k] for some in found]


def _spans(tokens: np.ndarray, marks: np.ndarray, ended: bool) -> list[tuple[int, int]]:
    """Where in an answer (n,) each gap is filled: behind its own mark, up to the next one or the end, if it has `ended`.

    Gaps whose mark the answer lacks are left out, and so are those behind them.

    >>> _spans(np.array([90, 7, 8, 91, 9, 92]), np.array([90, 91, 92]), True)
    [(1, 3), (4, 5)]
    >>> _spans(np.array([90, 7, 2]), np.array([90, 91, 92]), True)
    [(1, 2)]
    """
    found: list[tuple[int, int]] = []
    at = 0
    for gap, mark in enumerate(marks[:-1]):
        here = np.flatnonzero(tokens[at:] == mark)
        if not len(here):
            break
        start = at + int(here[0]) + 1
        ends = np.flatnonzero(np.isin(tokens[start:], marks[gap + 1 :]))
        if not len(ends):
            return [*found, (start, len(tokens) - 1)] if ended else found
        at = start + int(ends[0])
        found.append((start, at))
    return found


def rewrite(engine: Engine, shown: InfillPrompt) -> Completion:
    """Return the whole text as a denoising model writes it, greedily."""
    longest = 2 * len(shown.prompt) + MAX_SPAN_TOKENS
    return engine.generate([shown.prompt], Sampling(temperature=0, max_new_tokens=longest))[0]


def fill_two_way(engine: Engine, pieces: Sequence[np.ndarray], k: int = 5) -> list[list[Candidate]]:
    """Return the k likeliest tokens for each gap to two language models that read from both ends (ELMo).

    The probability is proportional to the product of what the forward model says behind the text on the left and the
    backward model before the text on the right. Other gaps are left out of both.

    Args:
        engine: A model with `Shape.apart`.
        pieces: Token ids of the text between its gaps.
        k: How many candidates to return for each gap.
    """
    model, tokenizer = engine.model, engine.tokenizer
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    begin = np.array([tokenizer.vocab.bos] if "bos" in tokenizer.vocab.roles else [], np.int32)
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[tokenizer.vocab.ordinary] = True
    found = []
    with attention_pattern_of(model):
        for gap in range(1, len(pieces)):
            left, right = np.concatenate((begin, *pieces[:gap])), np.concatenate(pieces[gap:])
            logits = torch.zeros(model.config.vocab_size)
            for row, at, side in ((left, -1, 0), (right, 0, 1)):
                if len(row):
                    states = model(rectangle([row], engine.device))[0, at].chunk(2)[side]
                    logits = logits + head(states).float().log_softmax(-1).cpu()
            best = logits.masked_fill(~allowed, float("-inf")).softmax(-1).topk(min(k, len(tokenizer.vocab.ordinary)))
            found.append(
                [
                    Candidate(i, tokenizer.token(i), p)
                    for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ]
            )
    return found
