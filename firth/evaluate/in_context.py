"""What a decoder learns from its own context: loss early and late in it, and copying of a random sequence (Olsson 2022).

    loss_at_token_50, loss_at_token_500    mean loss of 16 tokens there, in held-out text
    in_context_score                       their difference, late minus early; more negative is better
    copying_loss, copying_accuracy         of the second half of a random sequence of tokens that is repeated once

A model without memory of its context has a score of about 0, and a copying loss above ln(vocabulary size). An induction head
brings the copying loss to about 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from firth.data.source import Source
from firth.generate.scoring import ScoredPair, TokenScores, score_pairs
from firth.model.model import LM
from firth.tokenizer.vocab import Vocab
from firth.types import UserError

EARLY, LATE = 50, 500
"""Tokens at which the loss is measured, where the context has as many."""
BAND = 16
"""Tokens over which a loss is averaged, since that of a single token is noisy."""
MIN_TOKENS = 64
"""Shortest text in which early and late differ."""
PERIOD = 64
"""Tokens of the random sequence, where the context holds it twice."""
MIN_TEXTS = 16
"""Texts that must be long enough, as far as there are so many: the late token is moved forward until they are."""


@dataclass(frozen=True, eq=False)
class InContextTexts:
    """Texts of one document each, and the tokens at which their loss is measured.

    Args:
        rows: Token ids of each text, at least `late + BAND // 2` of them.
        early: First token.
        late: Second token.
    """

    rows: Sequence[np.ndarray]
    early: int
    late: int


def in_context_texts(source: Source, context: int, limit: int) -> InContextTexts:
    """Choose texts from held-out examples with "tokens".

    Args:
        source: The examples; those with "document_ids" are split into their documents.
        context: Most tokens that the model reads.
        limit: Most texts.

    Raises:
        UserError: There is no text of MIN_TOKENS tokens.
    """
    pieces = [
        piece
        for i in np.unique(np.linspace(0, len(source) - 1, 4 * limit).round().astype(int))
        for piece in _pieces(source, int(i))
    ]
    pieces.sort(key=len, reverse=True)
    length = len(pieces[min(MIN_TEXTS, limit, len(pieces)) - 1]) if pieces else 0
    if min(length, context) < MIN_TOKENS:
        raise UserError(
            f"evaluation.tasks: in_context needs held-out text of {MIN_TOKENS} tokens in one document, and the model reads {context} and "
            f"the texts have {length}: raise examples.max_length, or leave it out"
        )
    late = min(LATE, min(length, context) - BAND // 2)
    rows = [piece for piece in pieces if len(piece) >= late + BAND // 2][:limit]
    return InContextTexts(rows, min(EARLY, late // 4), late)


def _pieces(source: Source, index: int) -> Iterable[np.ndarray]:
    """Return the documents in an example."""
    example = source[index]
    tokens = np.asarray(example["tokens"])
    if "document_ids" not in example:
        return [tokens]
    return np.split(tokens, np.flatnonzero(np.diff(example["document_ids"])) + 1)


def in_context_score(model: LM, vocab: Vocab, texts: InContextTexts) -> dict[str, float]:
    """Return the loss at both tokens and the in-context score, in nats."""
    half = BAND // 2
    pairs = [
        ScoredPair(row[: at - half], row[at - half : at + half])
        for at in (texts.early, texts.late)
        for row in texts.rows
    ]
    scores = _scores(model, vocab, pairs)
    count = len(texts.rows)
    early, late = (-float(np.mean([one.logprobs.mean() for one in some])) for some in (scores[:count], scores[count:]))
    return {
        f"loss_at_token_{texts.early}": early,
        f"loss_at_token_{texts.late}": late,
        "in_context_score": late - early,
    }


def copying(model: LM, vocab: Vocab, limit: int, seed: int = 0) -> dict[str, float]:
    """Return loss and accuracy in the second half of random sequences that are repeated once.

    Args:
        model: A causal decoder.
        vocab: Its vocabulary; special tokens and unused ids are not drawn.
        limit: Number of sequences.
        seed: Seed of the sequences, which are the same at each step.
    """
    plain = np.setdiff1d(vocab.ordinary, vocab.holes)
    rng, period = np.random.default_rng(seed), min(PERIOD, model.context // 2)
    pairs = []
    for _ in range(limit):
        row = rng.choice(plain, period)
        # The first token of the second half cannot be known.
        pairs.append(ScoredPair(np.concatenate((row, row[:1])), row[1:]))
    scores = _scores(model, vocab, pairs)
    return {
        "copying_loss": -float(np.mean([one.logprobs.mean() for one in scores])),
        "copying_accuracy": float(np.mean([one.most_likely.mean() for one in scores])),
    }


def _scores(model: LM, vocab: Vocab, pairs: Sequence[ScoredPair]) -> list[TokenScores]:
    """Return the scores of each pair, in order."""
    found = dict(score_pairs(model, vocab, pairs))
    return [found[i] for i in range(len(pairs))]
