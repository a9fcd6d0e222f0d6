"""Batches for inference: padded rectangles of token ids, prompts read into a cache, and rows that grow by a token a step.

prompts = read_prompts(model, [first, second])       # padded on the left; equal prompts are read once
rows = DecodingBatch(model, max_rows=2)
rows.add(prompts, capacity=40)
logits = rows.logits([token, other])                 # of the token after these
rows.remove([0])
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from firth.data.attention_fields import causal_after_prompt
from firth.generate.native_decoder import NativeDecoder
from firth.model.forward_context import ForwardContext
from firth.model.heads import LMHead
from firth.model.kv_cache import KVCache
from firth.model.model import LM
from firth.types import NEVER, Batch


@contextmanager
def inference_mode(model: LM) -> Iterator[None]:
    """Disable gradients and dropout in this context; the model's training mode is restored afterwards."""
    training = model.training
    if training:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        if training:
            model.train()


def pad_right(rows: Sequence[np.ndarray], fill: int, device: torch.device) -> Tensor:
    """Return rows padded on the right with `fill`: (rows, T) int64."""
    longest = max(map(len, rows))
    padded = np.stack([np.pad(np.asarray(r, np.int64), (0, longest - len(r)), constant_values=fill) for r in rows])
    return torch.from_numpy(padded).to(device)


def rectangle(
    rows: Sequence[np.ndarray], device: torch.device, causal: bool = True, prompts: Sequence[int] | None = None
) -> Batch:
    """Return rows as in training, padded on the right.

    Args:
        rows: Token ids (n,) each.
        device: Where the batch is put.
        causal: Whether a token attends only to itself and earlier ones.
        prompts: The number of tokens at the start of each row with bidirectional attention, for a prefix language model.

    Returns:
        `tokens`, `query_time` and `key_time`, each (rows, T) int64.
    """
    times = [np.arange(len(r)) * causal for r in rows]
    if prompts is not None:
        times = [causal_after_prompt(len(r), n)["query_time"] for r, n in zip(rows, prompts, strict=True)]
    return {
        "tokens": pad_right(rows, 0, device),
        "query_time": pad_right(times, -NEVER, device),
        "key_time": pad_right(times, NEVER, device),
    }


def _distinct(prompts: Sequence[np.ndarray]) -> tuple[Sequence[np.ndarray], list[int] | None]:
    """Return the distinct prompts and, if some are equal, the index of each prompt among them; else None."""
    known: dict[bytes, int] = {}
    index = [known.setdefault(np.asarray(prompt, np.int64).tobytes(), len(known)) for prompt in prompts]
    if len(known) == len(prompts):
        return prompts, None
    return [prompts[index.index(i)] for i in range(len(known))], index


def _pad_left(model: LM, rows: Sequence[np.ndarray]) -> Batch:
    """Return rows padded on the left: tokens, positions, query_time and key_time, each (rows, T) int64."""
    longest, device = max(map(len, rows)), model.tokens.weight.device
    tokens = np.stack([np.concatenate((np.full(longest - len(r), r[0]), r)) for r in rows]).astype(np.int64)
    offsets = np.stack([np.arange(longest) - (longest - len(r)) for r in rows])
    positions = torch.from_numpy(offsets.clip(0)).to(device)
    # A prefix LM reads its prompt bidirectionally.
    query_time = positions * (not model.config.attention.prefix_lm)
    key_time = query_time.masked_fill(torch.from_numpy(offsets < 0).to(device), NEVER)
    ids = torch.from_numpy(tokens).to(device)
    return {"tokens": ids, "positions": positions, "query_time": query_time, "key_time": key_time}


@dataclass(frozen=True)
class ReadPrompts:
    """Prompts that the model has read.

    Args:
        cache: Their keys and values; a row for each distinct prompt.
        states: The hidden state (prompts, hidden_size) that predicts the first token of each answer.
        rows: The row of each prompt in the cache.
        lengths: Tokens of each prompt in the decoder.
    """

    cache: KVCache
    states: Tensor
    rows: Sequence[int]
    lengths: Sequence[int]


