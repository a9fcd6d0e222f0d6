"""Data preparation: train a tokenizer, hold out documents and build the token stores of a run.

Results are cached in the run directory under a fingerprint of their inputs, so a resumed run reads no text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from firth.corpora import readers
from firth.corpora.input_files import ReadStats, many
from firth.corpora.readers import Document
from firth.data.corpus import PreparedCorpus, is_corpus, open_stores
from firth.data.examples import BuildContext, DataConfig
from firth.data.split import HeldOut, content_key
from firth.data.text_cache import ReadOnce, read_once
from firth.data.token_store import TokenStore
from firth.evaluate.tokenizer_match import check_same_tokenizer
from firth.model.model import LM
from firth.pretrained.load_save import load_model
from firth.runs.start_model import StartModel, required_model
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.training.device import casts, default_device
from firth.types import LOGGER, LogLine, UserError

REPAIR_DESCRIPTIONS = {
    "bad_utf8": "pieces that are not UTF-8, read as U+FFFD",
    "nul": "NUL characters, removed",
    "too_long": "records over 4 MB, dropped",
    "mismatched": "rows with another number of cells than their header, dropped",
    "unnamed_columns": "table columns without a name, called Unnamed and their index",
    "skipped": "tables skipped, which are read as text only if they are named",
}
"""Kind of repair in `ReadStats` -> its description in the log."""


@dataclass(frozen=True, eq=False)
class RunData(BuildContext):
    """The data of a run and the models that building examples from it needs.

    Args:
        start: The model that the run starts from.
        precision: Precision of the run's forward passes, also for values that are precomputed.
    """

    start: StartModel = field(default_factory=StartModel)
    precision: Literal["fp32", "bf16"] = "fp32"

    def frozen_start(self, what: str) -> LM:
        return self._restricted(self.start.frozen(what))

    def frozen_model(self, path: str, field: str, what: str, hint: str) -> LM:
        directory = required_model(path, field, what)
        check_same_tokenizer(self.tokenizer, directory, f"{field}:", hint)
        return self._restricted(load_model(directory).to(default_device()))

    def _restricted(self, model: LM) -> LM:
        """Return a frozen model that gives ids without a token probability 0, as the trained model does."""
        model.restrict_vocab(self.tokenizer.vocab)
        return model

    def autocast(self) -> AbstractContextManager[object]:
        return casts(self.precision, default_device())()

    def store_directory(self) -> Path:
        """Return the directory of the training and the held-out token store, which may not exist yet."""
        every = [*self.config.paths(self.log), *self.siblings]
        name = fingerprint(self.config, every, self.tokenizer)
        return Path(self.config.cache_dir or self.directory / "data") / name

    def stores(self) -> tuple[TokenStore, TokenStore | None]:
        """Return the training and the held-out token store (None if nothing is held out). Missing stores are built.

        Prepared corpora are opened; what is held out of them was chosen when they were prepared.
        """
        paths, held_out = self.config.paths(self.log), self.config.validation_path
        if not (_all_prepared("data.path", paths) or (held_out and _all_prepared("data.validation_path", held_out))):
            folder = self.store_directory()
            train = self._store(folder / "train", paths, False)
            assert train is not None
            return train, self._store(folder / "valid", paths, True)
        if _all_prepared("data.path", paths):
            train, valid = open_stores(paths, self.tokenizer)
        else:
            train, valid = self._store(self.store_directory() / "train", paths, False), None
            assert train is not None
        if held_out and _all_prepared("data.validation_path", held_out):
            return train, open_stores(held_out, self.tokenizer)[0]
        return train, self._store(self.store_directory() / "valid", paths, True) if held_out else valid

    def _store(self, place: Path, paths: Sequence[str], validation: bool) -> TokenStore | None:
        """Return the training or the held-out store of text files; build it if it is missing."""
        if not place.exists():
            counts = text_of(self.config, paths, validation, self.directory).counts
            documents = documents_of(self.config, paths, validation, self._held_elsewhere(), self.directory)
            first = next(documents, None)
            if first is None:
                if not validation:
                    raise UserError(f"{', '.join(paths)}: there is no text to train on")
                return None
            place.parent.mkdir(parents=True, exist_ok=True)
            store = TokenStore.build(itertools.chain([first], documents), self.tokenizer, place, stats=counts.rows)
            kind = "held out" if validation else "training"
            self.log(f"{kind}: {len(store)} documents, {store.num_bytes:,} bytes, {len(store.tokens):,} tokens")
            for line in [] if validation else self._repeated(paths):
                self.log(line)
            if share := _unknown_share(store, self.tokenizer):
                self.log(
                    f"{share:.2%} of these tokens are unknown to the tokenizer: "
                    + (
                        "it is that of the start model, and tokenizer.extend=N adds N tokens of this text to it"
                        if self.start.path
                        else "train one on this text; with byte-bpe, or bpe or unigram with byte fallback, nothing is unknown"
                    )
                )
            for kind, at in ({} if validation else counts.at).items():
                self.log(f"{REPAIR_DESCRIPTIONS[kind]}: {counts.rows()[kind]:,}; the first is {at}")
        return TokenStore.open(place, self.tokenizer)

    def _held_elsewhere(self) -> frozenset[int]:
        """Return the content keys of the documents that are held out of the other paths of a mixture.

        Prepared corpora are left out, since their text is not read.
        """
        found = [
            held_out_of(replace(self.config, path=(path,)), [path], self.directory).keys
            for path in self.siblings
            if not is_corpus(path)
        ]
        return frozenset().union(*found)

    def _repeated(self, paths: Sequence[str]) -> list[str]:
        """Return warnings about duplicate documents and about documents that are also in the validation files."""
        lines = []
        chosen = held_out_of(self.config, paths, self.directory)
        if chosen.duplicates:
            lines.append(
                f"duplicates: {chosen.duplicates:,} of {chosen.documents:,} documents have the same content as an earlier one, "
                f"and are held out with it or not at all; the first is {chosen.first}"
            )
        if self.config.validation_path and not any(map(is_corpus, self.config.validation_path)):
            learned, measured = (
                text_of(self.config, paths, validation, self.directory) for validation in (False, True)
            )
            held = {content_key(d.text) for d in measured.documents()}
            both = [d.name for d in learned.documents() if content_key(d.text) in held]
            if both:
                lines.append(
                    f"{len(both):,} documents in data.path have the content of a document in data.validation_path, so they are "
                    f"trained on and evaluated; the first is {both[0]}"
                )
        return lines


def _all_prepared(field: str, paths: Sequence[str]) -> bool:
    """Return whether paths are prepared corpora.

    Raises:
        UserError: Some are, and others are text.
    """
    prepared = [is_corpus(path) for path in paths]
    if any(prepared) and not all(prepared):
        corpus, text = paths[prepared.index(True)], paths[prepared.index(False)]
        raise UserError(
            f"{field} names a prepared corpus ({corpus}) and text ({text}): prepare the text too (`firth prepare`)"
            + (", or set data.weights, one number per path" if field == "data.path" else "")
        )
    return all(prepared)


def text_of(source: DataConfig, paths: Sequence[str], validation: bool, directory: Path | None = None) -> ReadOnce:
    """Return the documents of the training files, or of the validation files.

    Args:
        source: Where the data is and what is held out.
        paths: The training files.
        validation: Whether to return the documents of `validation_path`, where it is set.
        directory: The run directory, which holds the temporary copy.
    """
    share = None if source.validation_path or not source.validation_fraction else source.validation_fraction
    chosen = source.validation_path if validation and source.validation_path else paths
    return read_once(chosen, field=source.text_field, split=source.split_by, share=share, directory=directory)


def held_out_of(source: DataConfig, paths: Sequence[str], directory: Path | None = None) -> HeldOut:
    """Return the documents that are held out of the training files; none with validation files or a fraction of 0."""
    return (
        HeldOut()
        if source.validation_path or not source.validation_fraction
        else text_of(source, paths, False, directory).held
    )


def documents_of(
    source: DataConfig,
    paths: Sequence[str],
    validation: bool,
    elsewhere: frozenset[int] = frozenset(),
    directory: Path | None = None,
) -> Iterator[Document]:
    """Yield the training documents, or the held-out ones.

    Documents are held out by their names, and all documents of one content together (`firth.data.split`). Of a single document
    the last part is held out, split between paragraphs.

    Args:
        source: Where the data is and what is held out.
        paths: The training files.
        validation: Whether to yield the held-out documents.
        elsewhere: Content keys of documents that are held out of other paths.
        directory: The run directory, which holds the temporary copy.
    """
    found = text_of(source, paths, validation, directory)
    if source.validation_path:
        yield from found.documents()
    elif found.held.documents == 1:
        yield from _share(next(found.documents()), source.validation_fraction, validation)
    else:
        yield from found.documents(validation, elsewhere)


def _share(document: Document, share: float, validation: bool) -> Iterator[Document]:
    """Yield the last part of a single document (validation), or the text before it."""
    cut = int(len(document.text) * (1 - share))
    at = document.text.find("\n\n", cut)
    cut = at if at >= 0 else cut
    text = document.text[cut:] if validation else document.text[:cut]
    if text.strip():
        yield Document(document.name, text)


def fingerprint(source: DataConfig, paths: Sequence[str], tokenizer: Tokenizer) -> str:
    """Return a short hash of the files (paths, sizes, modification times), the reading options and the tokenizer."""
    every = [*paths, *source.validation_path]
    files = readers.files([path for path in every if not is_corpus(path)])
    stats: list[tuple[str, object, object]] = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    stats += [(path, PreparedCorpus.open(path).content, 0) for path in every if is_corpus(path)]
    how = {k: v for k, v in asdict(source).items() if k not in ("path", "corpus", "cache_dir", "weights")}
    text = json.dumps([stats, how, tokenizer.digest], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _unknown_share(store: TokenStore, tokenizer: Tokenizer) -> float:
    """Return the fraction of a store's tokens that are unknown; reads 1 Mi tokens at a time, if there is an unknown token."""
    unk, stretch = tokenizer.vocab.roles.get("unk"), 1 << 20
    if unk is None:
        return 0.0
    stretches = (store.tokens[at : at + stretch] for at in range(0, len(store.tokens), stretch))
    return sum(int(np.count_nonzero(tokens == unk)) for tokens in stretches) / max(1, len(store.tokens))


