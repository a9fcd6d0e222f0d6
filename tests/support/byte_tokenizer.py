"""A minimal tokenizer: one token per byte, after a few special ones."""

from collections.abc import Sequence

import numpy as np

from firth.tokenizer.vocab import Vocab
from firth.types import UserError

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<mask>", "<|im_start|>", "<|im_end|>")
ROLES = {"pad": 0, "unk": 1, "bos": 2, "cls": 2, "eos": 3, "sep": 3, "mask": 4}


class ByteTokenizer:
    """Ids 0..6 are special, 7 + b is the byte b."""

    vocab = Vocab(size=len(SPECIAL) + 256, roles=ROLES, special=np.arange(len(SPECIAL) + 256) < len(SPECIAL))

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32) + len(SPECIAL)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return bytes(int(i) - len(SPECIAL) for i in ids if i >= len(SPECIAL)).decode(errors="replace")

    def token(self, id: int) -> str:
        return SPECIAL[id] if id < len(SPECIAL) else chr(id - len(SPECIAL))

    def id(self, token: str) -> int:
        if token not in SPECIAL:
            raise UserError(f"this tokenizer has no token {token!r}")
        return SPECIAL.index(token)
