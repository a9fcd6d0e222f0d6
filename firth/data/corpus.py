"""A prepared corpus: a directory of parts, each with a token store, and one manifest over all. `firth prepare` writes it.

    corpus/corpus.json              tokenizer digest, settings, totals, and for each part its counts and content digests; written last
    corpus/tokenizer/               the tokenizer of the parts
    corpus/parts/00000/part.json    which bytes of which files the part was made of, and what was dropped
    corpus/parts/00000/train/       a token store (`firth.data.token_store`); valid/ has the held-out documents

`data.path=CORPUS` in a recipe reads it. Opening reads corpus.json alone: neither text nor token ids.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firth.data.token_store import StorePart, TokenStore, check_store_tokenizer, read_manifest
from firth.io.integrity import digest, read_record, write_record
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

FORMAT = 1
CORPUS_FILE, PART_FILE = "corpus.json", "part.json"
TOKENIZER, PARTS = "tokenizer", "parts"
SPLITS = ("train", "valid")
FACTS = ("documents", "tokens", "bytes", "dtype", "opened", "content", "counts")
"""Fields of a store's manifest that corpus.json repeats."""

PREPARE_AGAIN = "delete {}, and run `firth prepare` again"
"""Advice in errors about a damaged part."""


def is_corpus(path: str | Path) -> bool:
    """Return whether a path is a prepared corpus."""
    return (Path(path).expanduser() / CORPUS_FILE).is_file()


@dataclass(frozen=True)
class PreparedCorpus:
    """An open corpus.

    Args:
        directory: The directory.
        manifest: The content of its corpus.json.
    """

    directory: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, directory: Path | str) -> PreparedCorpus:
        """Open a complete corpus.

        Raises:
            UserError: The manifest is missing, damaged or of another version.
        """
        directory = Path(directory).expanduser()
        file = directory / CORPUS_FILE
        if not file.is_file():
            raise UserError(f"{directory} is not a prepared corpus (it has no {CORPUS_FILE}): run `firth prepare`")
        advice = "run `firth prepare` again"
        manifest = read_record(file, {"format": int, "parts": list, "tokenizer": str, "content": str}, advice)
        if manifest["format"] != FORMAT:
            raise UserError(f"{file} does not have corpus format {FORMAT}, which this version of firth reads: {advice}")
        return cls(directory, manifest)

    @property
    def tokenizer(self) -> Path:
        """The directory of its tokenizer."""
        return self.directory / TOKENIZER

    @property
    def content(self) -> str:
        """Digest of the token ids, in which part they are, and the tokenizer."""
        return str(self.manifest["content"])

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all documents, held-out ones included."""
        return int(self.manifest["bytes"])

    def parts(self, split: str) -> list[StorePart]:
        """Return the parts of a split ("train" or "valid") that have documents.

        Raises:
            UserError: A file is missing or has another size.
        """
        found = []
        for part in self.manifest["parts"]:
            if part[split]:
                directory = self.directory / part["directory"]
                opened = StorePart(directory / split, part[split], PREPARE_AGAIN.format(directory))
                opened.check_sizes()
                found.append(opened)
        return found


def open_stores(paths: Sequence[str | Path], tokenizer: Tokenizer) -> tuple[TokenStore, TokenStore | None]:
    """Return the training and the held-out store of one corpus, or of several in sequence; None if nothing is held out.

    Args:
        paths: The corpora.
        tokenizer: The tokenizer that they must have been prepared with.

    Raises:
        UserError: A corpus is damaged, has another tokenizer or no training documents.
    """
    corpora = [PreparedCorpus.open(path) for path in paths]
    for corpus in corpora:
        check_store_tokenizer(corpus.directory, corpus.manifest["tokenizer"], tokenizer)
    train, valid = (_store(corpora, split) for split in SPLITS)
    if train is None:
        raise UserError(f"{', '.join(map(str, paths))}: there is no text to train on")
    return train, valid


def _store(corpora: Sequence[PreparedCorpus], split: str) -> TokenStore | None:
    parts = [part for corpus in corpora for part in corpus.parts(split)]
    if not parts:
        return None
    facts = [part.facts for part in parts]
    manifest = {
        "tokenizer": corpora[0].manifest["tokenizer"],
        "dtype": facts[0]["dtype"],
        "opened": facts[0]["opened"],
        **{name: sum(fact[name] for fact in facts) for name in ("documents", "tokens", "bytes")},
        "counts": total(fact["counts"] for fact in facts),
        "content": digest({"parts": [fact["content"] for fact in facts]}),
    }
    return TokenStore(corpora[0].directory, manifest, parts)


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sum of some counts, by name.

    >>> total([{"files": 1}, {"files": 2, "nul": 1}])
    {'files': 3, 'nul': 1}
    """
    found: Counter[str] = Counter()
    for some in counts:
        found.update(some)
    return dict(found)


def part_directory(corpus: Path, number: int) -> Path:
    """Return the directory of a part by its number."""
    return corpus / PARTS / f"{number:05d}"


def write_manifest(
    directory: Path, numbers: Sequence[int], tokenizer: Tokenizer, settings: Mapping[str, Any], texts: Mapping[str, Any]
) -> PreparedCorpus:
    """Write corpus.json over complete parts, and return the corpus.

    Args:
        directory: The corpus.
        numbers: Numbers of its parts, in order.
        tokenizer: Their tokenizer.
        settings: What the parts depend on besides their text.
        texts: Further fields, for people: what was dropped and examples of it.
    """
    parts = []
    for number in numbers:
        place = part_directory(directory, number)
        advice = PREPARE_AGAIN.format(place)
        stores: dict[str, Any] = {}
        for split in SPLITS:
            exists = (place / split).is_dir()
            manifest = read_manifest(place / split, advice) if exists else {}
            stores[split] = {name: manifest[name] for name in FACTS} if exists else None
        parts.append({"directory": place.relative_to(directory).as_posix(), **stores})
    stored = [part[split] for part in parts for split in SPLITS if part[split]]
    contents = [[part[split] and part[split]["content"] for split in SPLITS] for part in parts]
    manifest = {
        "format": FORMAT,
        "tokenizer": tokenizer.digest,
        "settings": dict(settings),
        **{name: sum(facts[name] for facts in stored) for name in ("documents", "tokens", "bytes")},
        **texts,
        "parts": parts,
        "content": digest({"tokenizer": tokenizer.digest, "parts": contents}),
    }
    write_record(directory / CORPUS_FILE, json.loads(json.dumps(manifest)))
    return PreparedCorpus.open(directory)
