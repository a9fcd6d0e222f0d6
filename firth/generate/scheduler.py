"""Iteration-level batching: requests join and leave a running batch between steps (Yu 2022, Orca).

    scheduler = Scheduler(engine)
    scheduler.submit(GenerationRequest(tokenizer.encode("To be"), Sampling(temperature=0)))
    while scheduler.busy:
        for update in scheduler.step():
            print(update.id, update.text)

A step decodes one token of every running row, then reads prompts that wait: at most `prefill_chunk` tokens, so that running
rows never wait longer than that. A long prompt is read in chunks over several steps; prompts that fit into half a chunk
overtake it. Each row has sampling parameters, a random stream and an end of its own, and its answer does not depend on the
rows that run with it. `Engine.generate` runs on this loop too.

Tokens of a causal decoder have the same keys and values whatever follows them. A cache stores those of prompts, within a number of
bytes, in blocks of BLOCK tokens; prompts with a common beginning share its blocks. The least recently used block goes first; a
block is used whenever a longer prefix is, so no block outlives the one before it.

>>> cache = PrefixCache(max_bytes=1 << 20)
>>> cache.length(np.arange(40)), cache.bytes
(0, 0)
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from firth.generate.decoding_batch import DecodingBatch, ReadPrompts, inference_mode, read_chunk, read_prompts
from firth.generate.native_kernels import summarize
from firth.generate.output import Completion, StreamingOutput
from firth.generate.sampling import NEGATIVE_INFINITY, Sampling, next_tokens, uniforms
from firth.model.kv_cache import KVCache
from firth.model.model import LM

BLOCK = 16
"""Tokens of a block: only whole blocks are shared."""


@dataclass(frozen=True)
class _Block:
    """Keys and values (2, layers, KV, slots, D) of BLOCK tokens; the first block of a prompt has the trained positions too."""

    id: int
    pairs: Tensor


class PrefixCache:
    """Keys and values of prompts.

    Args:
        max_bytes: Most bytes of all blocks; 0: nothing is stored.
        trained: Trained positions before each text (`LM.num_virtual_tokens`).

    Attributes:
        bytes: Bytes of all blocks.
    """

    def __init__(self, max_bytes: int, trained: int = 0):
        self.max_bytes, self.trained, self.bytes = max_bytes, trained, 0
        # (id of the block before, token ids) -> block, the least recently used first
        self._blocks: OrderedDict[tuple[int, bytes], _Block] = OrderedDict()
        self._next_id = 1

    def length(self, prompt: np.ndarray) -> int:
        """Return the tokens of the longest known prefix of a prompt (n,) that leaves a token to read."""
        return BLOCK * len(self._path(prompt, (len(prompt) - 1) // BLOCK))

    def find(self, prompt: np.ndarray) -> Tensor:
        """Return keys and values (2, layers, KV, slots, D) of that prefix, with those of the trained positions."""
        return torch.cat([block.pairs for block in self._path(prompt, (len(prompt) - 1) // BLOCK)], 3)

    def store(self, prompt: np.ndarray, cache: KVCache, row: int) -> None:
        """Store the whole blocks of a prompt (n,), as many as there is room for.

        Args:
            prompt: Token ids (n,).
            cache: Holds the prompt; it ends in the last slot in use.
            row: The row of the prompt.
        """
        count = len(prompt) // BLOCK
        if not self.max_bytes or not count:
            return
        known = self._path(prompt, count)
        parent, own = (known[-1].id if known else 0), sum(block.pairs.nbytes for block in known)
        start = cache.length - len(prompt)
        for i in range(len(known), count):
            slots = torch.arange(start + i * BLOCK, start + (i + 1) * BLOCK, device=cache.keys[0].device)
            if not i and self.trained:
                slots = torch.cat((torch.arange(self.trained, device=slots.device), slots))
            pairs = torch.stack([torch.stack([x[row][:, slots] for x in side]) for side in (cache.keys, cache.values)])
            own += pairs.nbytes
            if own > self.max_bytes:
                break
            while self.bytes + pairs.nbytes > self.max_bytes:
                self.bytes -= self._blocks.popitem(last=False)[1].pairs.nbytes
            self._blocks[parent, _key(prompt, i)] = _Block(self._next_id, pairs)
            self.bytes += pairs.nbytes
            parent, self._next_id = self._next_id, self._next_id + 1
        self._path(prompt, count)

    def _path(self, prompt: np.ndarray, most: int) -> list[_Block]:
        """Return the known blocks at the start of a prompt, at most so many, and mark them as used."""
        found, used, parent = [], [], 0
        for i in range(most):
            key = parent, _key(prompt, i)
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
            used.append(key)
            parent = block.id
        for key in reversed(used):
            self._blocks.move_to_end(key)
        return found


def _key(prompt: np.ndarray, block: int) -> bytes:
    """Return the token ids of a block as bytes."""
    return np.asarray(prompt[block * BLOCK : (block + 1) * BLOCK], np.int64).tobytes()


class TokenConstraint(Protocol):
    """What the tokens of one answer may be, for structured output."""

    def mask(self, tokens: Sequence[int]) -> np.ndarray:
        """Return (V,) bool, whether each id may follow these tokens of the answer. If none may, a stop token ends it.

        Ids beyond the end of a shorter array may not. An exception would end all running requests.
        """

    def accept(self, token: int) -> None:
        """Take note of the next token of the answer, unless it is a stop token."""


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """One prompt and how to continue it.

    Args:
        prompt: (n,) token ids.
        sampling: How tokens are drawn; its seed is not used.
        seed: Seed of the answer.
        top_logprobs: Number of alternatives to return with each token.
        constraint: Restricts the tokens; used for this request only.
        latent: (units,), the latent code that a variational autoencoder decodes in place of the prompt.
        stream: Whether updates have text; a completion always has it.
    """

    prompt: np.ndarray
    sampling: Sampling
    seed: int = 0
    top_logprobs: int = 0
    constraint: TokenConstraint | None = None
    latent: Tensor | None = None
    stream: bool = True


@dataclass(frozen=True)
class Update:
    """The next token of a request.

    Args:
        id: Of the request.
        token: The token.
        logprob: Its log-probability under the model (temperature 1, no filter).
        alternatives: The most likely tokens and their log-probabilities, most likely first.
        text: Final text since the last update; often empty, since a character can span several tokens.
        completion: The whole answer, with its last token.
    """

    id: int
    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    text: str
    completion: Completion | None


class _Row:
    """A request from its submission to its last token."""

    def __init__(self, id: int, request: GenerationRequest, output: StreamingOutput, context: list[int]):
        self.id, self.request, self.output = id, request, output
        sampling = request.sampling
        self.filters = replace(sampling, max_new_tokens=1, stop_strings=(), seed=0)
        self.uniform = np.zeros(0) if sampling.greedy else uniforms([request.seed], output.limit)[0]
        self.takes_best = sampling.greedy and sampling.repetition_penalty == 1 and request.constraint is None
        """Whether each token is the most likely one."""
        self.context = context
        """The decoder's tokens before the answer."""
        self.shown = 0
        """Characters in updates so far."""

    def new_text(self) -> str:
        """Return the final text that has not been returned before."""
        if not self.request.stream:
            return ""
        text = self.output.final_text
        shown, self.shown = self.shown, len(text)
        return text[shown:]


