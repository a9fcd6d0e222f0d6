"""How tokens are laid out for a model to read: who sees whom, and what is asked where.

Position i may attend to token j iff they share a `document` and `appears[j] <= looks[i] < leaves[j]` (where nothing
leaves, there is no such row). These few functions fill the integer rows; nothing else in firth writes an attention mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Example

PADDING = {"key_time": NEVER, "query_time": -NEVER, "key_expiry": NEVER}
"""What padding says: it is seen by nobody, and nobody looks from there."""


def causal(n: int) -> Example:
    """Every position sees itself and what came before it.

    >>> {k: v.tolist() for k, v in causal(3).items()}
    {'query_time': [0, 1, 2], 'key_time': [0, 1, 2]}
    """
    when = np.arange(n, dtype=np.int32)
    return {"query_time": when, "key_time": when}


def causal_after_prompt(n: int, prompt: int) -> Example:
    """The first `prompt` positions of n see each other, and each one behind them what came before it.

    >>> {k: v.tolist() for k, v in causal_after_prompt(5, prompt=3).items()}
    {'query_time': [0, 0, 0, 1, 2], 'key_time': [0, 0, 0, 1, 2]}
    """
    when = np.maximum(np.arange(1 - prompt, n + 1 - prompt, dtype=np.int32), 0)
    return {"query_time": when, "key_time": when}


def permuted(example: Example, order: np.ndarray, stands: np.ndarray, compensated: bool = False) -> Example:
    """Predict the tokens at the places `order` (k,), one after the other, in one row of two streams.

    The text comes first: what is not predicted is there from the start, what is predicted appears when its turn is over.
    Then one query each, shown as `stands` (k,), that looks one moment earlier and is seen by nobody: XLNet's second
    stream (Yang 2019, section 2.3). compensated: before the queries a stand-in for each, shown alike, which is
    there from the start and leaves when its token appears, so that everything sees each place of the text once (MPNet,
    Song 2020, section 2.2). Fields that say something of each token (document, segments) are carried to the new ones.

    >>> seen = permuted({"tokens": np.array([5, 6, 7, 8])}, np.array([3, 1]), stands=np.array([0, 0]))
    >>> for name, row in seen.items(): print(f"{name:10}", *(f"{'never' if x == NEVER else x:>5}" for x in row.tolist()))
    tokens         5     6     7     8     0     0
    positions      0     1     2     3     3     1
    looks          0     2     0     1     0     1
    appears        0     2     0     1 never never
    labels      -100  -100  -100  -100     8     6
    """
    tokens = example["tokens"]
    n, k = len(tokens), len(order)
    turn = np.arange(1, k + 1, dtype=np.int32)
    when = np.zeros(n, np.int32)
    when[order] = turn
    times = 2 if compensated else 1
    extra = np.tile(order, times)
    start = np.zeros(len(extra) - k, np.int32)
    shown = {
        "tokens": np.concatenate((tokens, np.tile(stands, times))),
        "positions": np.concatenate((np.arange(n, dtype=np.int32), extra.astype(np.int32))),
        "query_time": np.concatenate((when, start, turn - 1)),
        "key_time": np.concatenate((when, start, np.full(k, NEVER, np.int32))),
        "labels": np.concatenate((np.full(n + len(start), IGNORE), tokens[order])),
    }
    if compensated:
        shown["key_expiry"] = np.concatenate((np.full(n, NEVER, np.int32), turn, np.full(k, NEVER, np.int32)))
    for name in ("document_ids", "token_type_ids"):
        if name in example:
            shown[name] = np.concatenate((example[name], example[name][extra]))
    return shown | memory_fields(example)


def memory_fields(example: Example) -> Example:
    """What the example says of the tokens that stand before it (`firth.data.windows.Windows`)."""
    return {name: field for name, field in example.items() if name.startswith("memory_")}


def seq2seq(source: np.ndarray, target: np.ndarray, start: int) -> Example:
    """Source to the encoder; the decoder is shown the target moved right behind `start` (T5: the pad token).

    >>> seen = seq2seq(np.array([7, 8]), np.array([5, 6]), init_from=0)
    >>> seen["source_tokens"].tolist(), seen["tokens"].tolist(), seen["labels"].tolist()
    ([7, 8], [0, 5], [5, 6])
    """
    shown = np.concatenate(([start], target[:-1]))
    return {"source_tokens": source, "tokens": shown, "labels": target} | causal(len(target))


def prefix(source: np.ndarray, target: np.ndarray) -> Example:
    """Read the source both ways, write the target left to right, in one row.

    >>> seen = prefix(np.array([7, 8]), np.array([5, 6]))
    >>> seen["tokens"].tolist(), seen["labels"].tolist(), seen["query_time"].tolist()
    ([7, 8, 5], [-100, 5, 6], [0, 0, 1])
    """
    both = np.concatenate((source, target))
    labels = np.concatenate((np.full(len(source), IGNORE), target))[1:]
    return {"tokens": both[:-1], "labels": labels} | causal_after_prompt(len(labels), len(source))


Seq2SeqLayout = Literal["seq2seq", "prefix"]
"""How a source and an answer to it are laid out: for an encoder and a decoder, or in one row."""


def layout_of(kind: Seq2SeqLayout, source: np.ndarray, target: np.ndarray, vocab: Vocab) -> Example:
    """A source and an answer to it, laid out in either way."""
    return prefix(source, target) if kind == "prefix" else seq2seq(source, target, vocab.start)


@dataclass(frozen=True, eq=False)
class InfillPrompt:
    """A text with gaps, as a model that writes is shown it.

    Attributes:
        prompt: Token ids (n,).
        marks: The tokens (gaps + 1,) that the answer has before what fills each gap, and behind the last one. Empty where the
            answer is the whole text.
    """

    prompt: np.ndarray
    marks: np.ndarray


def pair(first: np.ndarray, second: np.ndarray, vocab: Vocab) -> Example:
    """[CLS] first [SEP] second [SEP], with segments 0 and 1 (BERT, section 3).

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> {k: v.tolist() for k, v in pair(np.array([5]), np.array([6, 7]), vocab).items()}
    {'tokens': [1, 5, 2, 6, 7, 2], 'token_type_ids': [0, 0, 0, 1, 1, 1]}
    """
    tokens = np.concatenate(([vocab.cls], first, [vocab.sep], second, [vocab.sep]))
    segments = np.repeat(np.array([0, 1]), (len(first) + 2, len(second) + 1))
    return {"tokens": tokens, "token_type_ids": segments}


def group(rows: Sequence[Example]) -> Example:
    """Rows of different lengths on one new axis, the shorter ones padded on the right: fields (n,) -> (K, T).

    >>> seen = group([{"tokens": np.array([5, 6, 7])} | causal(3), {"tokens": np.array([5, 8])} | causal(2)])
    >>> seen["tokens"].tolist(), seen["key_time"].tolist()
    ([[5, 6, 7], [5, 8, 0]], [[0, 1, 2], [0, 1, 1073741824]])
    """
    fill = {"labels": IGNORE} | PADDING
    most = max(len(row["tokens"]) for row in rows)
    # Without `key_time` every token is seen by all: what is padded must say that it is not.
    rows = [{"key_time": np.zeros(len(row["tokens"]), np.int32)} | row for row in rows]
    return {
        name: np.stack(
            [np.pad(row[name], (0, most - len(row[name])), constant_values=fill.get(name, 0)) for row in rows]
        )
        for name in rows[0]
    }