def train_tokenizer(
    paths: Sequence[str],
    out: Path,
    *,
    algorithm: str,
    vocab_size: int,
    text_field: str = "text",
    split_by: str = "file",
    sample_bytes: int = 200_000_000,
    seed: int = 0,
    num_sentinels: int = 0,
    byte_fallback: bool = True,
    log: LogLine = LOGGER.info,
    texts: Callable[[ReadStats], Iterator[str]] | None = None,
) -> Tokenizer:
    """Train a tokenizer on files and save it with the counts of its merges (`firth tokenizer show`).

    Args:
        paths: Training files.
        out: The directory to save to.
        algorithm: Training algorithm (`firth.tokenizer.train`).
        vocab_size: Number of ids.
        text_field: The field of a record that holds the text.
        split_by: What a document of a text file is ("file", "blank", "line").
        sample_bytes: Bytes of text to train on.
        seed: Seed of the sample.
        num_sentinels: Number of `<extra_id_n>` tokens.
        byte_fallback: Whether bpe and unigram encode rare characters as bytes.
        log: Receives progress messages.
        texts: Yields the texts to train on in place of the files' documents, and counts them.
    """
    counts = ReadStats()
    plain = (d.text for d in readers.documents(paths, field=text_field, split=split_by, counts=counts))
    tokenizer = train(
        _nonempty(plain if texts is None else texts(counts), paths), algorithm, vocab_size, seed=seed,
        sample_bytes=sample_bytes, num_sentinels=num_sentinels, byte_fallback=byte_fallback, log=log,
    )  # fmt: skip
    tokenizer.save(out)
    whole = ("files", "documents", "bytes")
    rows = ", ".join(
        many(n, name.removesuffix("s")) if name in whole else f"{n:,} {name.replace('_', ' ')}"
        for name, n in counts.rows().items()
    )
    log(f"{algorithm} tokenizer of {tokenizer.vocab.size:,} ids from {rows or 'the texts of the records'}: {out}")
    return tokenizer


def _nonempty(texts: Iterable[str], paths: Sequence[str]) -> Iterator[str]:
    """Yield the texts; raise a UserError that names the files at the end if all texts are empty."""
    found = False
    for text in texts:
        found = found or bool(text.strip())
        yield text
    if not found:
        raise UserError(f"{', '.join(paths)}: there is no text in it: every document is empty")
