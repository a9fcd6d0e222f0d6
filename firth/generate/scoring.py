"""Score continuations of prompts: log p of each token, for every family of models.

    causal decoder     chain rule; a prompt is read once for all of its continuations, and what prompts share once for all
    encoder-decoder    teacher forcing; a source is encoded once for all of its continuations. A text without a prompt, for a
                       model trained on span corruption (T5): each word in the gap that it leaves (`score_gaps`)
    masked, permuted   pseudo-log-likelihood: each token given all others (Salazar 2020), n passes for n tokens

The continuations of one prompt are branches of one row: a branch sees the prompt and itself, because its keys expire where
the next branch begins (`firth.model.attention`). Prompts that begin with the same tokens (few-shot examples) are read from one
KV cache of these tokens.

>>> shared_prefixes([(1, 2, 3, 4), (1, 2, 3, 5, 6), (7, 8)], minimum=2)
[(0, 2, 3), (2, 3, 0)]
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from firth.generate.decoding_batch import inference_mode, pad_right, rectangle
from firth.generate.slices import Slices, can_read_in_chunks, read_in_chunks, yielding
from firth.model.config import ModelConfig
from firth.model.forward_context import EncoderOutput, ForwardContext
from firth.model.heads import LMHead
from firth.model.kv_cache import KVCache
from firth.model.model import LM
from firth.tokenizer.vocab import Vocab
from firth.types import NEVER, Batch, UserError

MAX_TOKENS = 4096
"""Most padded tokens of a batch of rows."""
MIN_TOKENS = 512
"""Tokens from which on a batch ends where the next row would be padded by more than a quarter of its length."""
MAX_LOGIT_ROWS = 512
"""Most positions whose logits are computed at once: 100 MB in fp32 with 50,000 token ids."""
MAX_GROUP_TOKENS = 1 << 16
"""Most tokens of the rows that are kept at once where each token of a text has a row of its own; at least those of one text."""
MIN_SHARED_TOKENS = 16
"""Shortest common beginning of prompts that is read once for all of them."""


ScoringMode = Literal["causal", "masked", "halves"]


def scoring_mode(config: ModelConfig) -> ScoringMode:
    """Return how a model scores text, from its config.

    "halves" for an encoder-decoder; "masked" for a model that is neither causal nor a prefix LM and has a transform in its
    LM head (BERT), a mask embedding (XLNet) or a bidirectional RNN; "causal" for all others.

    Raises:
        UserError: The model gives text no likelihood.
    """
    if config.encoder.latent_size:
        raise UserError(
            "a variational autoencoder only bounds the likelihood of a text: its ELBO is one of the validation metrics of "
            "its run (`firth evaluate RUN` without files)"
        )
    if config.encoder.num_layers:
        return "halves"
    masked = config.lm_head.type == "transform" or config.embedding.mask or config.rnn.type
    return "masked" if masked and not (config.causal or config.attention.prefix_lm) else "causal"


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Scores of one continuation.

    Args:
        logprobs: log p of each of its tokens, (n,) float64, in nats.
        most_likely: Whether each of them is the most likely token, (n,) bool.
        top_ids: The most likely tokens in place of each, most likely first, (n, top) int64.
        top_logprobs: Their log-probabilities, (n, top) float64.
    """

    logprobs: np.ndarray
    most_likely: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray

    @staticmethod
    def zeros(count: int, top: int) -> TokenScores:
        """Return scores of 0 for `count` tokens, to be filled in."""
        return TokenScores(
            np.zeros(count), np.ones(count, bool), np.zeros((count, top), np.int64), np.zeros((count, top))
        )

    def put(self, start: int, other: TokenScores) -> None:
        """Copy the scores of consecutive tokens, of which the first is token `start` of these."""
        for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True):
            mine[start : start + len(theirs)] = theirs

    def part(self, start: int, stop: int) -> TokenScores:
        """Return the scores of tokens `start` to `stop`, exclusive."""
        return TokenScores(*(one[start:stop] for one in vars(self).values()))

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding would write the continuation."""
        return bool(self.most_likely.all())

    @property
    def total(self) -> float:
        """Summed log-probability in nats."""
        return float(self.logprobs.sum())


@dataclass(frozen=True, eq=False)
class ScoredPair:
    """A prompt and one of its continuations.

    Args:
        prompt: Token ids (m,).
        continuation: Token ids (n,), at least one.
        word_starts: For masked models with within-word masking, and for gaps of whole words: whether each token begins a
            word, (n,) bool.
    """

    prompt: np.ndarray
    continuation: np.ndarray
    word_starts: np.ndarray | None = None


MAX_BRANCH_SHARE = 2
"""Most tokens of the continuations in one row, in lengths of their prompt: attention over more costs more than the prompt."""


@dataclass(frozen=True, eq=False)
class _Branches:
    """A prompt with its different continuations and the index of each pair."""

    prompt: tuple[int, ...]
    continuations: list[np.ndarray]
    index: list[int]

    @property
    def width(self) -> int:
        """Input tokens of the continuations, whose last tokens are no inputs."""
        return sum(len(one) - 1 for one in self.continuations)


Scored = list[tuple[int, TokenScores]]
"""Index and scores of the pairs that a forward pass completes; often none."""


def score_pairs(
    model: LM, vocab: Vocab, pairs: Sequence[ScoredPair], top: int = 0
) -> Iterator[tuple[int, TokenScores]]:
    """Yield (index, scores) of each pair, in the order in which they are computed.

    Args:
        model: A model with an LM head.
        vocab: Its vocabulary, with the decoder start token.
        pairs: The pairs. A causal model needs at least one prompt token (bos).
        top: How many of the most likely tokens are returned for each token.

    Raises:
        UserError: A pair is empty or longer than the model's context.
    """
    return itertools.chain.from_iterable(score_slices(model, vocab, pairs, top))


def score_slices(
    model: LM, vocab: Vocab, pairs: Sequence[ScoredPair], top: int = 0, max_tokens: int = 0
) -> Iterator[Scored]:
    """Yield what each forward pass completes; see `score_pairs`.

    Args:
        model: A model with an LM head.
        vocab: Its vocabulary, with the decoder start token.
        pairs: The pairs.
        top: How many of the most likely tokens are returned for each token.
        max_tokens: Most tokens of a forward pass, except of a row that must be read at once: of a model that reads in both
            directions, of a prefix language model, and of an encoder-decoder. 0 for MAX_TOKENS and rows that are not cut.
    """
    check_lengths(model, pairs)
    mode = scoring_mode(model.config)
    with inference_mode(model):
        if mode == "halves":
            yield from _teacher_forced(model, vocab, pairs, top, max_tokens)
        elif mode == "masked":
            yield from _pseudo(model, vocab, pairs, top, max_tokens)
        else:
            yield from _causal(model, pairs, top, max_tokens)


def check_lengths(model: LM, pairs: Sequence[ScoredPair]) -> None:
    """Raise a UserError if a pair is empty or longer than the model's context."""
    mode, context = scoring_mode(model.config), model.context
    for i, pair in enumerate(pairs):
        if not len(pair.continuation):
            raise UserError(f"pair {i}: the continuation is empty: give at least one token")
        if not len(pair.prompt) and mode != "masked":
            raise UserError(f"pair {i} has an empty prompt: give at least one token")
        m, n = len(pair.prompt), len(pair.continuation)
        _check_length(i, max(m, n) if mode == "halves" else m + n + (2 if mode == "masked" else -1), context)


