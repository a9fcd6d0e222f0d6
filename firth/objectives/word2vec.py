"""word2vec: word vectors that tell a word's neighbors from noise words (Mikolov 2013, arXiv:1301.3781 and arXiv:1310.4546).

    skip-gram   for each word i and each word j within a window of it      -log s(x_i . c_j) - k E_n log s(-x_i . c_n)
    CBOW        for each word j, with h the mean of x over its window      -log s(h . c_j)   - k E_n log s(-h . c_n)

x are the vectors of the model's embedding, c those of the head "context". Windows are drawn anew from 1 to `window` for
every word, frequent words are dropped at random, noise words n are drawn by count ** 0.75 (`firth.data.windows`).

    the quick brown fox   window 1   pairs   quick-the  quick-brown  brown-quick  brown-fox ...

Difference from word2vec.c and gensim: they draw k noise words for every pair; here the words of a row share `noise_words` of
them, each weighted by k / noise_words. The mean and the gradient's mean are the same; the errors within a row are correlated.
Gathers of vectors become two matrix products per row. A noise word that happens to be a true neighbor is not left out. And
many rows are one step of Adam, where they take a step for each pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from firth import kernel_choice
from firth.fields import PositiveInt
from firth.model import flops, native
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs

BLOCK_WORDS = 32
"""Words whose neighbors are scored by one product: of its 32 + 2 window columns 2 window are used, the rest is waste."""


@dataclass(frozen=True)
class Word2Vec(Objective):
    """Train word vectors on the neighbors of each word: {"tokens", "kept", "noise"} (and "document_ids").

    "kept" holds the probability that each word of the vocabulary is kept, "noise" the cumulative probability of drawing it as
    a noise word. Shown: each word (skip-gram) or the mean of its neighbors (CBOW). Predicted: each neighbor, or the word, against
    noise words. Loss: -log s(x . c) - k E_n log s(-x . c_n), s the sigmoid.

    Args:
        algorithm: "skipgram" or "cbow".
        window: Largest number of words on either side.
        num_negatives: k, the weight of the noise words.
        noise_words: Number of noise words that a row shares.

    >>> vocab = Vocab(size=6, roles={}, special=np.zeros(6, bool))
    >>> text = {"tokens": np.array([1, 2, 3, 4]), "kept": np.ones(6), "noise": np.arange(1, 7) / 6}
    >>> seen = Word2Vec(window=1, noise_words=3).build_example(text, vocab, np.random.default_rng(0))
    >>> for name in ("tokens", "words", "left", "right", "noise"): print(name, seen[name].tolist())
    tokens [1, 2, 3, 4]
    words [1, 2, 3, 4]
    left [0, 1, 1, 1]
    right [1, 1, 1, 0]
    noise [4, 5, 3]
    """

    labels = {"words": "words"}

    algorithm: Literal["skipgram", "cbow"] = "skipgram"
    window: Annotated[int, Interval(ge=1, le=BLOCK_WORDS)] = 5
    num_negatives: PositiveInt = 5
    noise_words: PositiveInt = 64

    inputs = frozenset({"tokens", "kept", "noise"})
    attention = "none"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        context = nn.Embedding(config.vocab_size, config.hidden_size)
        nn.init.zeros_(context.weight)
        return {"context": context}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        stay = np.flatnonzero(rng.random(len(tokens)) < example["kept"][tokens])
        stay = stay if len(stay) else np.arange(1)  # rows must not be empty
        tokens, at = tokens[stay], np.arange(len(stay))
        reach = rng.integers(1, self.window + 1, len(tokens))
        first, last = np.zeros_like(at), np.full_like(at, len(tokens) - 1)
        if "document_ids" in example:
            document = example["document_ids"][stay]
            first, last = document.searchsorted(document), document.searchsorted(document, "right") - 1
        left, right = np.minimum(reach, at - first), np.minimum(reach, last - at)
        return {
            "tokens": tokens,
            "words": np.where(left + right > 0, tokens, IGNORE),
            "left": left,
            "right": right,
            "noise": example["noise"].searchsorted(rng.random(self.noise_words), "right"),
        }

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        x = outputs["hidden"]
        # One look-up, so that the gradient of the embedding is computed once.
        vectors: Tensor = model.heads["context"](torch.cat((batch["tokens"], batch["noise"]), 1))
        context, noise = vectors.split((x.shape[1], self.noise_words), 1)
        num_neighbors = (batch["left"] + batch["right"]).to(x.dtype)
        if self.algorithm == "skipgram":
            near = self._near(batch)  # (B, blocks, BLOCK_WORDS, BLOCK_WORDS + 2 window)
            scores = self._blocks(x) @ self._around(context).mT
            positive = (F.softplus(-scores) * near).sum()
            weights = num_neighbors
        else:
            weights = (num_neighbors > 0).to(x.dtype)
            x = self._means(x, batch)  # (B, T, hidden_size)
            positive = (F.softplus(-(x * context).sum(-1)) * weights).sum()
        negative = F.softplus(x @ noise.mT).sum(-1)  # (B, T)
        return {"words": positive + (negative * weights).sum() * (self.num_negatives / self.noise_words)}

    def _means(self, x: Tensor, batch: Batch) -> Tensor:
        """Return the mean of each word's neighbors, zeros where it has none: (B, T, n) -> (B, T, n)."""
        if x.dtype == torch.float32 and native.supports(x) and NEIGHBORS.choice() == "native":
            return native.neighbors(x, batch["left"].long(), batch["right"].long())
        near = self._near(batch)
        mean = near / near.sum(-1, keepdim=True).clamp(min=1)
        return (mean @ self._around(x)).flatten(1, 2)[:, : x.shape[1]]

    def _near(self, batch: Batch) -> Tensor:
        """Return 1 where a column is a neighbor of a word of the block, else 0: (B, blocks, BLOCK_WORDS, columns)."""
        left, right = (
            self._blocks(batch[side][..., None]) for side in ("left", "right")
        )  # (B, blocks, BLOCK_WORDS, 1)
        wide = torch.arange(BLOCK_WORDS + 2 * self.window, device=left.device) - self.window
        offset = wide[None] - torch.arange(BLOCK_WORDS, device=left.device)[:, None]
        return ((offset >= -left) & (offset <= right) & (offset != 0)).float()

    def _blocks(self, x: Tensor) -> Tensor:
        """Split into blocks: (B, T, n) -> (B, blocks, BLOCK_WORDS, n), padded with zeros."""
        return F.pad(x, (0, 0, 0, -x.shape[1] % BLOCK_WORDS)).unflatten(1, (-1, BLOCK_WORDS))

    def _around(self, x: Tensor) -> Tensor:
        """Return each block with `window` words before and after it: (B, T, n) -> (B, blocks, BLOCK_WORDS + 2 window, n)."""
        blocks = F.pad(x, (0, 0, BLOCK_WORDS, BLOCK_WORDS + -x.shape[1] % BLOCK_WORDS)).unflatten(1, (-1, BLOCK_WORDS))
        # Three slices and not `unfold`, whose gradient takes three times as long.
        return torch.cat(
            (blocks[:, :-2, BLOCK_WORDS - self.window :], blocks[:, 1:-1], blocks[:, 2:, : self.window]), 2
        )

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        rows, length = batch["tokens"].shape
        padded, width = length + -length % BLOCK_WORDS, model.config.hidden_size
        near = flops.linear(rows * padded, width, BLOCK_WORDS + 2 * self.window)
        return (forward or 0.0) + near + flops.linear(rows * length, width, self.noise_words)


def _workload(choice: str) -> kernel_choice.Workload:
    """Return a benchmark: the neighbor means of 8 rows of 256 words with 128-dimensional vectors, forward and backward."""
    side = torch.arange(256).clamp(max=3)
    batch = {"left": side.expand(8, -1), "right": side.flip(0).expand(8, -1)}
    x = torch.linspace(-1, 1, 8 * 256 * 128).view(8, 256, 128).requires_grad_()
    objective, grad = Word2Vec(algorithm="cbow"), torch.ones(8, 256, 128)
    if choice == "native":
        native.library()

    def work() -> None:
        with kernel_choice.forced({NEIGHBORS.name: choice}):
            torch.autograd.backward(objective._means(x, batch), grad)

    return work


NEIGHBORS = kernel_choice.Kernel("neighbors", {choice: partial(_workload, choice) for choice in ("torch", "native")})
"""Kernel that averages the neighbors of words for CBOW."""
