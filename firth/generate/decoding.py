"""Rows of tokens as a model reads them to write or to score: rectangles, and a batch that grows by a token a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from firth.data.layout import causal_after_prompt
from firth.generate.native_decoder import NativeDecoder
from firth.generate.sampling import Sampling, draw, filtered, repetition_penalty, uniforms
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.types import NEVER, Batch


@contextmanager
def attention_pattern_of(model: LM) -> Iterator[None]:
    """Without gradients and without dropout; the model is left in the mode it was in."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def stacked(rows: Sequence[np.ndarray], fill: int, device: torch.device) -> Tensor:
    """Rows on the left of a rectangle: (rows, T) int64."""
    most = max(map(len, rows))
    full = np.stack([np.pad(np.asarray(r, np.int64), (0, most - len(r)), constant_values=fill) for r in rows])
    return torch.from_numpy(full).to(device)


def rectangle(
    rows: Sequence[np.ndarray], device: torch.device, causal: bool = True, prompts: Sequence[int] | None = None
) -> Batch:
    """Rows as a model is trained on them, padded on the right: tokens, looks, appears, each (rows, T) int64.

    prompts: how many tokens at the beginning of each row are read both ways, for a prefix language model.
    """
    when = [np.arange(len(r)) * causal for r in rows]
    if prompts is not None:
        when = [causal_after_prompt(len(r), n)["query_time"] for r, n in zip(rows, prompts, strict=True)]
    looks, appears = stacked(when, -NEVER, device), stacked(when, NEVER, device)
    return {"tokens": stacked(rows, 0, device), "query_time": looks, "key_time": appears}


class DecodingBatch:
    """A batch of rows being written: the cache, and the newest token of each row.

    Prompts are padded on the left, so that all rows write into the same slot; padding appears NEVER. Positions are
    each row's own, so that a row reads as it would alone. prompts: (n,) ids each. start: None, or the token that the
    decoder begins with while the prompt goes to the encoder. seeds: one per row. latents (rows, units): what a variational
    autoencoder's decoder is told in place of the prompts.
    """

    def __init__(
        self, model: LM, prompts: Sequence[np.ndarray], start: int | None, sampling: Sampling, seeds: Sequence[int],
        latents: Tensor | None = None,
    ):  # fmt: skip
        self.model, self.sampling = model, sampling
        self.head: LMHead = model.heads["lm"]  # type: ignore[assignment]
        self.device = model.tokens.weight.device
        batch: Batch = {}
        if start is not None:
            source = rectangle(prompts, self.device, causal=False)
            batch = {f"source_{name}": field for name, field in source.items()}
            prompts = [np.array([start])] * len(prompts)
        batch |= self._aligned(prompts)
        self.seen = batch["tokens"]
        self.next = batch["positions"][:, -1:] + 1
        self.written = 0
        # Every number that this batch will draw with: (rows, max_new).
        self.uniform = torch.from_numpy(uniforms(seeds, 0 if sampling.greedy else sampling.max_new_tokens)).to(
            self.device
        )
        self.cache = model.make_cache(len(prompts), self.seen.shape[1] + sampling.max_new_tokens)
        newest = torch.zeros_like(self.seen, dtype=torch.bool)
        newest[:, -1] = True
        self.state = model(batch, self.cache, latent=latents, needed=newest)[:, -1]  # (rows, width)
        self.cache.start_decoding()
        self.decoder = NativeDecoder.of(model, self.cache)
        """The compiled step; None: torch's operators are used."""

    def _aligned(self, rows: Sequence[np.ndarray]) -> Batch:
        """Rows on the right of a rectangle: tokens, positions, looks, appears, each (rows, T) int64."""
        most = max(map(len, rows))
        # Padding repeats the row's first token: nobody sees it, and a penalty on tokens seen falls on no other.
        tokens = np.stack([np.concatenate((np.full(most - len(r), r[0]), r)) for r in rows]).astype(np.int64)
        when = np.stack([np.arange(most) - (most - len(r)) for r in rows])
        place = torch.from_numpy(when.clip(0)).to(self.device)
        moment = place * (not self.model.config.prefix_lm)  # a prefix language model reads its prompt both ways
        appears = moment.masked_fill(torch.from_numpy(when < 0).to(self.device), NEVER)
        shown = torch.from_numpy(tokens).to(self.device)
        return {"tokens": shown, "positions": place, "query_time": moment, "key_time": appears}

    def step(self) -> tuple[list[int], list[float]]:
        """Write one token in every row; return the tokens and their log-probabilities."""
        logits = self._logits().float()
        options = logits
        if self.sampling.repetition_penalty != 1:
            options = repetition_penalty(options, self.seen, self.sampling.repetition_penalty)
        if self.sampling.greedy:
            token = options.max(-1, keepdim=True).indices  # argmax takes half as long again
        else:
            token = draw(filtered(options, self.sampling), self.uniform[:, self.written])[:, None]
        logprob = logits.gather(-1, token)[:, 0] - logits.logsumexp(-1)
        self.seen = torch.cat((self.seen, token), 1) if self.sampling.repetition_penalty != 1 else token
        self.written += 1
        return token[:, 0].tolist(), logprob.tolist()

    def _logits(self) -> Tensor:
        """Read the newest token of each row; return the logits of the next: (rows, vocab)."""
        if self.written:
            token, self.next = self.seen[:, -1:], self.next + 1
            if self.decoder is not None:
                return self.decoder(token, self.next - 1)
            self.state = self.model({"tokens": token, "positions": self.next - 1}, self.cache)[:, -1]
        return self.head(self.state)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        index = torch.tensor(rows, device=self.device)
        self.cache.select(index)
        self.seen, self.next, self.uniform = self.seen[index], self.next[index], self.uniform[index]
        if self.decoder is not None:
            self.decoder = NativeDecoder.of(self.model, self.cache)
