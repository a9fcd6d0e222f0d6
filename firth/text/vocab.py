"""What the rest of the house needs to know of a tokenizer: a handful of ids and a few facts about each token.

A view masks, frames and cuts token ids; it never sees text. `Vocab` is therefore plain numbers, cheap to hand
to a worker, and the same for every tokenizer algorithm.

>>> import numpy as np
>>> v = Vocab(size=8, roles={"pad": 0, "mask": 1, "cls": 2, "sep": 3}, special=np.arange(8) < 4)
>>> v.mask, v.frame(np.array([5, 6])).tolist()
(1, [2, 5, 6, 3])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from firth.types import UserError

ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")


@dataclass(frozen=True, eq=False)
class Vocab:
    """The ids that have a role, and per-id facts.

    size: number of ids. roles: role -> id, among ROLES (two roles may share an id: RoBERTa's cls is its bos).
    sentinels: ids of `<extra_id_0>`, `<extra_id_1>`, ... special: (size,) bool, True where no user text can land
    (but on `unk`).
    begins_word, ends_word: (size,) bool, True where a token by its own spelling begins a word, or ends one so that the
    next token begins one (BPE's `</w>`, a line break); None if the spelling says nothing. See `starts`.
    ends_sentence, capital, digit: (size,) bool, True where a token ends with a full stop or breaks the line, begins with
    a capital letter, or has a digit in it; None if unknown. See `sentences` and the noise "salient".
    decoder_start: the role of the token that an encoder-decoder's answers begin behind (`Shape.decoder_start`).
    holes: ids below `size` that no token has, ascending.
    """

    size: int
    roles: Mapping[str, int]
    special: np.ndarray
    sentinels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    begins_word: np.ndarray | None = None
    ends_word: np.ndarray | None = None
    ends_sentence: np.ndarray | None = None
    capital: np.ndarray | None = None
    digit: np.ndarray | None = None
    decoder_start: str = "pad"
    holes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ordinary", np.flatnonzero(~self.special))

    def _role(self, role: str) -> int:
        if role not in self.roles:
            raise UserError(
                f"this tokenizer has no {role} token, which this objective needs; "
                f"it has {', '.join(self.roles) or 'none'}: train one with `firth tokenizer train`"
            )
        return self.roles[role]

    @property
    def pad(self) -> int:
        return self._role("pad")

    @property
    def bos(self) -> int:
        return self._role("bos")

    @property
    def eos(self) -> int:
        return self._role("eos")

    @property
    def cls(self) -> int:
        return self._role("cls")

    @property
    def sep(self) -> int:
        return self._role("sep")

    @property
    def mask(self) -> int:
        return self._role("mask")

    @property
    def start(self) -> int:
        """What an encoder-decoder's answers begin behind."""
        return self._role(self.decoder_start)

    def starting(self, role: str) -> Vocab:
        """The same for a model whose `Shape.decoder_start` is this role."""
        return replace(self, decoder_start=role)

    @property
    def ordinary(self) -> np.ndarray:
        """Ids that user text can contain, ascending."""
        ordinary: np.ndarray = self.__dict__["_ordinary"]
        return ordinary

    def absent(self, rows: int) -> np.ndarray:
        """Return the ids below `rows` that no token has: holes, and those past the last token.

        >>> Vocab(4, {}, np.zeros(4, bool), holes=np.array([2])).absent(6).tolist()
        [2, 4, 5]
        """
        return np.concatenate((self.holes, np.arange(self.size, rows))).astype(np.int64)

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Where in a text's tokens (n,) a word begins: (n,) bool. Without any spelling each token is a word.

        >>> v = Vocab(4, {}, np.zeros(4, bool), begins_word=np.arange(4) == 1, ends_word=np.arange(4) == 3)
        >>> v.starts(np.array([2, 2, 1, 2, 3, 2])).astype(int).tolist()
        [1, 0, 1, 0, 0, 1]
        """
        if self.begins_word is None:
            return np.ones(len(tokens), bool)
        starts: np.ndarray = self.begins_word[tokens]
        starts[:1] = True
        if self.ends_word is not None:
            starts[1:] |= self.ends_word[tokens[:-1]]
        return starts

    def sentences(self, tokens: np.ndarray) -> np.ndarray:
        """Where in a text's tokens (n,) a sentence begins: (n,) bool.

        That is at a word behind a full stop (that of 3.5 too, where it is a token), a line break or a control token.
        Raises UserError where the pieces are not known to end sentences.

        >>> v = Vocab(4, {}, np.zeros(4, bool), begins_word=np.arange(4) == 1, ends_sentence=np.arange(4) == 3)
        >>> v.sentences(np.array([2, 1, 3, 2, 3, 1, 2])).astype(int).tolist()
        [1, 0, 0, 0, 0, 1, 0]
        """
        if self.ends_sentence is None:
            raise UserError("nothing is known of where a sentence ends in this vocabulary: use a tokenizer of firth's")
        begins = self.starts(tokens)
        begins[1:] &= (self.ends_sentence | self.special)[tokens[:-1]]
        return begins

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """n ordinary ids, uniformly."""
        # rng.integers costs 4 microseconds even for one; the unevenness of this is below 2**-30.
        return self.ordinary[(rng.random(n) * len(self.ordinary)).astype(np.int64)]

    def frame(self, tokens: np.ndarray, dtype: type[np.integer] | None = None) -> np.ndarray:
        """[CLS] tokens [SEP]: one segment as an encoder reads it. dtype: of the answer; the tokens' own unless given."""
        framed = np.empty(len(tokens) + 2, dtype or tokens.dtype)
        framed[0], framed[1:-1], framed[-1] = self.cls, tokens, self.sep
        return framed
