"""Kinds of examples, what they are built from, and their training and validation parts: the `examples` section of a recipe.

The `data` section of a recipe (`DataConfig`) is here too, and the line on the classes of a run's examples:

classes: bad 51 (and 7 held out), good 49 (and 5 held out), odd 0 (and 1 held out)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

import numpy as np

from firth.corpora import catalog
from firth.data.source import Source, SubsetSource
from firth.data.split import MIN_RECORDS, held_out_keys
from firth.data.token_store import TokenStore
from firth.fields import PositiveFloat, ShareBelowOne, Validated, path_field
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import LOGGER, DataStats, LogLine, RankGroup, UserError

if TYPE_CHECKING:
    from firth.model.model import LM
    from firth.objectives.objective import Objective


@dataclass(frozen=True)
class DataConfig(Validated, section="data"):
    """Configuration of the data: files or a corpus, and what is held out.

    Args:
        path: Files, directories or globs (text, JSONL, Parquet; .gz, .zst), or corpora of `firth prepare`, also at addresses (s3://).
        corpus: A corpus of `firth fetch` in place of `path`, or NAME/FILE for one of its side files.
        weights: Sampling weight of each path, in any unit; without weights each path contributes all it holds.
        text_field: The field of a record that holds the text.
        split_by: A text file is one document ("file"), or one document per "blank" line or "line".
        validation_path: Files to validate on. Without them `validation_fraction` of the documents is held out.
        validation_fraction: Fraction of documents (by name, never single lines) or records (by prompt) to hold out. Documents
            with the same content and records with the same prompt are held out together (`firth.data.split`). Of a prepared corpus
            it was chosen when the corpus was prepared.
        cache_dir: Directory of token stores that several runs share; empty uses the run directory.
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
        if self.path:  # the model card must not state the language and license of a corpus that is not read
            object.__setattr__(self, "corpus", "")

    def paths(self, log: LogLine) -> list[str]:
        """Return the training files.

        Raises:
            UserError: Neither `path` nor `corpus` is set.
        """
        if self.path:
            return list(self.path)
        if not self.corpus:
            raise UserError("the recipe has no data: set data.path=FILES or data.corpus=NAME (see `firth list`)")
        return catalog.paths(self.corpus, log)


MAX_LISTED_CLASSES = 12
"""Most classes that the line lists one by one."""


def count_classes(source: Source) -> Mapping[str, int]:
    """Return the number of examples of each class in a source; {} without classes."""
    return source.class_counts(np.arange(len(source)))


def class_summary(train: Source, valid: Source | None) -> str:
    """Return a line on the classes; empty if there are none."""
    found = count_classes(train)
    held = count_classes(valid) if valid is not None else {}
    if len(found) > MAX_LISTED_CLASSES:
        least, most = min(found, key=lambda name: found[name]), max(found, key=lambda name: found[name])
        return f"{len(found)} classes, from {found[least]:,} of {least} to {found[most]:,} of {most}"
    each = [
        f"{name} {n:,}" + (f" (and {held[name]:,} held out)" if held.get(name) else "") for name, n in found.items()
    ]
    return f"classes: {', '.join(each)}" if each else ""


def missing_classes(train: Source, valid: Source | None) -> list[str]:
    """Return a sentence for each class that has held-out examples and no training examples."""
    held = count_classes(valid) if valid is not None else {}
    return [
        f"the class {name!r} has no training examples and {held[name]:,} held-out ones, so it is not learned"
        for name, n in count_classes(train).items()
        if not n and held.get(name)
    ]


def check_several_classes(train: Source) -> None:
    """Raise a UserError if all training examples are of one class."""
    found = count_classes(train)
    some = [name for name, n in found.items() if n]
    if found and len(some) < 2:
        raise UserError(
            f"all training examples are of one class, {some[0] if some else 'none'!r}: add records of another class, or name the "
            "field of the label (examples.label_field)"
        )


S = TypeVar("S", bound=Source)
C = TypeVar("C", bound="BuildContext")


@dataclass(frozen=True)
class DatasetSplits:
    """The training and validation examples of a run.

    Args:
        train: Training examples.
        validation: Held-out examples; None if there are none.
        bytes_per_target: UTF-8 bytes of held-out text per label, where every token is a label; else 0.
        read_stats: Counts of the reader when the token store was built.
        no_validation_reason: Why nothing is held out although a fraction should be; a sentence.
    """

    train: Source
    validation: Source | None
    bytes_per_target: float = 0.0
    read_stats: Mapping[str, int] = field(default_factory=dict)
    no_validation_reason: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """Counts of what was read, repaired, truncated and dropped, for the report."""
        return {**{name: n for name, n in self.read_stats.items() if n}, **self.train.counts}

    @property
    def notes(self) -> list[str]:
        """Sentences on what was truncated, dropped or missing, with the place of the first of each."""
        held = self.validation.notes if self.validation is not None else ()
        return list(dict.fromkeys((*self.train.notes, *held, *missing_classes(self.train, self.validation))))


@dataclass(frozen=True, eq=False)
class BuildContext:
    """What examples are built from: the data, the tokenizer and the models of a run (`firth.runs.prepare.RunData`).

    Args:
        config: Where the data is and what is held out.
        tokenizer: The tokenizer of the run.
        directory: The run directory.
        batch_size: Examples per optimizer step.
        seed: Seed of the run.
        log: Receives progress messages.
        memory_length: Tokens before each row that the model attends to (`ModelConfig.attention.memory_length`).
        siblings: All paths of a mixture that this path belongs to. Documents that are held out of one are not trained on in another.
        sources: The records that have been read (`read_once`).
        ranks: The ranks that share the work of an on-policy source; None for one.
    """

    config: DataConfig
    tokenizer: Tokenizer
    directory: Path
    batch_size: int = 1
    seed: int = 0
    log: LogLine = LOGGER.info
    memory_length: int = 0
    siblings: tuple[str, ...] = ()
    sources: dict[tuple[Hashable, ...], Source] = field(default_factory=dict)
    ranks: RankGroup | None = None

    def read_once(self, settings: Hashable, paths: Sequence[str], read: Callable[[], S]) -> S:
        """Return the records of some files, which are read once a run.

        The statistics of the objective (class names, the mean of the scores) and the training examples are from the same records.

        Args:
            settings: What the records depend on besides the files.
            paths: The files.
            read: Reads them.
        """
        key = (settings, *paths)
        if key not in self.sources:
            self.sources[key] = read()
        return cast(S, self.sources[key])

    def per_path(self: C) -> list[C]:
        """Return the data of each path of a mixture.

        Raises:
            UserError: The numbers of paths and weights differ.
        """
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
        """Return the training and the held-out token store (None if nothing is held out)."""
        raise NotImplementedError(type(self).__name__)

    def frozen_start(self, what: str) -> LM:
        """Return the model that the run starts from (`init_from`), as a reference that is not trained.

        Args:
            what: What the run needs it for.

        Raises:
            UserError: The recipe has no `init_from`.
        """
        raise NotImplementedError(type(self).__name__)

    def frozen_model(self, path: str, field: str, what: str, hint: str) -> LM:
        """Return the model of a run, which is not trained.

        Args:
            path: A run or model directory.
            field: The field of the recipe that names it.
            what: What the run needs it for.
            hint: How to train one with the tokenizer of this run.

        Raises:
            UserError: The path is empty, or its tokenizer is another one.
        """
        raise NotImplementedError(type(self).__name__)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of the run's forward passes."""
        raise NotImplementedError(type(self).__name__)


class ExamplesConfig(Validated, section="examples"):
    """Base class of the kinds of examples. Subclasses are frozen dataclasses.

    Attributes:
        gives_memory: Whether examples include the tokens before each row, for a model with memory.
        reads_documents: Whether it reads documents, which are held out by name, and not records.
        base_fields: The fields of every training example.
        required_fields: The fields that an objective must read for this kind to make sense.
        drops_long_records: Whether records over the limits (`row_limits`) are dropped and counted instead of truncated.
    """

    gives_memory: ClassVar[bool] = False
    reads_documents: ClassVar[bool] = False
    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens"})
    required_fields: ClassVar[frozenset[str]] = frozenset()
    drops_long_records: ClassVar[bool] = False

    @property
    def fields(self) -> frozenset[str]:
        """The fields of a training example with these settings."""
        return self.base_fields

    @property
    def text_units(self) -> frozenset[str]:
        """Units that it looks for in a text ("pairs": sentences to pair); a run reports where they are missing."""
        return frozenset()

    @property
    def max_tokens(self) -> int:
        """The most tokens of an example, for records whose lengths vary and are known before the run; else 0."""
        return 0

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        """Return the training and validation sources."""
        raise NotImplementedError(type(self).__name__)

    def tokenizer_texts(self, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]] | None:
        """Yield the group (`Records.group`) and the texts of each record, to train a tokenizer; None for documents."""
        return None

    @property
    def tokenizer_settings(self) -> tuple[Any, ...]:
        """The settings that `tokenizer_texts` depends on."""
        return ()

    def limit_to(self, context: int) -> ExamplesConfig:
        """Return a copy for a model with `context` positions; longer records are truncated and counted."""
        return self

    @property
    def functions(self) -> dict[str, str]:
        """The user's functions that it calls: field -> `module:function`."""
        return {}

    def row_limits(self, text: int, source: int) -> dict[str, int]:
        """Return the largest value of each field that limits the length of a row.

        Args:
            text: The most tokens in a row of the model, or of the decoder of an encoder-decoder.
            source: The most tokens in a row of the encoder; equal to `text` without an encoder.
        """
        return {field.name: min(text, source) for field in fields(self) if field.name == "max_length"}  # type: ignore[arg-type]

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Read the statistics of the training data that configure an objective; the resolved recipe holds them.

        Args:
            data: The data of the run.
            class_names: The names of the classes, if the recipe has them.
        """
        return DataStats()

    def check_objective(self, objective: Objective) -> None:
        """Raise a UserError for an objective that the settings do not suit although the fields do."""

    def unlabeled(self, paths: Sequence[str], data: BuildContext) -> Source:
        """Return unlabeled records with the same fields, for semi-supervised training."""
        raise UserError(f"unlabeled texts need labeled records with a class, and {type(self).__name__} has no class")


@dataclass(frozen=True)
class WrappingConfig(ExamplesConfig):
    """Base class of examples that wrap another kind (`base`) and change or add fields."""

    base_fields: ClassVar[frozenset[str]] = frozenset()

    base: ExamplesConfig

    @property
    def fields(self) -> frozenset[str]:
        return self.base.fields | self.base_fields

    @property
    def max_tokens(self) -> int:
        return self.base.max_tokens

    def tokenizer_texts(self, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]] | None:
        return self.base.tokenizer_texts(paths)

    @property
    def tokenizer_settings(self) -> tuple[Any, ...]:
        return self.base.tokenizer_settings

    def limit_to(self, context: int) -> ExamplesConfig:
        return replace(self, base=self.base.limit_to(context))

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        return self.base.stats(data, class_names)


def split_records(data: BuildContext, make: Callable[[Sequence[str]], Source]) -> DatasetSplits:
    """Return the training records and those of `data.validation_path`, or else a `data.validation_fraction` of the records."""
    source = make(data.config.paths(data.log))
    if data.config.validation_path:
        valid = make(data.config.validation_path)
        shared = np.flatnonzero(np.isin(valid.group_ids, source.group_ids))
        if len(shared):
            data.log(
                f"{len(shared):,} of {len(valid):,} examples in data.validation_path have a prompt or text that is trained on too: "
                f"the first is number {shared[0] + 1:,}"
            )
        return DatasetSplits(source, valid)
    held = held_out(source, data)
    if held.any():
        return DatasetSplits(SubsetSource(source, np.flatnonzero(~held)), SubsetSource(source, np.flatnonzero(held)))
    share = data.config.validation_fraction
    many = len(np.unique(source.record_ids)) >= MIN_RECORDS
    why = f"of which data.validation_fraction={share:g} comes to none or all" if many else f"fewer than {MIN_RECORDS}"
    if many and (count := len(np.unique(source.group_ids))) < len(source):
        why += f" (they have {count:,} different prompts or texts, and all examples of one stay together)"
    reason = f"nothing is held out of {len(source):,} examples, {why}, so there are no validation metrics"
    return DatasetSplits(source, None, no_validation_reason=reason if share else "")


def held_out(source: Source, data: BuildContext) -> np.ndarray:
    """Return which examples of a source are held out: (n,) bool. None are with validation files or too few records."""
    share = 0.0 if data.config.validation_path else data.config.validation_fraction
    return held_out_keys(source.group_ids, share, len(np.unique(source.record_ids)))