def read_prompts(
    model: LM,
    prompts: Sequence[np.ndarray],
    start: int | None = None,
    latents: Tensor | None = None,
    decoder: NativeDecoder | None = None,
) -> ReadPrompts:
    """Run the model on whole prompts, each distinct one once.

    Args:
        model: A model with an LM head.
        prompts: Token ids (n,) each.
        start: The decoder start token if the prompt goes to the encoder; None for a decoder-only model.
        latents: (prompts, units), the latent codes that a variational autoencoder decodes in place of the prompts.
        decoder: The compiled step, if it reads prompts.
    """
    batch: Batch = {}
    prompts, repeats = _distinct(prompts) if latents is None else (prompts, None)
    if decoder is not None:
        cache = KVCache(len(prompts), max(map(len, prompts)))
        states = _read_natively(decoder, cache, prompts, [0] * len(prompts))
        rows = [*range(len(prompts))] if repeats is None else repeats
        return ReadPrompts(cache, states[rows], rows, [len(prompts[r]) for r in rows])
    if start is not None:
        source = rectangle(prompts, model.tokens.weight.device, causal=False)
        batch = {f"source_{name}": field for name, field in source.items()}
        prompts = [np.array([start])] * len(prompts)
    batch |= _pad_left(model, prompts)
    cache = model.make_cache(*batch["tokens"].shape)
    last = torch.zeros_like(batch["tokens"], dtype=torch.bool)
    last[:, -1] = True
    output = None if latents is None else model.latent_output(latents)
    states = model(batch, ForwardContext(cache, output, needed_positions=last))[:, -1]
    rows = [*range(len(prompts))] if repeats is None else repeats
    return ReadPrompts(cache, states if repeats is None else states[repeats], rows, [len(prompts[r]) for r in rows])


def _read_natively(
    decoder: NativeDecoder, cache: KVCache, texts: Sequence[np.ndarray], positions: Sequence[int]
) -> Tensor:
    """Run the compiled step on the next tokens of each row of a cache, which all end in the same slot.

    Args:
        decoder: The compiled step.
        cache: The cache.
        texts: (n,) token ids of each row.
        positions: The position of the first one of each row.

    Returns:
        The last state of each row, (rows, hidden_size).
    """
    longest = max(map(len, texts))
    rows = [row for row, text in enumerate(texts) for _ in text]
    starts = [cache.length + longest - len(text) - at for text, at in zip(texts, positions, strict=True) for _ in text]
    own = np.concatenate([np.arange(at, at + len(text)) for text, at in zip(texts, positions, strict=True)])
    ids = torch.from_numpy(np.concatenate(texts).astype(np.int64))
    states = decoder.read(cache, ids, rows, torch.from_numpy(own), starts, longest)
    ends = torch.tensor([len(text) for text in texts]).cumsum(0) - 1
    return states[ends]


def read_chunk(
    model: LM, cache: KVCache, tokens: np.ndarray, start: int, decoder: NativeDecoder | None = None
) -> Tensor:
    """Run a causal decoder on the next tokens (n,) of a prompt, from position `start`; return its last state (1, hidden_size).

    `decoder` is the compiled step, if it reads prompts.
    """
    if decoder is not None:
        return _read_natively(decoder, cache, [tokens], [start])
    device = model.tokens.weight.device
    positions = torch.arange(start, start + len(tokens), device=device)[None]
    ids = torch.from_numpy(np.asarray(tokens, np.int64)).to(device)[None]
    batch = {"tokens": ids, "positions": positions, "query_time": positions, "key_time": positions}
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    return model(batch, ForwardContext(cache, needed_positions=last))[:, -1]


class DecodingBatch:
    """Rows during decoding, which join and leave between steps. A row does not depend on the others.

    Args:
        model: A model with an LM head.
        max_rows: Most rows.

    Attributes:
        cache: Keys and values of the rows.
        decoder: The compiled step, or None if torch's operators are used.
        reader: The same if it reads prompts, else None.
    """

    def __init__(self, model: LM, max_rows: int):
        self.model, self.cache = model, model.make_decoding_cache(max_rows)
        self.head: LMHead = model.heads["lm"]  # type: ignore[assignment]
        self.trained = model.num_virtual_tokens()
        self.decoder = NativeDecoder.of(model)
        self.reader = self.decoder if self.decoder is not None and self.decoder.reads_prompts else None
        self._allocations = 0

    def add(self, prompts: ReadPrompts, capacity: int) -> None:
        """Add a row for each prompt; a row with its answer has at most `capacity` tokens."""
        lengths = [n + self.trained for n in prompts.lengths]
        self.cache.add(prompts.cache, prompts.rows, lengths, capacity + self.trained)
        if self._allocations != self.cache.allocations:
            self._allocations = self.cache.allocations
            if self.decoder is not None and not self.decoder.bind(self.cache):
                self.decoder = self.reader = None

    def remove(self, rows: Collection[int]) -> list[int]:
        """Remove rows, and return the old index of the row that is now in each place."""
        return self.cache.remove(rows)

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Run the model on the next token of each row and return the logits of the token after it: (rows, vocab)."""
        slots = self.cache.next_slots()
        ids = torch.tensor(tokens, device=slots.device)[:, None]
        if self.decoder is not None and len(tokens) <= self.decoder.max_rows:
            return self.decoder(ids)
        batch = {"tokens": ids, "positions": slots[:, None] - self.trained}
        return self.head(self.model(batch, ForwardContext(self.cache))[:, -1])
