"""From a recipe's source to files on disk: the tokenizer, the held-out split and the token stores of a run.

All of it is made once per run directory and found again by a fingerprint of what it was made from, so a second
start of a run reads no text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from firth.corpora import catalog, readers
from firth.corpora.read_stats import ReadStats, many
from firth.corpora.readers import Document
from firth.data.split import HeldOut, content_key
from firth.data.text_cache import ReadOnce, read_once
from firth.data.token_store import TokenStore
from firth.doctor import device
from firth.model.model import LM
from firth.pretrained.load_save import load_model
from firth.runs.config_io import path_field
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.train import precision
from firth.types import UserError
from firth.validated import PositiveFloat, Ranged, ShareBelowOne

Echo = Callable[[str], None]

MENDED = {
    "bad_utf8": "pieces that are not UTF-8, read as U+FFFD",
    "nul": "NUL characters, removed",
    "too_long": "records over 4 MB, left out",
    "mismatched": "rows with another number of cells than their head, left out",
    "unnamed_columns": "columns of tables without a name, called Unnamed and their place",
    "skipped": "tables passed over, which are read as text only where they are named",
}
"""What is told of the text that a store is built of."""


@dataclass(frozen=True)
class DataConfig(Ranged, section="data"):
    """Where a run's text or records are.

    path: files, directories or globs (text, JSONL, Parquet; .gz, .zst). corpus: a name of `firth fetch` in its place, or
    NAME/FILE for one of its side files.
    weights: the share of the examples that each path gives, in any unit; without them each gives what it holds.
    field: the field of records that holds the text. split: a text file is one document ("file"), or one per "blank"
    line or "line". valid: files held out; where there are none, the share `held_out` of the documents is, drawn by
    the names of the documents, never by lines; of records, drawn by their prompts. Documents of one content and records of one
    prompt are held out together (`firth.data.split`).
    store: a directory in which token stores are kept and shared with other runs; the run's own if empty.
    """

    path: tuple[str, ...] = path_field("files", ())
    corpus: str = ""
    weights: tuple[PositiveFloat, ...] = ()
    text_field: str = "text"
    split_by: str = "file"
    validation_path: tuple[str, ...] = path_field("files", ())
    validation_fraction: ShareBelowOne = 0.05
    cache_dir: str = path_field("place", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, paths in (("path", self.path), ("validation_path", self.validation_path)):
            if not all(paths):
                raise UserError(f"data.{name}={list(paths)} has an empty name, which would be the working directory")
        if self.path:  # a corpus that is not read must not name the language and the license of the model
            object.__setattr__(self, "corpus", "")

    def paths(self, echo: Echo) -> list[str]:
        """The training files. Raises UserError where neither path nor corpus is set."""
        if self.path:
            return list(self.path)
        if not self.corpus:
            raise UserError("the recipe says no text: set data.path=FILES or data.corpus=NAME (see `firth list`)")
        return catalog.paths(self.corpus, echo)


@dataclass(frozen=True, eq=False)
class RunData:
    """What a segment is cut from: the source, the tokenizer, the run's directory, what it begins from, rows of a step.

    memory: how many tokens before each row the model reads (`Shape.memory`). siblings: all paths of a mixture, of which this is
    one: what is held out of another is not trained on here. precision: of the run's steps, in which everything that is
    computed once is computed too.
    """

    config: DataConfig
    tokenizer: Tokenizer
    directory: Path
    init_from: str = ""
    batch_size: int = 1
    seed: int = 0
    echo: Echo = print
    memory_length: int = 0
    siblings: tuple[str, ...] = ()
    precision: Literal["fp32", "bf16"] = "fp32"

    def load_frozen(self, directory: Path) -> LM:
        """The model of a directory, on the device that the run trains on."""
        return load_model(directory).to(device())

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which the run's forward passes run."""
        return precision.casts(self.precision, device())()

    def parts(self) -> list[RunData]:
        """One material for each path, for a mixture. Raises UserError where paths and weights are not equally many."""
        source = self.config
        if len(source.weights) != len(source.path):
            raise UserError(
                f"data.weights has {len(source.weights)} numbers for the {len(source.path)} paths of data.path: "
                "give one weight per path"
            )
        return [
            replace(self, config=replace(source, path=(path,), weights=()), siblings=source.path)
            for path in source.path
        ]

    def stores(self) -> tuple[TokenStore, TokenStore | None]:
        """The training and the held-out token store, built where they are not there yet."""
        paths = self.config.paths(self.echo)
        every = [*paths, *self.siblings]
        folder = Path(self.config.cache_dir or self.directory / "data") / fingerprint(
            self.config, every, self.tokenizer
        )
        parts: list[TokenStore | None] = []
        for apart in (False, True):
            place = folder / ("valid" if apart else "train")
            if not place.exists():
                counts = text_of(self.config, paths, apart, self.directory).counts
                documents = documents_of(self.config, paths, apart, self._held_elsewhere(), self.directory)
                first = next(documents, None)
                if first is None:
                    if not apart:
                        raise UserError(f"{', '.join(paths)}: there is no text to train on")
                    parts.append(None)
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                store = TokenStore.build(itertools.chain([first], documents), self.tokenizer, place, stats=counts.rows)
                kind = "held out" if apart else "to learn from"
                self.echo(
                    f"{kind}: {len(store)} documents, {int(store.bytes.sum()):,} bytes, {len(store.tokens):,} tokens"
                )
                for line in [] if apart else self._repeated(paths):
                    self.echo(line)
                if share := _unknown_share(store, self.tokenizer):
                    self.echo(
                        f"{share:.2%} of these tokens are unknown to the tokenizer: train one on this text; with byte-bpe, or "
                        "bpe or unigram with byte fallback, nothing is unknown"
                    )
                for kind, at in ({} if apart else counts.at).items():
                    self.echo(f"{MENDED[kind]}: {counts.rows()[kind]:,}; the first is {at}")
            parts.append(TokenStore.open(place, self.tokenizer))
        assert parts[0] is not None
        return parts[0], parts[1]

    def _held_elsewhere(self) -> frozenset[int]:
        """The documents that are held out of the other paths of a mixture, by their content."""
        found = [held_out_of(replace(self.config, path=(path,)), [path], self.directory).keys for path in self.siblings]
        return frozenset().union(*found)

    def _repeated(self, paths: Sequence[str]) -> list[str]:
        """A sentence on duplicates among the documents, and one on those that are in the held-out files too."""
        lines = []
        chosen = held_out_of(self.config, paths, self.directory)
        if chosen.duplicates:
            lines.append(
                f"duplicates: {chosen.duplicates:,} of {chosen.documents:,} documents have the same content as an earlier one, "
                f"and are held out with it or not at all; the first is {chosen.first}"
            )
        if self.config.validation_path:
            learned, measured = (text_of(self.config, paths, apart, self.directory) for apart in (False, True))
            held = {content_key(d.text) for d in measured.documents()}
            both = [d.name for d in learned.documents() if content_key(d.text) in held]
            if both:
                lines.append(
                    f"{len(both):,} documents in data.path have the content of a document in data.validation_path, so they are "
                    f"trained on and measured; the first is {both[0]}"
                )
        return lines


