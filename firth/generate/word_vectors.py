"""The token vectors of a model on their own: neighbours, word2vec's text format, and a start for another model.

    nearest(model, tokenizer, "king")           [("prince", 0.71), ("queen", 0.68), ...]
    write(model, tokenizer, Path("v.txt"))      20000 100
                                                the 0.013 -0.201 ...        (gensim: KeyedVectors.load_word2vec_format)
    take(model, tokenizer, Path("runs/word2vec/model"))

Pretrained word vectors under a model that knows nothing else (Collobert 2011; Dai and Le 2015, section 2) are `take`:
same tokenizer, same width, or a UserError. What is taken is their directions and relative lengths: the whole table is
scaled to the root mean square that the model's own would have begun with, which the rest of it is made for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from firth.io.atomic import new_file
from firth.model.model import LM
from firth.pretrained.load_save import load_model
from firth.tokenizer.vocab import Vocab
from firth.types import UserError


class WordTokenizer(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab(self) -> Vocab: ...

    def encode(self, text: str) -> np.ndarray: ...

    def token(self, id: int) -> str: ...


@torch.no_grad()
def table(model: LM) -> Tensor:
    """The vector of every token: (vocab, table width) float32."""
    ids = torch.arange(model.config.vocab_size, device=model.tokens.weight.device)
    found: Tensor = model.tokens(ids).float()
    return found


def ids_of(words: WordTokenizer, word: str) -> list[int]:
    """The tokens that are the whole of a word, alone and behind a blank (a byte-level piece holds it); none if unknown."""
    ids = [words.encode(text) for text in (word, f" {word}")]
    return [int(i[0]) for i in ids if len(i) == 1 and i[0] != words.vocab.roles.get("unk")]


def nearest(model: LM, words: WordTokenizer, word: str, top: int) -> list[tuple[str, float]]:
    """The tokens whose vectors have the greatest cosine with a word's, as the vocabulary writes them; UserError where
    the word is unknown or of several pieces."""
    known = ids_of(words, word)
    if not known:
        raise UserError(f"{word!r} is no single token of this model, so it has no vector: try another word")
    vectors = F.normalize(table(model), dim=-1)
    likeness = vectors @ vectors[known[-1]]
    others = np.ones(len(likeness), bool)
    others[words.vocab.ordinary] = False
    likeness[torch.from_numpy(others)] = -2.0
    likeness[known] = -2.0
    best = likeness.topk(min(top, len(words.vocab.ordinary) - len({*known})))
    return [(words.token(i), x) for i, x in zip(best.indices.tolist(), best.values.tolist(), strict=True)]


def write(model: LM, words: WordTokenizer, path: Path) -> tuple[int, int]:
    """All ordinary tokens in word2vec's text format; returns how many, and their width. Blanks in a token become _."""
    vectors, ids = table(model).cpu().numpy(), words.vocab.ordinary
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.write(f"{len(ids)} {vectors.shape[1]}\n")
        for i in ids.tolist():
            name = "_".join(words.token(i).split()) or "_"
            file.write(name + " " + " ".join(f"{x:.6g}" for x in vectors[i]) + "\n")
    return len(ids), vectors.shape[1]


@torch.no_grad()
def load_embeddings(model: LM, directory: Path) -> str:
    """Copy the token vectors of another model into this one, scaled (see above); returns what was taken, in words.

    Raises UserError where widths or vocabularies differ, or either model spells its tokens.
    """
    theirs = load_model(directory)
    here, there = model.config, theirs.config
    if here.max_characters or there.max_characters:
        raise UserError(f"cannot take embeddings from {directory}: a model that spells its tokens has no table of them")
    if (here.vocab_size, here.embedding_dim) != (there.vocab_size, there.embedding_dim):
        raise UserError(
            f"cannot take embeddings from {directory}: they are {there.vocab_size} vectors of {there.embedding_dim} numbers, and "
            f"this model has {here.vocab_size} of {here.embedding_dim}: set model.hidden_size={there.embedding_dim} and leave the tokenizer theirs"
        )
    mine, given = model.tokens.weight, theirs.tokens.weight
    scale = float(mine.square().mean().sqrt() / given.square().mean().sqrt().clamp(min=1e-12))
    mine.copy_(given * scale)
    return f"{there.vocab_size:,} token vectors from {directory}, scaled by {scale:.3g}"
