"""Batches for inference: padded rectangles of token ids, and a batch that grows by one token per decoding step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from firth.data.attention_fields import causal_after_prompt
from firth.generate.native_decoder import NativeDecoder
from firth.generate.sampling import Sampling, draw, filtered, repetition_penalty, uniforms
from firth.model.forward_context import ForwardContext
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.types import NEVER, Batch


@contextmanager
def inference_mode(model: LM) -> Iterator[None]:
    """Disable gradients and dropout in this context; the model's training mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


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


def _stack_left(a: Tensor, b: Tensor) -> Tensor:
    """Return the rows of a and b (rows, T), the shorter ones padded on the left with their first token."""
    longest = max(a.shape[1], b.shape[1])
    return torch.cat([torch.cat((x[:, :1].expand(-1, longest - x.shape[1]), x), 1) for x in (a, b)])


def _stack_right(a: Tensor, b: Tensor) -> Tensor:
    """Return the rows of a and b (rows, T), the shorter ones padded on the right with 0."""
    longest = max(a.shape[1], b.shape[1])
    return torch.cat([F.pad(x, (0, longest - x.shape[1])) for x in (a, b)])


class DecodingBatch:
    """Rows during decoding: the KV cache and the last token of each row. Equal prompts are read once.

    Prompts are padded on the left, so that all rows write into the same cache slot; the key time of padding is NEVER.
    Positions are counted per row, so that a row has the same logits as it would alone.

    Args:
        model: A model with an LM head.
        prompts: Token ids (n,) each.
        start: The decoder start token if the prompt goes to the encoder; None for a decoder-only model.
        sampling: How tokens are drawn.
        seeds: One per row.
        latents: (rows, units), the latent codes that a variational autoencoder decodes in place of the prompts.
    """

    def __init__(
        self, model: LM, prompts: Sequence[np.ndarray], start: int | None, sampling: Sampling, seeds: Sequence[int],
        latents: Tensor | None = None,
    ):  # fmt: skip
        self.model, self.sampling = model, sampling
        self.head: LMHead = model.heads["lm"]  # type: ignore[assignment]
        self.device = model.tokens.weight.device
        batch: Batch = {}
        prompts, repeats = _distinct(prompts) if latents is None else (prompts, None)
        if start is not None:
            source = rectangle(prompts, self.device, causal=False)
            batch = {f"source_{name}": field for name, field in source.items()}
            prompts = [np.array([start])] * len(prompts)
        batch |= self._pad_left(prompts)
        self.seen = batch["tokens"]
        self.next = batch["positions"][:, -1:] + 1
        self.started = False
        # The uniform numbers that each row still draws with: (rows, most tokens to come).
        self.uniform = torch.from_numpy(uniforms(seeds, 0 if sampling.greedy else sampling.max_new_tokens)).to(
            self.device
        )
        self.cache = model.make_cache(len(prompts), self.seen.shape[1] + sampling.max_new_tokens)
        last = torch.zeros_like(self.seen, dtype=torch.bool)
        last[:, -1] = True
        output = None if latents is None else model.latent_output(latents)
        context = ForwardContext(self.cache, output, needed_positions=last)
        self.state = model(batch, context)[:, -1]  # (rows, hidden_size)
        if repeats is not None:
            index = torch.tensor(repeats, device=self.device)
            self.cache.select(index)
            self.state, self.seen, self.next = self.state[index], self.seen[index], self.next[index]
        self.cache.start_decoding()
        self.decoder = NativeDecoder.of(model, self.cache)
        """The compiled step, or None if torch's operators are used."""

    def _pad_left(self, rows: Sequence[np.ndarray]) -> Batch:
        """Return rows padded on the left: tokens, positions, query_time and key_time, each (rows, T) int64."""
        longest = max(map(len, rows))
        # Padding repeats the row's first token, so that the repetition penalty applies to no other token.
        tokens = np.stack([np.concatenate((np.full(longest - len(r), r[0]), r)) for r in rows]).astype(np.int64)
        offsets = np.stack([np.arange(longest) - (longest - len(r)) for r in rows])
        positions = torch.from_numpy(offsets.clip(0)).to(self.device)
        # A prefix LM reads its prompt bidirectionally.
        query_time = positions * (not self.model.config.attention.prefix_lm)
        key_time = query_time.masked_fill(torch.from_numpy(offsets < 0).to(self.device), NEVER)
        ids = torch.from_numpy(tokens).to(self.device)
        return {"tokens": ids, "positions": positions, "query_time": query_time, "key_time": key_time}

    def step(self) -> tuple[list[int], list[float]]:
        """Append one token to every row and return the tokens and their log-probabilities."""
        logits = self._logits().float()
        scores = logits
        if self.sampling.repetition_penalty != 1:
            scores = repetition_penalty(scores, self.seen, self.sampling.repetition_penalty)
        if self.sampling.greedy:
            token = scores.max(-1, keepdim=True).indices  # argmax takes half as long again
        else:
            token = draw(filtered(scores, self.sampling), self.uniform[:, 0])[:, None]
            self.uniform = self.uniform[:, 1:]
        logprob = logits.gather(-1, token)[:, 0] - logits.logsumexp(-1)
        self.seen = torch.cat((self.seen, token), 1) if self.sampling.repetition_penalty != 1 else token
        self.started = True
        return token[:, 0].tolist(), logprob.tolist()

    def _logits(self) -> Tensor:
        """Run the model on the last token of each row and return the next token's logits: (rows, vocab)."""
        if self.started:
            token, self.next = self.seen[:, -1:], self.next + 1
            # A finished row is decoded with the others, and may be at the end of the context.
            positions = (self.next - 1).clamp(max=self.model.context - 1)
            if self.decoder is not None:
                return self.decoder(token, positions)
            self.state = self.model({"tokens": token, "positions": positions}, ForwardContext(self.cache))[:, -1]
        return self.head(self.state)

    def join(self, rows: Sequence[int], other: DecodingBatch) -> None:
        """Drop all rows but these, and add the rows of a batch of the same model and sampling. Both have taken a step or more."""
        index = torch.tensor(rows, device=self.device)
        self.cache = self.cache.merge(index, other.cache, self.sampling.max_new_tokens)
        self.next = torch.cat((self.next[index], other.next))
        self.seen = _stack_left(self.seen[index], other.seen)
        self.uniform = _stack_right(self.uniform[index], other.uniform)
        self.decoder = NativeDecoder.of(self.model, self.cache)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        index = torch.tensor(rows, device=self.device)
        self.cache.select(index)
        self.seen, self.next, self.uniform = self.seen[index], self.next[index], self.uniform[index]
        if self.decoder is not None:
            self.decoder = NativeDecoder.of(self.model, self.cache)
