"""A small example of every kind, on which sums of objectives are tried before a run.

Whether one objective can be added to another depends on which fields the first returns. That is found by building an example,
so an objective does not declare it.

>>> sorted(sample_example({"tokens", "label"}))
['label', 'tokens']
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from firth.objectives.policy_gradient import PER_TOKEN
from firth.tokenizer.vocab import ROLES, Vocab
from firth.types import Example

LENGTH, FIRST_WORD, SIZE = 8, 16, 32
"""Tokens of a text, the first id that is not special, and the size of the vocabulary."""

SAMPLE_VOCAB = Vocab(
    size=SIZE, roles={role: id for id, role in enumerate(ROLES)}, special=np.arange(SIZE) < FIRST_WORD,
    sentinels=np.arange(len(ROLES), FIRST_WORD), spelling=tuple(b" a" if id % 4 else b"." for id in range(SIZE)),
)  # fmt: skip
"""A vocabulary with every special token, five sentinels or more, words, and ends of sentences."""

_TEXT = np.arange(FIRST_WORD, FIRST_WORD + LENGTH)
_MASK = np.arange(LENGTH) >= LENGTH // 2
_FIELDS: Example = {
    "tokens": _TEXT, "mask": _MASK, "token_type_ids": _MASK.astype(np.int64), "label": 1, "score": 1.0,
    "first": _TEXT[:4], "second": _TEXT[4:], "other": _TEXT[2:5], "votes": np.array([0, 1]), "taught": np.array([0.1, 0.9]),
    "tags": np.zeros(LENGTH, np.int64), "start": 2, "end": 3, "source": _TEXT, "target": _TEXT[:3],
    "kept": np.ones(SIZE), "noise": np.arange(1, SIZE + 1) / SIZE,
    "options": [{"tokens": _TEXT}, {"tokens": _TEXT[:4]}],
    "desirable": np.array([True]), "margin": np.zeros(1),
    "answers": [_TEXT, _TEXT[:6]], "masks": [_MASK, _MASK[:6]], "rank": np.array([0, 1]),
}  # fmt: skip
_FIELDS |= {
    f"{side}_{name}": _FIELDS[name] for side in ("chosen", "rejected", "mismatched") for name in ("tokens", "mask")
}
_FIELDS |= {name: np.zeros(LENGTH, np.float32) for name in PER_TOKEN}


def sample_example(fields: Collection[str]) -> Example:
    """Return a small example with some fields."""
    example = {name: value for name, value in _FIELDS.items() if name in fields}
    if "reference" in fields and "old" not in fields:  # a number for each answer, and not for each token
        example["reference"] = np.zeros(2, np.float32)
    return example
