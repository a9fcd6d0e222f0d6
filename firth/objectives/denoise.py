"""Denoising: corrupt a text and reconstruct all of it (BART, Lewis 2019, section 2.2).

The whole text is predicted, not only what was corrupted: about seven times the labels of span corruption, and the model also
learns to continue a text. The five corruptions are in `firth.data.corruptions`; BART itself shuffles the sentences and then
masks 30% of the tokens by infilling. Both rows end with the stop token; BART's also begin with one, ours do not.

    I came. I saw the sea. I won.
    shown    I won. I came. I _ sea.                  permutation, then infilling
    target   I came. I saw the sea. I won.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firth.data import attention_fields
from firth.data.attention_fields import Seq2SeqLayout
from firth.data.corruptions import Damage, corrupt
from firth.fields import OpenShare
from firth.model.config import AttentionPattern
from firth.objectives.objective import TokenObjective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Constraints, Example, UserError


@dataclass(frozen=True)
class Denoising(TokenObjective):
    """Reconstruct a corrupted text: {"tokens"}, without special tokens.

    Shown: the corrupted text. Predicted: the original text. Loss: -sum over t of log p(w_t | w_<t, corrupted text).

    Args:
        noises: The corruptions (`firth.data.corruptions`), in the order in which they are applied.
        noise_density: Share of the tokens that masking, deletion and infilling each hit.
        layout: "seq2seq" gives the corrupted text to an encoder; "prefix" puts both in one row, with bidirectional
            attention up to the end of the corrupted text.

    >>> vocab = Vocab(size=10, roles={"pad": 0, "eos": 1, "mask": 2}, special=np.arange(10) < 3,
    ...               spelling=tuple(b" a" if i != 5 else b"!" for i in range(10)))
    >>> seen = Denoising().build_example({"tokens": np.array([3, 4, 5, 6, 7, 8])}, vocab, np.random.default_rng(4))
    >>> for name in ("source_tokens", "tokens", "labels"): print(name, seen[name].tolist())
    source_tokens [6, 7, 8, 3, 2, 1]
    tokens [0, 3, 4, 5, 6, 7, 8]
    labels [3, 4, 5, 6, 7, 8, 1]
    """

    noises: tuple[Damage, ...] = ("permutation", "infilling")
    noise_density: OpenShare = 0.3
    layout: Seq2SeqLayout = "seq2seq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noises:
            raise UserError("denoising: noises is empty, so nothing is corrupted: name at least one corruption")

    @property
    def constraints(self) -> Constraints:
        units = frozenset({"sentences"} if "permutation" in self.noises else ())
        return Constraints(added_tokens=1, text_units=units)  # the stop token

    @property
    def attention(self) -> AttentionPattern:
        return "seq2seq" if self.layout == "seq2seq" else "prefix"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        corrupted = corrupt(self.noises, tokens, vocab, self.noise_density, rng)
        return attention_fields.layout_of(
            self.layout, np.append(corrupted, vocab.eos), np.append(tokens, vocab.eos), vocab
        )

    def hide(self, pieces: Sequence[np.ndarray], vocab: Vocab, answer: int | None = None) -> Example:
        """Each gap is one mask, as infilling leaves one for a span of any length; nothing where tokens are deleted. The target
        is the whole text, and the label at the position of the answer in it."""
        rest = pieces[1:]
        if self.noises != ("deletion",):
            rest = [np.insert(piece, 0, vocab.mask) for piece in rest]
        source = np.concatenate((pieces[0], *rest, [vocab.eos])).astype(np.int32)
        if answer is None:
            return {"tokens": source}
        seen = attention_fields.layout_of(self.layout, source, np.append(pieces[0], answer), vocab)
        labels = np.full(len(seen["labels"]), IGNORE)
        labels[-1] = answer
        return seen | {"labels": labels}
