"""A prepared corpus: a directory of parts, each with a token store, and one manifest over all. `firth prepare` writes it.

    corpus/corpus.json              tokenizer digest, settings, totals, and for each part its counts and content digests; written last
    corpus/tokenizer/               the tokenizer of the parts
    corpus/parts/00000/part.json    which bytes of which files the part was made of, and what was dropped
    corpus/parts/00000/train/       a token store (`firth.data.token_store`); valid/ has the held-out documents

`data.path=CORPUS` in a recipe reads it, from a directory or from the address of one in an object store. Opening reads corpus.json alone:
neither text nor token ids.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firth.corpora.readers import is_url
from firth.corpora.remote import Address
from firth.data.token_store import StorePart, TokenStore, check_store_tokenizer, read_manifest
from firth.io.atomic import cache_directory, scratch_directory
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
    """Return whether a path or an address is a prepared corpus."""
    return (_place(path) / CORPUS_FILE).exists()


def _place(path: str | Path) -> Path | Address:
    return Address(path) if isinstance(path, str) and is_url(path) else Path(path).expanduser()


@dataclass(frozen=True)
class PreparedCorpus:
    """An open corpus.

    Args:
        directory: The directory.
        manifest: The content of its corpus.json.
        tokenizer: The directory of its tokenizer; a copy, if the corpus is in an object store.
    """

    directory: Path | Address
    manifest: Mapping[str, Any]
    tokenizer: Path

    @classmethod
    def open(cls, directory: Path | str) -> PreparedCorpus:
        """Open a complete corpus.

        Raises:
            UserError: The manifest is missing, damaged or of another version.
        """
        place = _place(directory)
        if not (place / CORPUS_FILE).exists():
            raise UserError(f"{directory} is not a prepared corpus (it has no {CORPUS_FILE}): run `firth prepare`")
        here = _copied(place) if isinstance(place, Address) else place
        file, advice = here / CORPUS_FILE, "run `firth prepare` again"
        try:
            manifest = read_record(file, {"format": int, "parts": list, "tokenizer": str, "content": str}, advice)
            if manifest["format"] != FORMAT:
                raise UserError(
                    f"{file} does not have corpus format {FORMAT}, which this version of firth reads: {advice}"
                )
        except UserError as error:
            raise UserError(str(error).replace(str(here), str(place))) from None
        return cls(place, manifest, here / TOKENIZER)

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


def _copied(corpus: Address) -> Path:
    """Return a directory with copies of corpus.json and the tokenizer of a corpus in an object store.

    It is named by the address and the content of corpus.json, so a corpus that is extended has another one.
    """
    raw = (corpus / CORPUS_FILE).read_bytes()
    here = cache_directory() / "corpora" / hashlib.sha256(corpus.url.encode() + raw).hexdigest()[:16]
    if not here.is_dir():
        with scratch_directory(here) as partial:
            (partial / CORPUS_FILE).write_bytes(raw)
            (corpus / TOKENIZER).copy(partial / TOKENIZER)
            with suppress(OSError):  # another process has copied it in the meantime
                os.rename(partial, here)
    return here


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
