"""Fill the gaps of a text: masks of a masked language model, and gaps for models without masks.

`fill_masks` takes "The <mask> sat on the mat." and returns the most likely tokens for each mask. Each mask is predicted
from the text alone, independently of the other masks' answers. (`firth.evaluate.perplexity` scores whole texts.)

Other models, sequence-to-sequence and bidirectional LSTM language models:

    encoder-decoders, prefix language models     the objective builds the prompt of a text with gaps (`Objective.hide`)
        sentinels (T5) the answer has each span after its sentinel: `fill_spans`, candidates of any length
        none (BART)    the answer is the whole text: `rewrite_slices`
    forward and backward language models (ELMo)  `fill_two_way`, one token for each gap

Candidates for a span are what the model generates greedily and in NUM_SAMPLES samples; their probability is the model's
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from firth.generate.decoding_batch import inference_mode, rectangle
from firth.generate.engine import Engine
from firth.generate.output import Completion
from firth.generate.sampling import Sampling
from firth.generate.scoring import MAX_LOGIT_ROWS
from firth.generate.slices import Slices, finish
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab
from firth.types import NEVER, UserError


@dataclass(frozen=True)
class Candidate:
    """One way to fill a mask.

    Args:
        token: The token id.
        piece: The token as the vocabulary spells it.
        probability: Its probability.
    """

    token: int
    piece: str
    probability: float


def masked(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the token ids (n,) of a text that contains mask tokens, with special tokens added.

    A space before a mask is dropped: in many tokenizers it is part of the masked word.

    Raises:
        UserError: The text has no mask.
    """
    vocab = tokenizer.vocab
    mask = tokenizer.token(vocab.mask)
    pieces = text.split(mask)
    if len(pieces) == 1:
        raise UserError(f"there is nothing to fill: write {mask} where a token is missing")
    row = [tokenizer.encode(pieces[-1])]
    for piece in reversed(pieces[:-1]):
        row = [tokenizer.encode(piece.removesuffix(" ")), np.array([vocab.mask]), *row]
    return vocab.add_special_tokens(np.concatenate(row).astype(np.int64))


def fill_masks(model: LM, tokenizer: Tokenizer, text: str, k: int = 5) -> list[list[Candidate]]:
    """Return the k most likely tokens for each mask of a text, most likely first, special tokens excluded.

    Raises:
        UserError: The text has no mask or is longer than the context, or the model is causal or has no LM head.
    """
    return finish(mask_slices(model, tokenizer, text, k))


def mask_slices(model: LM, tokenizer: Tokenizer, text: str, k: int = 5) -> Slices[list[list[Candidate]]]:
    """Fill masks as `fill_masks` does; the text is one slice, and so are MAX_LOGIT_ROWS masks."""
    if not model.has_lm_head:
        raise UserError(f"this model has no LM head, so it cannot fill masks; its heads are {list(model.heads)}")
    tokens = masked(tokenizer, text)
    if len(tokens) > model.context:
        raise UserError(f"the text has {len(tokens)} tokens and this model reads at most {model.context}: shorten it")
    if model.config.causal:
        raise UserError("this model is causal, so it cannot fill masks: use `firth generate` to continue a text")
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    device = model.tokens.weight.device
    with inference_mode(model):
        batch = rectangle([tokens], device, causal=False)
        if model.config.embedding.mask:  # no position attends to a mask, as in training
            batch["key_time"] = batch["key_time"].masked_fill(batch["tokens"] == tokenizer.vocab.mask, NEVER)
        hidden = model(batch)[0]
        masks = torch.from_numpy(np.flatnonzero(tokens == tokenizer.vocab.mask)).to(device)
        found: list[list[Candidate]] = []
        for some in masks.split(MAX_LOGIT_ROWS):
            yield
            probabilities = head(hidden[some]).float().softmax(-1)  # (masks, vocab)
            probabilities[:, np.flatnonzero(tokenizer.vocab.special)] = 0.0
            best = probabilities.topk(min(k, len(tokenizer.vocab.ordinary)), -1)
            found += [
                [Candidate(i, tokenizer.token(i), p) for i, p in zip(index, probability, strict=True)]
                for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
    return found


NUM_SAMPLES = 32
"""Answers that are sampled for the candidates of a text."""
MAX_SPAN_TOKENS = 12
"""Most tokens of a span: span corruption drops 3 on average."""


@dataclass(frozen=True, eq=False)
class InfillPrompt:
    """A text with gaps, as the input of a generating model.

    Args:
        tokens: Token ids, (n,).
        marks: Tokens that the answer has before the text of each gap, and after the last one, (gaps + 1,). Empty where the
            answer is the whole text.
    """

    tokens: np.ndarray
    marks: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, vocab: Vocab) -> InfillPrompt:
        """Return a prompt, whose gaps are sentinels or masks.

        >>> vocab = Vocab(size=20, roles={"eos": 1}, special=np.arange(20) < 5, sentinels=np.array([2, 3, 4]))
        >>> InfillPrompt.of(np.array([10, 11, 2, 12, 1]), vocab).marks.tolist()
        [2, 3]
        """
        gaps = int(np.isin(tokens, vocab.sentinels).sum())
        return cls(tokens, vocab.sentinels[: gaps + 1 if gaps else 0])


def split_gaps(tokenizer: Tokenizer, text: str, mark: str) -> list[np.ndarray]:
    """Return the token ids of the pieces of a text between its gaps: one piece more than there are gaps.

    A space before a gap is dropped: in many tokenizers it is part of the missing word.

    Raises:
        UserError: The text has no gap.
    """
    pieces = text.split(mark)
    if len(pieces) == 1:
        raise UserError(f"there is nothing to fill: write {mark} where a token is missing")
    return [tokenizer.encode(piece.removesuffix(" ")) for piece in pieces[:-1]] + [tokenizer.encode(pieces[-1])]


