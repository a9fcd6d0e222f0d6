"""Attention fields and label positions of an example: which positions attend to which, and where a label is predicted.

Position i may attend to token j iff they share a `document_ids` value and `key_time[j] <= query_time[i] < key_expiry[j]` (without
`key_expiry`, keys never expire). The functions here fill these integer fields; nothing else in firth writes an attention mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Example

PADDING = {"key_time": NEVER, "query_time": -NEVER, "key_expiry": NEVER}
"""Values of the attention fields on padding: no position attends to it, and it attends to nothing."""


def causal(n: int) -> Example:
    """Return causal attention: every position attends to itself and earlier ones.

    >>> {k: v.tolist() for k, v in causal(3).items()}
    {'query_time': [0, 1, 2], 'key_time': [0, 1, 2]}
    """
    when = np.arange(n, dtype=np.int32)
    return {"query_time": when, "key_time": when}


def causal_after_prompt(n: int, prompt: int) -> Example:
    """Return prefix-LM attention: the first `prompt` positions of n attend to each other, each later one to all before it.

    >>> {k: v.tolist() for k, v in causal_after_prompt(5, prompt=3).items()}
    {'query_time': [0, 0, 0, 1, 2], 'key_time': [0, 0, 0, 1, 2]}
    """
    when = np.maximum(np.arange(1 - prompt, n + 1 - prompt, dtype=np.int32), 0)
    return {"query_time": when, "key_time": when}


def permuted(example: Example, order: np.ndarray, query_tokens: np.ndarray, compensated: bool = False) -> Example:
    """Build a two-stream example that predicts the tokens at given positions one after the other.

    The text comes first: tokens that are not predicted are visible from the start, predicted ones once they have been predicted.
    Then follows one query for each prediction, which attends to everything predicted before it and which no position attends to:
    the second stream of XLNet (Yang 2019, section 2.3). Fields with one value per token (document_ids, token_type_ids) are copied
    to the queries.

    Args:
        example: The text.
        order: Positions to predict, in order, (k,).
        query_tokens: Input tokens of the queries, (k,).
        compensated: Whether to add a placeholder for each query, with the same input token, that is visible from the start and
            expires when its token becomes visible. Every query then attends to each position of the text exactly once (MPNet,
            Song 2020, section 2.2).

    >>> seen = permuted({"tokens": np.array([5, 6, 7, 8])}, np.array([3, 1]), query_tokens=np.array([0, 0]))
    >>> for name, row in seen.items(): print(f"{name:10}", *(f"{'never' if x == NEVER else x:>5}" for x in row.tolist()))
    tokens         5     6     7     8     0     0
    positions      0     1     2     3     3     1
    query_time     0     2     0     1     0     1
    key_time       0     2     0     1 never never
    labels      -100  -100  -100  -100     8     6
    """
    tokens = example["tokens"]
    n, k = len(tokens), len(order)
    turns = np.arange(1, k + 1, dtype=np.int32)
    when = np.zeros(n, np.int32)
    when[order] = turns
    times = 2 if compensated else 1
    extra = np.tile(order, times)
    start = np.zeros(len(extra) - k, np.int32)
    shown = {
        "tokens": np.concatenate((tokens, np.tile(query_tokens, times))),
        "positions": np.concatenate((np.arange(n, dtype=np.int32), extra.astype(np.int32))),
        "query_time": np.concatenate((when, start, turns - 1)),
        "key_time": np.concatenate((when, start, np.full(k, NEVER, np.int32))),
        "labels": np.concatenate((np.full(n + len(start), IGNORE), tokens[order])),
    }
    if compensated:
        shown["key_expiry"] = np.concatenate((np.full(n, NEVER, np.int32), turns, np.full(k, NEVER, np.int32)))
    for name in ("document_ids", "token_type_ids"):
        if name in example:
            shown[name] = np.concatenate((example[name], example[name][extra]))
    return shown | memory_fields(example)


def memory_fields(example: Example) -> Example:
    """Return the fields of an example that describe the text before it (`firth.data.windows`)."""
    return {name: field for name, field in example.items() if name.startswith("memory_")}


def seq2seq(source: np.ndarray, target: np.ndarray, start: int) -> Example:
    """Build an encoder-decoder example: the decoder input is the target shifted right behind `start` (T5: the pad token).

    >>> seen = seq2seq(np.array([7, 8]), np.array([5, 6]), start=0)
    >>> seen["source_tokens"].tolist(), seen["tokens"].tolist(), seen["labels"].tolist()
    ([7, 8], [0, 5], [5, 6])
    """
    shown = np.concatenate(([start], target[:-1]))
    return {"source_tokens": source, "tokens": shown, "labels": target} | causal(len(target))


def prefix(source: np.ndarray, target: np.ndarray) -> Example:
    """Build a prefix-LM example: bidirectional attention on the source, causal attention on the target, in one row.

    >>> seen = prefix(np.array([7, 8]), np.array([5, 6]))
    >>> seen["tokens"].tolist(), seen["labels"].tolist(), seen["query_time"].tolist()
    ([7, 8, 5], [-100, 5, 6], [0, 0, 1])
    """
    both = np.concatenate((source, target))
    labels = np.concatenate((np.full(len(source), IGNORE), target))[1:]
    return {"tokens": both[:-1], "labels": labels} | causal_after_prompt(len(labels), len(source))


Seq2SeqLayout = Literal["seq2seq", "prefix"]
"""Layout of a source and its target: for an encoder and a decoder, or in one row."""


def layout_of(kind: Seq2SeqLayout, source: np.ndarray, target: np.ndarray, vocab: Vocab) -> Example:
    """Build an example from a source and its target in the given layout."""
    return prefix(source, target) if kind == "prefix" else seq2seq(source, target, vocab.start)


def pair(first: np.ndarray, second: np.ndarray, vocab: Vocab) -> Example:
    """Build [CLS] first [SEP] second [SEP] with token types 0 and 1 (BERT, section 3).

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> {k: v.tolist() for k, v in pair(np.array([5]), np.array([6, 7]), vocab).items()}
    {'tokens': [1, 5, 2, 6, 7, 2], 'token_type_ids': [0, 0, 0, 1, 1, 1]}
    """
    tokens = np.concatenate(([vocab.cls], first, [vocab.sep], second, [vocab.sep]))
    token_types = np.repeat(np.array([0, 1]), (len(first) + 2, len(second) + 1))
    return {"tokens": tokens, "token_type_ids": token_types}


def group(rows: Sequence[Example]) -> Example:
    """Stack rows of different lengths on a new axis, padded on the right: fields (n,) -> (K, T).

    >>> seen = group([{"tokens": np.array([5, 6, 7])} | causal(3), {"tokens": np.array([5, 8])} | causal(2)])
    >>> seen["tokens"].tolist(), seen["key_time"].tolist()
    ([[5, 6, 7], [5, 8, 0]], [[0, 1, 2], [0, 1, 1073741824]])
    """
    fill = {"labels": IGNORE} | PADDING
    longest = max(len(row["tokens"]) for row in rows)
    # Without `key_time` every token is visible, so padded rows need it.
    rows = [{"key_time": np.zeros(len(row["tokens"]), np.int32)} | row for row in rows]
    return {
        name: np.stack(
            [np.pad(row[name], (0, longest - len(row[name])), constant_values=fill.get(name, 0)) for row in rows]
        )
        for name in rows[0]
    }
