r"""Vocabulary: ids, roles and characters of tokens, and repair of text before encoding.

Replace lone surrogates, which UTF-8 and the tokenizers library cannot represent.

Python strings and JSON may contain them ("\ud83d" without its other half). They become U+FFFD, the replacement
character; a high surrogate followed by a low one becomes the character.

>>> replace_lone_surrogates("a\ud83d b \ud83d\ude00") == "a\ufffd b \U0001f600"
True

The properties of a vocabulary that the rest of the package needs: ids of special tokens, and facts about each token.

Objectives mask, arrange and split token ids; they never see text. `Vocab` is therefore plain arrays, cheap to send to a
worker, and the same for every tokenizer algorithm.

>>> import numpy as np
>>> v = Vocab(size=8, roles={"pad": 0, "mask": 1, "cls": 2, "sep": 3}, special=np.arange(8) < 4)
>>> v.mask, v.add_special_tokens(np.array([5, 6])).tolist()
(1, [2, 5, 6, 3])
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from firth.tokenizer.segmentation import sentence_starts, word_starts
from firth.types import UserError

SURROGATE = re.compile("[\ud800-\udfff]")


def replace_lone_surrogates(text: str) -> str:
    """Return the text with lone surrogates replaced by U+FFFD; the same object if there are none."""
    if text.isascii() or SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


ROLES = ("pad", "unk", "bos", "eos", "cls", "sep", "mask")


@dataclass(frozen=True, eq=False)
class Vocab:
    """Ids of special tokens, and per-id properties.

    Args:
        size: Number of ids.
        roles: Role -> id, for roles in ROLES; two roles may share an id (RoBERTa's cls is its bos).
        special: (size,) bool, True for ids that user text cannot produce (except `unk`).
        sentinels: Ids of `<extra_id_0>`, `<extra_id_1>`, ...
        spelling: UTF-8 bytes of each id, with blanks and partial characters; None: unknown, and each token is a word. Words,
            sentences, capitals and digits are derived from it.
        decoder_start: Role of the first decoder token of an encoder-decoder (`ModelConfig.encoder.decoder_start_token`).
        holes: Unused ids below `size`, ascending.
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
        """Return the id of a role; UserError if the tokenizer has none."""
        if role not in self.roles:
            raise UserError(
                f"this tokenizer has no {role} token, which this objective needs; "
                f"it has {', '.join(self.roles) or 'none'}: train one with `firth tokenizer train`"
            )
        return self.roles[role]

    @property
    def pad(self) -> int:
        """Id of the pad token."""
        return self._role("pad")

    @property
    def bos(self) -> int:
        """Id of the bos token."""
        return self._role("bos")

    @property
    def eos(self) -> int:
        """Id of the eos token."""
        return self._role("eos")

    @property
    def cls(self) -> int:
        """Id of the cls token."""
        return self._role("cls")

    @property
    def sep(self) -> int:
        """Id of the sep token."""
        return self._role("sep")

    @property
    def mask(self) -> int:
        """Id of the mask token."""
        return self._role("mask")

    @property
    def start(self) -> int:
        """Id of the first decoder token of an encoder-decoder."""
        return self._role(self.decoder_start)

    def with_decoder_start(self, role: str) -> Vocab:
        """Return a copy for a model whose decoder starts with the token of this role."""
        return replace(self, decoder_start=role)

    @property
    def ordinary(self) -> np.ndarray:
        """Ids that user text can contain, ascending."""
        ordinary: np.ndarray = self.__dict__["_ordinary"]
        return ordinary

    def absent(self, rows: int) -> np.ndarray:
        """Return the ids below `rows` without a token: holes, and those past the last token.

        >>> Vocab(4, {}, np.zeros(4, bool), holes=np.array([2])).absent(6).tolist()
        [2, 4, 5]
        """
        return np.concatenate((self.holes, np.arange(self.size, rows))).astype(np.int64)

    def starts(self, tokens: np.ndarray) -> np.ndarray:
        """Return where in the tokens (n,) of a text a word starts (`firth.tokenizer.segmentation`): (n,) bool.

        A blank belongs to the next word. Without spelling each token is a word.

        >>> v = Vocab(5, {}, np.zeros(5, bool), spelling=(b" it", b"'", b"s", b",", b" o"))
        >>> v.starts(np.array([0, 1, 2, 3, 4, 2, 2])).astype(int).tolist()
        [1, 0, 0, 1, 1, 0, 0]
        """
        if self.spelling is None:
            return np.ones(len(tokens), bool)
        return self._begins(self.spelling, tokens, word_starts)

    def sentences(self, tokens: np.ndarray) -> np.ndarray:
        """Return where in the tokens (n,) of a text a sentence starts (`firth.tokenizer.segmentation`): (n,) bool.

        White space before a sentence belongs to it, so that an empty line is none.

        Raises:
            UserError: The spelling of the tokens is unknown.

        >>> v = Vocab(4, {}, np.zeros(4, bool), spelling=(b"He", b" came", b".", b" Dr"))
        >>> v.sentences(np.array([0, 1, 2, 3, 2, 1, 2])).astype(int).tolist()
        [1, 0, 0, 1, 0, 0, 0]
        """
        if self.spelling is None:
            raise UserError("it is unknown where a sentence ends in this vocabulary: use a tokenizer of firth")
        return self._begins(self.spelling, tokens, sentence_starts, blanks=b" \t\n\r\v\f")

    def text(self, tokens: np.ndarray) -> str:
        """Return the text of tokens, with line breaks for control tokens; partial characters are lone surrogates."""
        return b"".join([(self.spelling or ())[i] for i in tokens.tolist()]).decode("utf-8", "surrogateescape")

    def _begins(
        self,
        spelling: tuple[bytes, ...],
        tokens: np.ndarray,
        starts: Callable[[str], np.ndarray],
        blanks: bytes = b" ",
    ) -> np.ndarray:
        """Return where a unit starts: the first token of the blanks before its first other character, or of that character."""
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
            part = (codes >= 0xD800) & (codes < 0xE000)  # a byte of a partial character
            width = np.where(part, 1, 1 + (codes >= 0x80) + (codes >= 0x800) + (codes >= 0x10000))
            begins[(width.cumsum() - width)[units]] = True
        blank = np.isin(np.frombuffer(data, np.uint8), np.frombuffer(blanks, np.uint8))
        shown = np.append(np.flatnonzero(~blank), len(data))
        begins[shown[shown.searchsorted(np.flatnonzero(begins))]] = True
        at = shown[shown.searchsorted(lengths.cumsum() - lengths)]
        found: np.ndarray = begins[at]
        found[1:] &= at[1:] != at[:-1]
        found[:1] = True
        return found

    @functools.cached_property
    def capital(self) -> np.ndarray | None:
        """Which tokens start with a capital letter (except I): (size,) bool."""
        return self._of(lambda text: text[:1].isupper() and text != "I")

    @functools.cached_property
    def digit(self) -> np.ndarray | None:
        """Which tokens have a digit: (size,) bool."""
        return self._of(lambda text: any(character.isdigit() for character in text))

    def _of(self, fact: Callable[[str], bool]) -> np.ndarray | None:
        """Return a property of each token's text without blanks, False for control tokens."""
        if self.spelling is None:
            return None
        texts = (piece.decode("utf-8", "replace").strip() for piece in self.spelling)
        return np.fromiter(map(fact, texts), bool, self.size) & ~self.special

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Return n ordinary ids, drawn uniformly."""
        # rng.integers costs 4 microseconds even for one; the bias of this is below 2**-30.
        return self.drawn(rng.random(n))

    def drawn(self, numbers: np.ndarray) -> np.ndarray:
        """Map numbers in [0, 1) to ordinary ids: (n,)."""
        return self.ordinary[(numbers * len(self.ordinary)).astype(np.int64)]

    def add_special_tokens(self, tokens: np.ndarray, dtype: type[np.integer] | None = None) -> np.ndarray:
        """Return [CLS] tokens [SEP].

        Args:
            tokens: (n,).
            dtype: Of the result; default: that of the tokens.
        """
        out = np.empty(len(tokens) + 2, dtype or tokens.dtype)
        out[0], out[1:-1], out[-1] = self.cls, tokens, self.sep
        return out
