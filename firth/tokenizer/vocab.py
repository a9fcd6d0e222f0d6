"""What the rest of the house needs to know of a tokenizer: a handful of ids and a few facts about each token.

A view masks, frames and cuts token ids; it never sees text. `Vocab` is therefore plain numbers, cheap to hand
to a worker, and the same for every tokenizer algorithm.

>>> import numpy as np
>>> v = Vocab(size=8, roles={"pad": 0, "mask": 1, "cls": 2, "sep": 3}, special=np.arange(8) < 4)
>>> v.mask, v.add_special_tokens(np.array([5, 6])).tolist()
(1, [2, 5, 6, 3])
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from firth.tokenizer.segmentation import sentence_starts, word_starts
from firth.types import UserError

ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")


@dataclass(frozen=True, eq=False)
class Vocab:
    """The ids that have a role, and per-id facts.

    size: number of ids. roles: role -> id, among ROLES (two roles may share an id: RoBERTa's cls is its bos).
    sentinels: ids of `<extra_id_0>`, `<extra_id_1>`, ... special: (size,) bool, True where no user text can land
    (but on `unk`).
    spelling: the UTF-8 that each id stands for, blanks and parts of characters included; None if it is not known, and then
    each token is a word. Words, sentences, capitals and digits are read from it.
    decoder_start: the role of the token that an encoder-decoder's answers begin behind (`Shape.decoder_start`).
    holes: ids below `size` that no token has, ascending.
    """

    size: int
    roles: Mapping[str, int]
    special: np.ndarray
    sentinels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    spelling: tuple[bytes, ...] | None = None
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

    def with_decoder_start(self, role: str) -> Vocab:
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
        """Return where in a text's tokens (n,) a word begins (`firth.tokenizer.segmentation`): (n,) bool.

        A blank belongs to the word behind it. Without any spelling each token is a word.

        >>> v = Vocab(5, {}, np.zeros(5, bool), spelling=(b" it", b"'", b"s", b",", b" o"))
        >>> v.starts(np.array([0, 1, 2, 3, 4, 2, 2])).astype(int).tolist()
        [1, 0, 0, 1, 1, 0, 0]
        """
        if self.spelling is None:
            return np.ones(len(tokens), bool)
        return self._begins(self.spelling, tokens, word_starts)

    def sentences(self, tokens: np.ndarray) -> np.ndarray:
        """Return where in a text's tokens (n,) a sentence begins (`firth.tokenizer.segmentation`): (n,) bool.

        Raises:
            UserError: If the spelling of the tokens is not known.

        >>> v = Vocab(4, {}, np.zeros(4, bool), spelling=(b"He", b" came", b".", b" Dr"))
        >>> v.sentences(np.array([0, 1, 2, 3, 2, 1, 2])).astype(int).tolist()
        [1, 0, 0, 1, 0, 0, 0]
        """
        if self.spelling is None:
            raise UserError("nothing is known of where a sentence ends in this vocabulary: use a tokenizer of firth's")
        return self._begins(self.spelling, tokens, sentence_starts)

    def text(self, tokens: np.ndarray) -> str:
        """Return the text of some tokens, line breaks for control tokens; parts of characters are lone surrogates."""
        return b"".join([(self.spelling or ())[i] for i in tokens.tolist()]).decode("utf-8", "surrogateescape")

    def _begins(
        self, spelling: tuple[bytes, ...], tokens: np.ndarray, starts: Callable[[str], np.ndarray]
    ) -> np.ndarray:
        """Where a unit begins at a token's first character that is no blank, the first token with that character."""
        pieces = [spelling[i] for i in tokens.tolist()]
        data = b"".join(pieces)
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
        text = data.decode("utf-8", "surrogateescape")
        units = starts(text)
        begins = np.zeros(len(data) + 1, bool)
        if len(text) == len(data):
            begins[:-1] = units
        else:
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
            part = (codes >= 0xD800) & (codes < 0xE000)  # a byte of a character that is cut off
            width = np.where(part, 1, 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000))
            begins[(width.cumsum() - width)[units]] = True
        shown = np.append(np.flatnonzero(np.frombuffer(data, np.uint8) != ord(" ")), len(data))
        at = shown[shown.searchsorted(lengths.cumsum() - lengths)]
        found: np.ndarray = begins[at]
        found[1:] &= at[1:] != at[:-1]
        found[:1] = True
        return found

    @functools.cached_property
    def capital(self) -> np.ndarray | None:
        """Which tokens begin with a capital letter (but not I): (size,) bool."""
        return self._of(lambda text: text[:1].isupper() and text != "I")

    @functools.cached_property
    def digit(self) -> np.ndarray | None:
        """Which tokens have a digit: (size,) bool."""
        return self._of(lambda text: any(character.isdigit() for character in text))

    def _of(self, fact: Callable[[str], bool]) -> np.ndarray | None:
        """A fact about each token's text without blanks, False for control tokens."""
        if self.spelling is None:
            return None
        texts = (piece.decode("utf-8", "replace").strip() for piece in self.spelling)
        return np.fromiter(map(fact, texts), bool, self.size) & ~self.special

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """n ordinary ids, uniformly."""
        # rng.integers costs 4 microseconds even for one; the unevenness of this is below 2**-30.
        return self.drawn(rng.random(n))

    def drawn(self, numbers: np.ndarray) -> np.ndarray:
        """Return an ordinary id for each of some numbers from [0, 1): (n,)."""
        return self.ordinary[(numbers * len(self.ordinary)).astype(np.int64)]

    def add_special_tokens(self, tokens: np.ndarray, dtype: type[np.integer] | None = None) -> np.ndarray:
        """[CLS] tokens [SEP]: one segment as an encoder reads it. dtype: of the answer; the tokens' own unless given."""
        framed = np.empty(len(tokens) + 2, dtype or tokens.dtype)
        framed[0], framed[1:-1], framed[-1] = self.cls, tokens, self.sep
        return framed