def text_of(source: DataConfig, paths: Sequence[str], apart: bool, directory: Path | None = None) -> ReadOnce:
    """Return the documents that a run trains on and holds some out of, or (apart) is measured on, if other files are named
    for that. directory: of the run, which the temporary copy goes to."""
    share = None if source.validation_path or not source.validation_fraction else source.validation_fraction
    chosen = source.validation_path if apart and source.validation_path else paths
    return read_once(chosen, field=source.text_field, split=source.split_by, share=share, directory=directory)


def held_out_of(source: DataConfig, paths: Sequence[str], directory: Path | None = None) -> HeldOut:
    """Choose the documents that a run holds out of these files; nothing where files for it are named, or no share is."""
    return (
        HeldOut()
        if source.validation_path or not source.validation_fraction
        else text_of(source, paths, False, directory).held
    )


def documents_of(
    source: DataConfig,
    paths: Sequence[str],
    apart: bool,
    elsewhere: frozenset[int] = frozenset(),
    directory: Path | None = None,
) -> Iterator[Document]:
    """Yield the documents that are trained on, or (apart) those held out.

    Which are held out is decided by their names, and those of one content are held out together (`firth.data.split`). Of a
    single document that is its last share, cut between paragraphs. elsewhere: the content of others that are held out too.
    """
    found = text_of(source, paths, apart, directory)
    if source.validation_path:
        yield from found.documents()
    elif found.held.documents == 1:
        yield from _share(next(found.documents()), source.validation_fraction, apart)
    else:
        yield from found.documents(apart, elsewhere)


def _share(document: Document, share: float, apart: bool) -> Iterator[Document]:
    """The last share of the only document there is, or what stands before it."""
    cut = int(len(document.text) * (1 - share))
    at = document.text.find("\n\n", cut)
    cut = at if at >= 0 else cut
    text = document.text[cut:] if apart else document.text[:cut]
    if text.strip():
        yield Document(document.name, text)


def fingerprint(source: DataConfig, paths: Sequence[str], tokenizer: Tokenizer) -> str:
    """A short name for these files (paths, sizes, times of change), read in this way, by this tokenizer."""
    stats = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in readers.files([*paths, *source.validation_path])]
    how = {k: v for k, v in asdict(source).items() if k not in ("path", "corpus", "cache_dir", "weights")}
    told = json.dumps([stats, how, tokenizer.digest], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _unknown_share(store: TokenStore, tokenizer: Tokenizer) -> float:
    """The share of a store's tokens that are unknown, a stretch at a time."""
    unk, stretch = tokenizer.vocab.roles.get("unk", -1), 1 << 20
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
    echo: Echo = print,
    texts: Callable[[ReadStats], Iterator[str]] | None = None,
) -> Tokenizer:
    """Train on files and save into `out`, with the merges' counts beside it (`firth tokenizer show`). texts: what to train
    on in place of the files' documents; it counts them."""
    counts = ReadStats()
    plain = (d.text for d in readers.documents(paths, field=text_field, split=split_by, counts=counts))
    tokenizer = train(
        _nonempty(plain if texts is None else texts(counts), paths), algorithm, vocab_size, seed=seed, sample_bytes=sample_bytes, num_sentinels=num_sentinels,
        byte_fallback=byte_fallback, echo=echo,
    )  # fmt: skip
    tokenizer.save(out)
    whole = ("files", "documents", "bytes")
    rows = ", ".join(
        many(n, name.removesuffix("s")) if name in whole else f"{n:,} {name.replace('_', ' ')}"
        for name, n in counts.rows().items()
    )
    echo(f"{algorithm} tokenizer of {tokenizer.vocab.size:,} ids from {rows or 'the texts of the records'}: {out}")
    return tokenizer


def _nonempty(texts: Iterable[str], paths: Sequence[str]) -> Iterator[str]:
    """Yield the texts; UserError with the files behind the last one if all of them are empty."""
    found = False
    for text in texts:
        found = found or bool(text.strip())
        yield text
    if not found:
        raise UserError(f"{', '.join(paths)}: there is no text here: every document is empty")