def _check_length(index: int, length: int, context: int) -> None:
    if length > context:
        raise UserError(
            f"pair {index} has {length} tokens and this model reads at most {context}: shorten it, or use a model with a "
            "longer model.max_positions"
        )


def shared_prefixes(prompts: Sequence[Sequence[int]], minimum: int = MIN_SHARED_TOKENS) -> list[tuple[int, int, int]]:
    """Group sorted prompts by a common beginning that is worth reading once.

    Args:
        prompts: Sorted lists of token ids.
        minimum: Shortest common beginning; it must also be a quarter of the shortest prompt.

    Returns:
        (start, stop, length) of consecutive groups. The length is below that of each prompt; 0 without a common beginning.
    """
    groups: list[tuple[int, int, int]] = []
    for i, prompt in enumerate(prompts):
        if groups:
            start, stop, length = groups[-1]
            common = _common(prompts[stop - 1], prompt)
            least = common if stop - start == 1 else min(length, common)
            shortest = min(len(one) for one in (prompts[start], prompt))
            # A group keeps its beginning unless the next prompt would cut it to less than half.
            if common >= max(minimum, shortest // 4) and (stop - start == 1 or 2 * least >= length):
                groups[-1] = (start, i + 1, least)
                continue
        groups.append((i, i + 1, 0))
    return groups


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens at the start that two lists share, at most one less than the shorter has."""
    n = min(len(a), len(b)) - 1
    for i in range(n):
        if a[i] != b[i]:
            return i
    return max(0, n)


def _causal(model: LM, pairs: Sequence[ScoredPair], top: int, max_tokens: int) -> Iterator[Scored]:
    """Score with a decoder."""
    config = model.config
    branching = not config.rnn.type and not config.attention.prefix_lm and model.prompt is None
    rows: list[_Branches] = []
    known: dict[tuple[int, ...], _Branches] = {}
    for i, pair in enumerate(pairs):
        prompt = tuple(int(token) for token in pair.prompt)
        row = known.get(prompt) if branching and len(prompt) >= MIN_SHARED_TOKENS else None
        if row is None or row.width + len(pair.continuation) > MAX_BRANCH_SHARE * len(prompt):
            row = known[prompt] = _Branches(prompt, [], [])
            rows.append(row)
        row.continuations.append(np.asarray(pair.continuation, np.int64))
        row.index.append(i)
    rows.sort(key=lambda row: row.prompt)
    sharing = branching and model.prefix is None
    groups = shared_prefixes([row.prompt for row in rows]) if sharing else [(0, len(rows), 0)]
    alone = [row for start, stop, length in groups if not length for row in rows[start:stop]]
    for batch in _batches(alone, 0, max_tokens):
        yield from _score_rows(model, batch, None, 0, top, max_tokens)
    for start, stop, length in groups:
        if length:
            header = yield from yielding([], _read_header(model, rows[start].prompt[:length], max_tokens))
            yield []
            for batch in _batches(rows[start:stop], length, max_tokens):
                yield from _score_rows(model, batch, header, length, top, max_tokens)


def _batches(rows: Sequence[_Branches], shared: int, max_tokens: int) -> Iterator[list[_Branches]]:
    """Yield rows in batches of at most `max_tokens` padded tokens or one row, the longest first."""
    batch: list[_Branches] = []
    widest = 0
    for row in sorted(rows, key=lambda row: -_width(row, shared)):
        width = _width(row, shared)
        widest = widest or width
        padded = 5 * width < 4 * widest and widest * len(batch) >= MIN_TOKENS
        if batch and (widest * (len(batch) + 1) > (max_tokens or MAX_TOKENS) or padded):
            yield batch
            batch, widest = [], width
        batch.append(row)
    if batch:
        yield batch


def _width(row: _Branches, shared: int) -> int:
    """Return the number of tokens of a row after the shared ones: its prompt, and its continuations without their last token."""
    return len(row.prompt) - shared + row.width


def _read_header(model: LM, tokens: Sequence[int], max_tokens: int) -> Slices[KVCache]:
    """Return the cache of tokens that prompts share, read at most `max_tokens` at a time; 0 for all at once."""
    device = model.tokens.weight.device
    cache = model.make_cache(1, len(tokens))
    batch = rectangle([np.array(tokens)], device)
    needed = torch.zeros_like(batch["tokens"], dtype=torch.bool)
    needed[:, -1] = True
    batch["key_expiry"] = torch.full_like(batch["key_time"], NEVER)  # the keys of branches will have one
    chunk = max_tokens if max_tokens and can_read_in_chunks(model) else len(tokens)
    yield from read_in_chunks(model, batch | {"positions": batch["query_time"]}, chunk, needed, cache)
    return cache


def _score_rows(
    model: LM, rows: Sequence[_Branches], header: KVCache | None, shared: int, top: int, max_tokens: int
) -> Iterator[Scored]:
    """Run rows of prompts with their continuations once, and yield the scores of each continuation.

    A single row of more than `max_tokens` is read in chunks.
    """
    device, prefix_lm = model.tokens.weight.device, model.config.attention.prefix_lm
    tokens, positions, times, expiry = [], [], [], []
    at: list[tuple[int, np.ndarray]] = []  # row, and the position whose state predicts each token of a continuation
    order: list[tuple[int, np.ndarray]] = []  # index of the pair, and its tokens
    for r, row in enumerate(rows):
        length = len(row.prompt)
        ids, place = [np.array(row.prompt[shared:], np.int64)], [np.arange(shared, length)]
        when = [np.zeros(length - shared, np.int64) if prefix_lm else np.arange(shared, length)]
        ends = [np.full(length - shared, NEVER)]
        used, clock = length - shared, length
        for index, continuation in zip(row.index, row.continuations, strict=True):
            extra = len(continuation) - 1
            states = np.concatenate(([length - shared - 1], np.arange(used, used + extra)))
            at.append((r, states))
            order.append((index, continuation))
            ids.append(continuation[:-1])
            place.append(np.arange(length, length + extra))
            when.append(np.arange(clock, clock + extra))
            clock, used = clock + extra, used + extra
            ends.append(np.full(extra, clock))
        if len(row.continuations) == 1:
            ends[-1][:] = NEVER
        tokens.append(np.concatenate(ids))
        positions.append(np.concatenate(place))
        times.append(np.concatenate(when))
        expiry.append(np.concatenate(ends))
    batch: Batch = {
        "tokens": pad_right(tokens, 0, device),
        "positions": pad_right(positions, 0, device),
        "query_time": pad_right(times, -NEVER, device),
        "key_time": pad_right(times, NEVER, device),
    }
    if header is not None or any(len(row.continuations) > 1 for row in rows):
        batch["key_expiry"] = pad_right(expiry, NEVER, device)
    needed = torch.zeros(batch["tokens"].shape, dtype=torch.bool, device=device)
    for r, states in at:
        needed[r, torch.from_numpy(states).to(device)] = True
    cache = None if header is None else header.repeat(len(rows), shared + needed.shape[1])
    wanted = needed if cache is None else None
    if len(rows) == 1 and 0 < max_tokens < needed.shape[1] and can_read_in_chunks(model):
        hidden = yield from yielding([], read_in_chunks(model, batch, max_tokens, wanted, cache))
    else:
        hidden = model(batch, ForwardContext(cache, needed_positions=wanted))
    yield from _read_scores(model, hidden, at, order, top)


def _read_scores(
    model: LM, hidden: Tensor, at: Sequence[tuple[int, np.ndarray]], order: Sequence[tuple[int, np.ndarray]], top: int
) -> Iterator[Scored]:
    """Yield the scores of continuations from hidden states (rows, T, hidden_size): all at the end, nothing before.

    Args:
        model: The model, whose LM head is run once for each position.
        hidden: Its states.
        at: Row, and the positions that predict the tokens, of each continuation.
        order: Index, and the tokens, of each continuation.
        top: How many of the most likely tokens are returned for each token.
    """
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    width = hidden.shape[1]
    flat = np.concatenate([r * width + states for r, states in at])
    labels = np.concatenate([continuation for _, continuation in order])
    places, which = np.unique(flat, return_inverse=True)  # the first tokens of branches share a position
    scores = TokenScores.zeros(len(labels), top)
    states = hidden.reshape(-1, hidden.shape[-1])
    for first in range(0, len(places), MAX_LOGIT_ROWS):
        if first:
            yield []
        some = torch.from_numpy(places[first : first + MAX_LOGIT_ROWS]).to(hidden.device)
        logits = _fp32_logits(head, states[some])
        mine = np.flatnonzero((which >= first) & (which < first + MAX_LOGIT_ROWS))
        local = torch.from_numpy(which[mine] - first).to(hidden.device)
        label = torch.from_numpy(labels[mine]).to(hidden.device)
        total = logits.logsumexp(-1)
        scores.logprobs[mine] = (logits[local, label] - total[local]).double().cpu().numpy()
        scores.most_likely[mine] = (logits.argmax(-1)[local] == label).cpu().numpy()
        if top:
            best = logits.topk(top, -1)
            scores.top_ids[mine] = best.indices[local].cpu().numpy()
            scores.top_logprobs[mine] = (best.values - total[:, None])[local].double().cpu().numpy()
    ends = np.cumsum([len(continuation) for _, continuation in order]).tolist()
    yield [
        (index, scores.part(stop - len(continuation), stop))
        for (index, continuation), stop in zip(order, ends, strict=True)
    ]


def _fp32_logits(head: LMHead, states: Tensor) -> Tensor:
    """Return logits (n, vocab_size) in fp32, also of a head in bf16, whose own logits of 16 to 32 have steps of 1/8.

    Log-probabilities of two choices would often be equal then. The product of the head is done in fp32, that of the blocks is
    not.
    """
    if type(head) is not LMHead or head.matrix.dtype != torch.bfloat16:
        return head(states).float()
    bias = None if head.bias is None else head.bias.float()
    return head.to_logits(F.linear(head.transform(states).float(), head.matrix.float(), bias))


def _teacher_forced(
    model: LM, vocab: Vocab, pairs: Sequence[ScoredPair], top: int, max_tokens: int
) -> Iterator[Scored]:
    """Score with an encoder-decoder: each source is encoded once."""
    device = model.tokens.weight.device
    order = sorted(
        range(len(pairs)), key=lambda i: (-len(pairs[i].prompt), tuple(pairs[i].prompt), -len(pairs[i].continuation))
    )
    longest = max(len(p.prompt) + len(p.continuation) for p in pairs)
    for first in range(0, len(order), step := max(1, (max_tokens or MAX_TOKENS) // longest)):
        index = order[first : first + step]
        sources: dict[tuple[int, ...], int] = {}
        which = [sources.setdefault(tuple(int(t) for t in pairs[i].prompt), len(sources)) for i in index]
        source = rectangle([np.array(one) for one in sources], device, causal=False)
        encoded = model.encoder_output({f"source_{name}": field for name, field in source.items()})
        rows = torch.tensor(which, device=device)
        chosen = EncoderOutput(
            encoded.hidden_states[rows],
            {name: field[rows] if len(field) > 1 else field for name, field in encoded.fields.items()},
        )
        targets = [np.asarray(pairs[i].continuation, np.int64) for i in index]
        batch = rectangle([np.concatenate(([vocab.start], one[:-1])) for one in targets], device)
        hidden = model(batch, ForwardContext(encoder_output=chosen))
        at = [(r, np.arange(len(one))) for r, one in enumerate(targets)]
        yield from _read_scores(model, hidden, at, list(zip(index, targets, strict=True)), top)


def score_gaps(model: LM, vocab: Vocab, pairs: Sequence[ScoredPair], top: int = 0) -> Iterator[tuple[int, TokenScores]]:
    """Yield (index, scores) of each continuation; see `gap_slices`."""
    return itertools.chain.from_iterable(gap_slices(model, vocab, pairs, top))


def gap_slices(
    model: LM, vocab: Vocab, pairs: Sequence[ScoredPair], top: int = 0, max_tokens: int = 0
) -> Iterator[Scored]:
    """Yield (index, scores) of continuations under an encoder-decoder trained on span corruption, the longest text first.

    Each forward pass yields what it completes.

    The analog of the pseudo-log-likelihood: each token, or with `word_starts` each word, is replaced by a sentinel in the
    source, and the target is this sentinel, the word and the next sentinel. The next sentinel ends the word, so its log p is
    added to that of the last token: without it "dog" would always be more likely than "dog" "s".

    Args:
        model: The model.
        vocab: Its vocabulary, with two sentinels, eos and the decoder start token.
        pairs: The pairs; the prompt may be empty.
        top: How many of the most likely tokens are returned for each token.
        max_tokens: Most tokens of a forward pass, at least those of one text; 0 for MAX_TOKENS.

    Raises:
        UserError: A continuation is empty, or a pair is longer than the model's context.
    """
    first, second = vocab.sentinels[:2]
    check_gap_lengths(model, pairs)
    for group in _groups(pairs):
        gaps: list[ScoredPair] = []
        at: list[tuple[int, int, int]] = []  # pair, and its tokens in the gap
        for i in group:
            pair = pairs[i]
            text = np.concatenate((pair.prompt, pair.continuation)).astype(np.int64)
            for start, stop in _words(pair):
                low, high = len(pair.prompt) + start, len(pair.prompt) + stop
                source = np.concatenate((text[:low], [first], text[high:], [vocab.eos]))
                gaps.append(ScoredPair(source, np.concatenate(([first], text[low:high], [second]))))
                at.append((i, start, stop))
        found = {i: TokenScores.zeros(len(pairs[i].continuation), top) for i in group}
        with inference_mode(model):
            for scored in _teacher_forced(model, vocab, gaps, top, max_tokens):
                for k, scores in scored:
                    i, start, stop = at[k]
                    found[i].put(start, scores.part(1, stop - start + 1))
                    found[i].logprobs[stop - 1] += scores.logprobs[-1]
                    found[i].most_likely[start] &= scores.most_likely[0]
                    found[i].most_likely[stop - 1] &= scores.most_likely[-1]
                yield []
        yield list(found.items())


def check_gap_lengths(model: LM, pairs: Sequence[ScoredPair]) -> None:
    """Raise a UserError if a pair is empty, or longer than the model's context once a word of it is a gap (`score_gaps`)."""
    for i, pair in enumerate(pairs):
        if not len(pair.continuation):
            raise UserError(f"pair {i}: the continuation is empty: give at least one token")
        words = [stop - start for start, stop in _words(pair)]
        source, target = len(pair.prompt) + len(pair.continuation) - min(words) + 2, max(words) + 2
        _check_length(i, max(source, target), model.context)


def _words(pair: ScoredPair) -> list[tuple[int, int]]:
    """Return the first token of each gap of a continuation, and the first one after it."""
    starts = np.ones(len(pair.continuation), bool) if pair.word_starts is None else np.array(pair.word_starts)
    starts[:1] = True
    return list(itertools.pairwise([*np.flatnonzero(starts).tolist(), len(starts)]))


def _groups(pairs: Sequence[ScoredPair]) -> Iterator[list[int]]:
    """Yield indices of pairs, the longest first, whose rows of one per token have MAX_GROUP_TOKENS tokens or one pair's."""
    group: list[int] = []
    total = 0
    lengths = [len(pair.prompt) + len(pair.continuation) for pair in pairs]
    for i in sorted(range(len(pairs)), key=lambda i: -lengths[i]):
        tokens = lengths[i] * len(pairs[i].continuation)
        if group and total + tokens > MAX_GROUP_TOKENS:
            yield group
            group, total = [], 0
        group.append(i)
        total += tokens
    if group:
        yield group


def _pseudo(model: LM, vocab: Vocab, pairs: Sequence[ScoredPair], top: int, max_tokens: int) -> Iterator[Scored]:
    """Score with a masked or permuted model: each token of the continuation masked in turn, all others visible.

    With `word_starts` the later tokens of the same word are masked too (Kauf and Ivanova 2023), since they would give the
    token away.
    """
    for group in _groups(pairs):
        yield from _pseudo_group(model, vocab, {i: pairs[i] for i in group}, top, max_tokens)


def _pseudo_group(
    model: LM, vocab: Vocab, pairs: Mapping[int, ScoredPair], top: int, max_tokens: int
) -> Iterator[Scored]:
    """Score some of the pairs, by index."""
    device, query = model.tokens.weight.device, model.config.embedding.mask
    jobs: list[tuple[int, int, np.ndarray, int]] = []  # pair, token of the continuation, masked row, its position
    for i, pair in pairs.items():
        text = vocab.add_special_tokens(np.concatenate((pair.prompt, pair.continuation)).astype(np.int64))
        offset = 1 + len(pair.prompt)
        for j in range(len(pair.continuation)):
            row, end = np.array(text, np.int64), j + 1
            while pair.word_starts is not None and end < len(pair.continuation) and not pair.word_starts[end]:
                end += 1
            row[offset + j : offset + end] = vocab.mask
            jobs.append((i, j, row, offset + j))
    jobs.sort(key=lambda job: -len(job[2]))
    found = {i: TokenScores.zeros(len(pair.continuation), top) for i, pair in pairs.items()}
    missing = {i: len(pair.continuation) for i, pair in pairs.items()}
    done = 0
    while done < len(jobs):
        some = jobs[done : done + max(1, (max_tokens or MAX_TOKENS) // len(jobs[done][2]))]
        done += len(some)
        batch = rectangle([row for *_, row, _ in some], device, causal=False)
        if query:  # a mask is a query that no position attends to
            batch["key_time"] = batch["key_time"].masked_fill(batch["tokens"] == vocab.mask, NEVER)
        needed = torch.zeros(batch["tokens"].shape, dtype=torch.bool, device=device)
        needed[torch.arange(len(some)), torch.tensor([place for *_, place in some])] = True
        hidden = model(batch, ForwardContext(needed_positions=needed))
        labels = [np.asarray(pairs[i].continuation[j : j + 1], np.int64) for i, j, *_ in some]
        at = [(r, np.array([place])) for r, (*_, place) in enumerate(some)]
        for scored in _read_scores(model, hidden, at, list(enumerate(labels)), top):
            for r, scores in scored:
                i, j = some[r][:2]
                found[i].put(j, scores)
                missing[i] -= 1
            yield [(i, found.pop(i)) for i in [*found] if not missing[i]]
