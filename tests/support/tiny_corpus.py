"""Shared helpers of the data tests: a small tokenizer, documents, and a token store."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from firth.corpora.readers import Document
from firth.data.corpus import PreparedCorpus, part_directory, write_manifest
from firth.data.source import Source
from firth.data.token_store import TokenStore
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import Example

TEXTS = [text for text in topics.values() if len(text) > 400][:40]


@functools.cache
def tokenizer() -> Tokenizer:
    """Return a byte-level tokenizer of 600 tokens, trained on Python's help, with eight sentinels."""
    return train(TEXTS, "byte-bpe", vocab_size=600, seed=0, num_sentinels=8)


def documents(n: int = 30, longest: int = 3000) -> list[Document]:
    """Return documents of very different lengths, one of them empty."""
    return [Document(f"doc {i}", TEXTS[i % len(TEXTS)][: (i * 97) % longest]) for i in range(n)]


def store(folder: Path, n: int = 30) -> TokenStore:
    return TokenStore.build(documents(n), tokenizer(), folder / "store")


class Counting(Source):
    """Examples of random lengths whose tokens identify the example: i, i, i, ..."""

    def __init__(self, n: int, longest: int = 20) -> None:
        self.token_counts = np.random.default_rng(0).integers(2, longest + 1, n)

    def __len__(self) -> int:
        return len(self.token_counts)

    def __getitem__(self, index: int) -> Example:
        return {"tokens": np.full(self.token_counts[index], 1 + index, np.int32)}


def corpus(folder: Path, sizes: tuple[int, ...] = (7, 1, 12, 10), held_out: int = 3) -> PreparedCorpus:
    """Write a corpus in parts of some sizes with the documents of `documents`, and a part of held-out ones."""
    found, start = documents(sum(sizes)), 0
    for number, size in enumerate(sizes):
        TokenStore.build(found[start : start + size], tokenizer(), part_directory(folder, number) / "train")
        start += size
    if held_out:
        TokenStore.build(
            documents(start + held_out)[start:], tokenizer(), part_directory(folder, len(sizes) - 1) / "valid"
        )
    tokenizer().save(folder / "tokenizer")
    return write_manifest(folder, range(len(sizes)), tokenizer(), {}, {})


def write_text_folder(folder: Path) -> Path:
    """Write a tokenizer, and six files of records in `text`, in a folder; return it."""
    tokenizer().save(folder / "tokenizer")
    (folder / "text").mkdir()
    for number in range(6):
        rows = [json.dumps({"text": text, "id": f"{number}-{i}"}) + "\n" for i, text in enumerate(TEXTS[number::6] * 2)]
        (folder / "text" / f"{number}.jsonl").write_text("".join(rows))
    return folder