def fill_spans(engine: Engine, shown: InfillPrompt, k: int = 5, seed: int = 0) -> list[list[Candidate]]:
    """Return the k most likely spans for each gap; see `span_slices`."""
    return finish(span_slices(engine, shown, k, seed))


def span_slices(engine: Engine, shown: InfillPrompt, k: int = 5, seed: int = 0) -> Slices[list[list[Candidate]]]:
    """Return the k most likely spans for each gap among those that the model generates, most likely first.

    The probability of a span is that of its tokens and of the next sentinel, given the same answer's earlier spans.
    `Candidate.token` is the first token of a span, -1 for an empty one.

    Args:
        engine: A sequence-to-sequence model; the answer ends with the last sentinel.
        shown: The prompt, with one sentinel for each gap and one more.
        k: Candidates per gap.
        seed: The seed of the samples.
    """
    gaps = len(shown.marks) - 1
    stops = [*engine.stops, int(shown.marks[-1])]
    writer = Engine(engine.model, engine.tokenizer, stops=stops, batch_size=engine.batch_size)
    max_tokens = (MAX_SPAN_TOKENS + 1) * gaps + 1
    greedy = yield from writer.generate_slices([shown.tokens], Sampling(temperature=0, max_new_tokens=max_tokens))
    sampled = yield from writer.generate_slices(
        [shown.tokens] * NUM_SAMPLES, Sampling(max_new_tokens=max_tokens, seed=seed)
    )
    by_text: list[dict[str, Candidate]] = [{} for _ in range(gaps)]
    for answer in (*greedy, *sampled):
        for gap, (start, stop) in enumerate(_spans(answer.tokens, shown.marks, answer.finish == "stop")):
            tokens = answer.tokens[start:stop].tolist()
            probability = float(np.exp(answer.logprobs[start : stop + 1].sum(dtype=np.float64)))
            text = engine.tokenizer.decode(tokens).strip()
            candidate = Candidate(tokens[0] if tokens else -1, text, probability)
            by_text[gap][text] = max(by_text[gap].get(text, candidate), candidate, key=lambda c: c.probability)
    return [sorted(candidates.values(), key=lambda c: -c.probability)[:k] for candidates in by_text]


def _spans(tokens: np.ndarray, marks: np.ndarray, ended: bool) -> list[tuple[int, int]]:
    """Return the (start, stop) of each gap's span in an answer (n,): from its sentinel to the next one.

    If the answer has `ended`, the last span may also extend to its end. A gap whose sentinel is missing is left out, and so are
    all later gaps.

    >>> _spans(np.array([90, 7, 8, 91, 9, 92]), np.array([90, 91, 92]), True)
    [(1, 3), (4, 5)]
    >>> _spans(np.array([90, 7, 2]), np.array([90, 91, 92]), True)
    [(1, 2)]
    """
    spans: list[tuple[int, int]] = []
    at = 0
    for gap, mark in enumerate(marks[:-1]):
        hits = np.flatnonzero(tokens[at:] == mark)
        if not len(hits):
            break
        start = at + int(hits[0]) + 1
        ends = np.flatnonzero(np.isin(tokens[start:], marks[gap + 1 :]))
        if not len(ends):
            return [*spans, (start, len(tokens) - 1)] if ended else spans
        at = start + int(ends[0])
        spans.append((start, at))
    return spans


def rewrite_slices(engine: Engine, shown: InfillPrompt) -> Slices[Completion]:
    """Return the whole text as a denoising model generates it, greedily."""
    max_tokens = 2 * len(shown.tokens) + MAX_SPAN_TOKENS
    [answer] = yield from engine.generate_slices([shown.tokens], Sampling(temperature=0, max_new_tokens=max_tokens))
    return answer


def fill_two_way(engine: Engine, pieces: Sequence[np.ndarray], k: int = 5) -> list[list[Candidate]]:
    """Return the k most likely tokens for each gap; see `two_way_slices`."""
    return finish(two_way_slices(engine, pieces, k))


def two_way_slices(engine: Engine, pieces: Sequence[np.ndarray], k: int = 5) -> Slices[list[list[Candidate]]]:
    """Return the k most likely tokens for each gap under a forward and a backward language model (ELMo).

    The probability is proportional to the product of the forward model's, given the text on the left, and the backward
    model's, given the text on the right. Other gaps are removed from both texts.

    Args:
        engine: A model with `ModelConfig.rnn.separate_directions`.
        pieces: Token ids of the text between its gaps.
        k: Candidates per gap.
    """
    model, tokenizer = engine.model, engine.tokenizer
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    bos = np.array([tokenizer.vocab.bos] if "bos" in tokenizer.vocab.roles else [], np.int32)
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[tokenizer.vocab.ordinary] = True
    candidates = []
    with inference_mode(model):
        for gap in range(1, len(pieces)):
            left, right = np.concatenate((bos, *pieces[:gap])), np.concatenate(pieces[gap:])
            logits = torch.zeros(model.config.vocab_size)
            for row, at, side in ((left, -1, 0), (right, 0, 1)):
                if len(row):
                    states = model(rectangle([row], engine.device))[0, at].chunk(2)[side]
                    logits = logits + head(states).float().log_softmax(-1).cpu()
                    yield
            best = logits.masked_fill(~allowed, float("-inf")).softmax(-1).topk(min(k, len(tokenizer.vocab.ordinary)))
            candidates.append(
                [
                    Candidate(i, tokenizer.token(i), p)
                    for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                ]
            )
    return candidates
