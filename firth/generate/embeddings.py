"""Embeddings of texts and of words.

Sentence embeddings by mean pooling, as in sentence-transformers (Reimers & Gurevych 2019, section 3).

    embed(model, tokenizer, ["A man sings.", "Somebody is singing."])      (2, hidden_size) float32

The text is encoded as in training ([CLS] text [SEP]), and the mean is over all tokens, special ones included. It is over the
encoder's states for an encoder-decoder, and over causal states for a decoder. The dot product of vectors of unit length
(`unit`) is their cosine.

Token embeddings as word vectors: nearest neighbors, word2vec's text format, and initialization of another model.

    nearest(model, tokenizer, "king", 10)       [("prince", 0.71), ("queen", 0.68), ...]
    write(model, tokenizer, Path("v.txt"))      20000 100
                                                the 0.013 -0.201 ...        (gensim: KeyedVectors.load_word2vec_format)
    load_embeddings(model, Path("runs/word2vec/model"))

`load_embeddings` initializes a model with pretrained word vectors (Collobert 2011; Dai and Le 2015, section 2); tokenizer and
embedding size must be the same. The whole table is scaled to the root mean square of the model's own initialization, which
the other weights are initialized for; directions and relative lengths are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from firth.generate.decoding_batch import inference_mode, rectangle
from firth.generate.slices import Slices, can_read_in_chunks, finish, read_in_chunks
from firth.io.atomic import new_file
from firth.model.model import LM
from firth.model.variants import average
from firth.pretrained.load_save import load_model
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab
from firth.types import UserError

MAX_BATCH_TOKENS = 8192
"""Most tokens of a batch, padding included."""


def embed(
    model: LM, tokenizer: Tokenizer, texts: Sequence[str], *, length: int = 0, unit: bool = True
) -> tuple[np.ndarray, list[int]]:
    """Embed texts.

    Args:
        model: An encoder, a decoder or an encoder-decoder.
        tokenizer: Its tokenizer.
        texts: The texts.
        length: Longer texts are truncated to this many tokens; 0 takes the model's context.
        unit: Whether vectors are normalized to unit length.

    Returns:
        The vectors (n, hidden_size) float32, and the indices of the texts that were truncated.
    """
    return finish(embed_slices(model, tokenizer, texts, length=length, unit=unit))


def embed_slices(
    model: LM, tokenizer: Tokenizer, texts: Sequence[str], *, length: int = 0, unit: bool = True, max_tokens: int = 0
) -> Slices[tuple[np.ndarray, list[int]]]:
    """Embed texts as `embed` does, in slices of at most `max_tokens` tokens; 0 for MAX_BATCH_TOKENS.

    A longer text is a slice of its own, unless a decoder reads it, in chunks.
    """
    length = min(length or model.context, model.context)
    vocab = tokenizer.vocab
    has_cls_sep = "cls" in vocab.roles and "sep" in vocab.roles
    encoded = tokenizer.encode_batch(texts)
    kept = [tokens[: length - 1 - has_cls_sep] for tokens in encoded]
    rows = [vocab.add_special_tokens(tokens) if has_cls_sep else np.append(tokens, vocab.eos) for tokens in kept]
    truncated = [i for i, (a, b) in enumerate(zip(kept, encoded, strict=True)) if len(a) < len(b)]
    out = np.zeros((len(rows), model.config.hidden_size), np.float32)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    with inference_mode(model):
        while order:
            batch = order[: max(1, (max_tokens or MAX_BATCH_TOKENS) // len(rows[order[0]]))]
            out[batch] = yield from _mean_states(model, [rows[i] for i in batch], unit, max_tokens)
            order = order[len(batch) :]
            yield
    return out, truncated


def _mean_states(model: LM, rows: Sequence[np.ndarray], unit: bool, max_tokens: int) -> Slices[np.ndarray]:
    device = model.tokens.weight.device
    batch = rectangle(rows, device, causal=model.config.causal and not model.config.encoder.num_layers)
    if model.config.encoder.num_layers:
        hidden = model.encode({f"source_{name}": field for name, field in batch.items()})
    elif len(rows) == 1 and 0 < max_tokens < len(rows[0]) and can_read_in_chunks(model):
        hidden = yield from read_in_chunks(model, batch | {"positions": batch["query_time"]}, max_tokens)
    else:
        hidden = model(batch)
    means = average(hidden.float(), batch["key_time"])
    vectors: torch.Tensor = F.normalize(means, dim=-1) if unit else means
    return np.asarray(vectors.cpu().numpy())


class WordTokenizer(Protocol):
    """The part of a tokenizer that this module uses."""

    @property
    def vocab(self) -> Vocab: ...

    def encode(self, text: str) -> np.ndarray: ...

    def token(self, id: int) -> str: ...


@torch.no_grad()
def table(model: LM) -> Tensor:
    """Return the embedding of every token: (vocab_size, embedding_dim) float32."""
    ids = torch.arange(model.config.vocab_size, device=model.tokens.weight.device)
    vectors: Tensor = model.tokens(ids).float()
    return vectors


def ids_of(words: WordTokenizer, word: str) -> list[int]:
    """Return the ids of the single tokens that spell a word, with and without a space before it; empty if there are none."""
    ids = [words.encode(text) for text in (word, f" {word}")]
    return [int(i[0]) for i in ids if len(i) == 1 and i[0] != words.vocab.roles.get("unk")]


def nearest(model: LM, words: WordTokenizer, word: str, top: int) -> list[tuple[str, float]]:
    """Return the `top` tokens with the highest cosine similarity to a word, and the similarities.

    Raises:
        UserError: The word is not a single token.
    """
    ids = ids_of(words, word)
    if not ids:
        raise UserError(f"{word!r} is not a single token of this model, so it has no vector: try another word")
    vectors = F.normalize(table(model), dim=-1)
    similarity = vectors @ vectors[ids[-1]]
    excluded = np.ones(len(similarity), bool)
    excluded[words.vocab.ordinary] = False
    similarity[torch.from_numpy(excluded)] = -2.0
    similarity[ids] = -2.0
    best = similarity.topk(min(top, len(words.vocab.ordinary) - len({*ids})))
    return [(words.token(i), x) for i, x in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def write(model: LM, words: WordTokenizer, path: Path) -> tuple[int, int]:
    """Write all ordinary tokens in word2vec's text format; spaces in a token become _.

    Returns:
        The number of tokens and the size of their vectors.
    """
    vectors, ids = table(model).cpu().numpy(), words.vocab.ordinary
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(f"{len(ids)} {vectors.shape[1]}\n")
        for i in ids.tolist():
            name = "_".join(words.token(i).split()) or "_"
            file.write(name + " " + " ".join(f"{x:.6g}" for x in vectors[i]) + "\n")
    return len(ids), vectors.shape[1]


@torch.no_grad()
def load_embeddings(model: LM, directory: Path) -> str:
    """Copy the token embeddings of a saved model into this one, scaled (see the module docstring).

    Returns:
        A summary for the user.

    Raises:
        UserError: Vocabulary or embedding sizes differ, or one of the models builds its embeddings from characters.
    """
    saved = load_model(directory)
    ours, theirs = model.config, saved.config
    if ours.embedding.characters.max_length or theirs.embedding.characters.max_length:
        raise UserError(
            f"cannot load embeddings from {directory}: a model that builds its embeddings from characters has no table"
        )
    if (ours.vocab_size, ours.embedding_dim) != (theirs.vocab_size, theirs.embedding_dim):
        raise UserError(
            f"cannot load embeddings from {directory}: they are {theirs.vocab_size} vectors of {theirs.embedding_dim} numbers, "
            f"and this model has {ours.vocab_size} of {ours.embedding_dim}: set model.hidden_size={theirs.embedding_dim} and "
            "use the same tokenizer"
        )
    target, source = model.tokens.weight, saved.tokens.weight
    scale = float(target.square().mean().sqrt() / source.square().mean().sqrt().clamp(min=1e-12))
    target.copy_(source * scale)
    return f"{theirs.vocab_size:,} token vectors from {directory}, scaled by {scale:.3g}"
