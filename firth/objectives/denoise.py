"""Denoising: the text is damaged, the model writes it as it was (BART, Lewis 2019, section 2.2).

The whole text is asked, not what was damaged alone: about seven times the targets of span corruption, and the model
learns to go on writing. The five ways to damage are in `firth.data.corruptions`; BART itself shuffles the sentences and
then hides 30% of the tokens by infilling. Both rows end with the stop token; BART's begin with one too, ours do not.

    I came. I saw the sea. I won.
    shown    I won. I came. I _ sea.                  permutation, then infilling
    asked    I came. I saw the sea. I won.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from firth.data import layout
from firth.data.corruptions import Damage, corrupt
from firth.data.layout import InfillPrompt, Seq2SeqLayout
from firth.model.config import AttentionPattern
from firth.objectives.objective import TokenObjective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Example, UserError
from firth.validated import OpenShare


@dataclass(frozen=True)
class Denoising(TokenObjective):
    """Write {"tokens"}, a bare text, as it was.

    noises: how it is damaged (`firth.data.corruptions`), in the order in which that is done. rate: share of the tokens that
    masking, deletion and infilling each hit. layout: "seq2seq" shows the damaged text to an encoder; "prefix" does both
    in one row, read both ways up to the end of the damaged text.

    >>> vocab = Vocab(size=10, roles={"pad": 0, "eos": 1, "mask": 2}, special=np.arange(10) < 3,
    ...               spelling=tuple(b" a" if i != 5 else b"!" for i in range(10)))
    >>> seen = Denoising().build_example({"tokens": np.array([3, 4, 5, 6, 7, 8])}, vocab, np.random.default_rng(4))
    >>> for name in ("source_tokens", "tokens", "labels"): print(name, seen[name].tolist())
    source_tokens [6, 7, 8, 3, 2, 1]
    tokens [0, 3, 4, 5, 6, 7, 8]
    labels [3, 4, 5, 6, 7, 8, 1]
    """

    added_tokens: ClassVar[int] = 1  # the stop token

    noises: tuple[Damage, ...] = ("permutation", "infilling")
    noise_density: OpenShare = 0.3
    layout: Seq2SeqLayout = "seq2seq"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.noises:
            raise UserError("denoise: noises names no way to damage the text, so there would be nothing to mend")

    @property
    def text_units(self) -> frozenset[str]:
        return frozenset({"sentences"} if "permutation" in self.noises else ())

    def attention_pattern(self) -> AttentionPattern:
        return "seq2seq" if self.layout == "seq2seq" else "prefix"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        damaged = corrupt(self.noises, tokens, vocab, self.noise_density, rng)
        return layout.layout_of(self.layout, np.append(damaged, vocab.eos), np.append(tokens, vocab.eos), vocab)

    def build_infill(self, pieces: Sequence[np.ndarray], vocab: Vocab) -> InfillPrompt:
        """Each gap is one mask, as infilling leaves one for a span of any length; nothing where tokens are deleted. The answer
        is the whole text."""
        behind = pieces[1:]
        if self.noises != ("deletion",):
            behind = [np.insert(piece, 0, vocab.mask) for piece in behind]
        return InfillPrompt(np.concatenate((pieces[0], *behind, [vocab.eos])).astype(np.int32), np.zeros(0, np.int64))

    def hide(self, tokens: np.ndarray, at: int, vocab: Vocab) -> Example:
        """The token is masked, or gone where that is the damage; asked when the answer has come to its place."""
        gone = np.arange(len(tokens)) == at
        shown = tokens[~gone] if self.noises == ("deletion",) else np.where(gone, vocab.mask, tokens)
        seen = layout.layout_of(self.layout, np.append(shown, vocab.eos), tokens[: at + 1], vocab)
        labels = np.full(len(seen["labels"]), IGNORE)
        labels[-1] = tokens[at]
        return seen | {"labels": labels}