@dataclass
class _Reading:
    """A prompt of which the first `done` tokens are in its cache."""

    row: _Row
    cache: KVCache
    done: int

    @property
    def left(self) -> int:
        """Tokens still to read."""
        return len(self.row.request.prompt) - self.done


class Decoder(Protocol):
    """What a scheduler needs of `firth.generate.engine.Engine`.

    Attributes:
        model: A model with an LM head.
        stops: Token ids that end an answer.
        start: The first token of an answer of an encoder-decoder; else None.
    """

    model: LM
    stops: frozenset[int]
    start: int | None

    def output(self, prompt: np.ndarray, sampling: Sampling) -> StreamingOutput:
        """Return the empty answer to a prompt (n,)."""


class Scheduler:
    """Decodes many requests together; each may come and go at any time. Not thread-safe.

    Args:
        engine: Its model and tokenizer.
        max_rows: Most requests that run at once; others wait.
        prefill_chunk: Most tokens of prompts to read in a step. A prompt that must be read at once (of an encoder or a prefix
            language model) may be longer.
        prefix_cache_bytes: Most memory for keys and values of earlier prompts.
        min_free_rows: Waiting prompts are admitted once so many rows are free: reading several at once is faster.
    """

    def __init__(
        self, engine: Decoder, max_rows: int = 16, prefill_chunk: int = 256, prefix_cache_bytes: int = 64 << 20,
        min_free_rows: int = 1,
    ):  # fmt: skip
        self.engine, self.max_rows, self.prefill_chunk = engine, max_rows, prefill_chunk
        self.min_free_rows = min_free_rows
        model, config = engine.model, engine.model.config
        self.reads_whole = engine.start is not None or config.attention.prefix_lm
        reusable = not self.reads_whole and not config.rnn.type
        self.prefixes = PrefixCache(prefix_cache_bytes if reusable else 0, model.num_virtual_tokens())
        self.batch = DecodingBatch(model, max_rows)
        self.rows: list[_Row] = []  # in the order of the batch
        self.waiting: deque[_Row] = deque()
        self.reading: _Reading | None = None
        self.next_id = 0

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self.waiting or self.rows or self.reading)

    def submit(self, request: GenerationRequest) -> int:
        """Add a request and return its id.

        Raises:
            UserError: The prompt is empty or longer than the model's context.
        """
        output = self.engine.output(request.prompt, request.sampling)
        start = self.engine.start
        context = [int(t) for t in request.prompt] if start is None else [start]
        self.waiting.append(_Row(self.next_id, request, output, context))
        self.next_id += 1
        return self.waiting[-1].id

    def cancel(self, id: int) -> None:
        """End a request without a completion; its row is free at once. A request that has finished is left alone."""
        self.waiting = deque(row for row in self.waiting if row.id != id)
        if self.reading is not None and self.reading.row.id == id:
            self.reading = None
        with inference_mode(self.engine.model):
            self._remove([i for i, row in enumerate(self.rows) if row.id == id])

    def step(self) -> list[Update]:
        """Decode a token of every running row, then read waiting prompts; return the new tokens, one per request at most."""
        updates: list[Update] = []
        with inference_mode(self.engine.model):
            if self.rows:
                logits = self.batch.logits([row.output.tokens[-1] for row in self.rows])
                updates = self._append(self.rows, logits)
                self._remove([i for i, row in enumerate(self.rows) if row.output.finish is not None])
            return updates + self._read()

    def _remove(self, rows: Sequence[int]) -> None:
        if rows:
            self.rows = [self.rows[i] for i in self.batch.remove(rows)]

    # ---- prompts

    def _read(self) -> list[Update]:
        """Read waiting prompts within the limit of a step; return the first tokens of those that are read."""
        model, updates, budget = self.engine.model, [], self.prefill_chunk
        group, alone = self._admit(budget if self.reading is None else budget // 2)
        if group:
            latents = None if group[0].request.latent is None else torch.stack([r.request.latent for r in group])  # type: ignore[misc]
            reader = None if latents is not None else self.batch.reader
            prompts = read_prompts(model, [row.request.prompt for row in group], self.engine.start, latents, reader)
            for row, at in {at: (row, at) for row, at in zip(group, prompts.rows, strict=True)}.values():
                self.prefixes.store(row.request.prompt, prompts.cache, at)
            updates += self._join(group, prompts)
            budget -= _padded(group)
        for reading in (*alone, self.reading):
            if reading is not None and budget > 0:
                count = min(budget, reading.left)
                updates += self._read_chunk(reading, count)
                budget -= count
        return updates

    def _admit(self, limit: int) -> tuple[list[_Row], list[_Reading]]:
        """Take prompts from those that wait: some to read together, and some of which the beginning is known.

        The first prompt that is too long for this step becomes `reading`.
        """
        group: list[_Row] = []
        alone: list[_Reading] = []
        later: list[_Row] = []
        free = self.max_rows - len(self.rows) - (self.reading is not None)
        if free < self.min_free_rows:
            return group, alone
        while self.waiting and free:
            row = self.waiting.popleft()
            spent = _padded(group) + sum(each.left for each in alone)
            known = self.prefixes.length(row.request.prompt)
            cost = len(row.request.prompt) - known if known else _padded([*group, row]) - _padded(group)
            fits = spent + cost <= limit or (self.reads_whole and not spent)
            if fits and known:
                alone.append(self._begin(row, known))
            elif fits and (not group or (row.request.latent is None) == (group[0].request.latent is None)):
                group.append(row)
            elif not fits and self.reading is None and not self.reads_whole:
                self.reading = self._begin(row, known)
            else:
                later.append(row)
                continue
            free -= 1
        self.waiting.extendleft(reversed(later))
        return group, alone

    def _begin(self, row: _Row, known: int) -> _Reading:
        """Return a prompt whose first `known` tokens are taken from the prefix cache."""
        prompt = row.request.prompt
        cache = self.engine.model.make_cache(1, len(prompt))
        if known:
            cache.load(self.prefixes.find(prompt), self.prefixes.trained)
        return _Reading(row, cache, known)

    def _read_chunk(self, reading: _Reading, count: int) -> list[Update]:
        """Read the next tokens of a prompt; return the first token of its answer if that was all of it."""
        prompt = reading.row.request.prompt
        tokens = prompt[reading.done : reading.done + count]
        state = read_chunk(self.engine.model, reading.cache, tokens, reading.done, self.batch.reader)
        reading.done += count
        if reading.left:
            return []
        if reading is self.reading:
            self.reading = None
        self.prefixes.store(prompt, reading.cache, 0)
        return self._join([reading.row], ReadPrompts(reading.cache, state, [0], [len(prompt)]))

    def _join(self, rows: Sequence[_Row], prompts: ReadPrompts) -> list[Update]:
        """Draw the first token of each row, and add those that go on to the batch."""
        updates = self._append(rows, self.batch.head(prompts.states))
        running = [i for i, row in enumerate(rows) if row.output.finish is None]
        if running:
            kept = replace(
                prompts, rows=[prompts.rows[i] for i in running], lengths=[prompts.lengths[i] for i in running]
            )
            self.batch.add(kept, max(prompts.lengths[i] + rows[i].output.limit for i in running))
            self.rows += [rows[i] for i in running]
        return updates

    # ---- tokens

    def _append(self, rows: Sequence[_Row], logits: Tensor) -> list[Update]:
        """Draw the next token of each row from its logits (rows, V)."""
        logits = logits.float()
        best, normalizer = summarize(logits)
        tokens = best if all(row.takes_best for row in rows) else self._draw(rows, logits)
        logprobs = (logits.gather(-1, tokens[:, None])[:, 0] - normalizer).tolist()
        alternatives = _alternatives(rows, logits, normalizer)
        updates = []
        for i, (row, token, logprob) in enumerate(zip(rows, tokens.tolist(), logprobs, strict=True)):
            output = row.output
            output.append(token, logprob)
            if row.request.constraint is not None and token not in self.engine.stops:
                row.request.constraint.accept(token)
            done = None if output.finish is None else output.done()
            updates.append(Update(row.id, token, logprob, alternatives.get(i, ()), row.new_text(), done))
        return updates

    def _draw(self, rows: Sequence[_Row], logits: Tensor) -> Tensor:
        """Return the next token of each row, (rows,) int64. Rows with the same parameters are drawn together."""
        if any(row.request.constraint is not None for row in rows):
            logits = logits.clone()
            for i, row in enumerate(rows):
                if row.request.constraint is not None:
                    logits[i].masked_fill_(~self._allowed(row, logits), NEGATIVE_INFINITY)
        groups: dict[Sampling, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.filters, []).append(i)
        if len(groups) == 1:
            return _draw_alike(rows, logits)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        for index in groups.values():
            tokens[index] = _draw_alike([rows[i] for i in index], logits[index])
        return tokens

    def _allowed(self, row: _Row, logits: Tensor) -> Tensor:
        """Return which tokens (V,) bool the constraint of a row allows: the stop tokens if there are no others."""
        mask = np.asarray(row.request.constraint.mask(row.output.tokens), bool)  # type: ignore[union-attr]
        allowed = torch.zeros(logits.shape[-1], dtype=torch.bool)
        allowed[: len(mask)] = torch.from_numpy(mask)
        if not mask.any():
            allowed[sorted(self.engine.stops)] = True
        return allowed.to(logits.device)


def _padded(rows: Sequence[_Row]) -> int:
    """Return the size of a batch of these prompts."""
    return len(rows) * max((len(row.request.prompt) for row in rows), default=0)


def _draw_alike(rows: Sequence[_Row], logits: Tensor) -> Tensor:
    """Return the next token of rows with the same parameters, (rows,) int64."""
    sampling, uniform, seen = rows[0].filters, None, None
    if not sampling.greedy:
        numbers = np.array([row.uniform[len(row.output.tokens)] for row in rows], np.float32)
        uniform = torch.from_numpy(numbers).to(logits.device)
    if sampling.repetition_penalty != 1:
        texts = [row.context + row.output.tokens for row in rows]
        longest = max(map(len, texts))
        # Padding repeats a token of the row, so that the penalty applies to no other token.
        seen = torch.tensor([[text[0]] * (longest - len(text)) + text for text in texts], device=logits.device)
    return next_tokens(logits, sampling, uniform, seen)


def _alternatives(rows: Sequence[_Row], logits: Tensor, normalizer: Tensor) -> dict[int, tuple[tuple[int, float], ...]]:
    """Return the most likely tokens of the rows that want them, by row."""
    wanted = {i: row.request.top_logprobs for i, row in enumerate(rows) if row.request.top_logprobs}
    if not wanted:
        return {}
    index = list(wanted)
    top = (logits[index] - normalizer[index, None]).topk(min(max(wanted.values()), logits.shape[-1]), -1)
    found = zip(wanted.items(), top.indices.tolist(), top.values.tolist(), strict=True)
    return {i: tuple(zip(tokens[:count], values[:count], strict=True)) for (i, count), tokens, values in found}
