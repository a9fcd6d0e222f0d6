"""How a run's text or records are cut into examples: the `segment` of a recipe.

A segment turns the material into two `Source`s, one to learn from and one held out. Each kind is one small class, so a
recipe names the kind and its settings and nothing else: windows, pieces and pairs cut running text; dialogues, prompted,
and preferences read records, as do those of `firth.runs.labeled_examples` and `labels`; those of `aligned` ask a model or a judge, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from firth.corpora.read_stats import ReadStats
from firth.data import records, windows, word_windows
from firth.data.source import MixtureSource, Source, SubsetSource
from firth.data.split import MIN_RECORDS, content_key, held_out_keys
from firth.data.token_store import TokenStore
from firth.objectives.objective import Objective
from firth.runs import class_counts
from firth.runs.held_out_texts import HeldOutTexts
from firth.runs.prepare import DataConfig, RunData, documents_of, text_of
from firth.types import UserError
from firth.validated import NonNegativeFloat, Ranged, TokenCount


@dataclass(frozen=True)
class DatasetSplits:
    """train: to learn from. valid: held out, None where there is nothing. bytes_per_target: UTF-8 bytes of held-out text
    per token asked, where every token is asked; 0 elsewhere. read: what the reader counted when a store was built. unheld:
    why nothing is held out though a share should be, in a sentence. texts: what the report shows of held-out prompts, where it
    is not read off the sources (`firth.runs.held_out_texts.choose`)."""

    train: Source
    valid: Source | None
    bytes_per_target: float = 0.0
    read: Mapping[str, int] = field(default_factory=dict)
    unheld: str = ""
    texts: HeldOutTexts | None = None

    @property
    def counts(self) -> dict[str, int]:
        """What was read, mended, cut and left out, for the report."""
        return {**{name: n for name, n in self.read.items() if n}, **self.train.counts}

    @property
    def remarks(self) -> list[str]:
        """What was cut, left out or missing, with the place of the first of each, in whole sentences."""
        held = self.valid.remarks if self.valid is not None else ()
        return list(dict.fromkeys((*self.train.remarks, *held, *class_counts.missing_classes(self.train, self.valid))))


class ExamplesConfig(Ranged, section="segment"):
    """One way to cut the material. Subclasses are frozen dataclasses.

    remembers: whether it gives the tokens before each row, which a model with memory reads. reads_documents: whether it cuts
    documents, which are held out by their names, and no records. gives: the fields that every
    example to learn from holds. wants: those of them that an objective has to read for the segment to be of use.
    leaves_out: whether records that are longer than its limits (`row_limits`) are left out and counted, not cut.
    """

    remembers: ClassVar[bool] = False
    reads_documents: ClassVar[bool] = False
    gives: ClassVar[frozenset[str]] = frozenset({"tokens"})
    wants: ClassVar[frozenset[str]] = frozenset()
    leaves_out: ClassVar[bool] = False

    @property
    def given(self) -> frozenset[str]:
        """What it gives as it is set."""
        return self.gives

    @property
    def text_units(self) -> frozenset[str]:
        """What it looks for in a text ("pairs": sentences to pair); a run reports where it does not find them."""
        return frozenset()

    @property
    def longest(self) -> int:
        """The most tokens of an example, of records whose lengths vary and are known before the run; 0 elsewhere."""
        return 0

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        """The training source and the held-out one."""
        raise NotImplementedError(type(self).__name__)

    def grouped_texts(self, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]] | None:
        """Yield the texts of each record, with the group that it is held out with (`Records.group`), to train a tokenizer.

        None where the segment reads documents and no records.
        """
        return None

    @property
    def text_fields(self) -> tuple[Any, ...]:
        """The settings that `grouped_texts` depends on."""
        return ()

    def within(self, context: int) -> ExamplesConfig:
        """The segment for a model that reads at most so many tokens: records that are longer are then cut, and counted."""
        return self

    @property
    def functions(self) -> dict[str, str]:
        """The functions of the user's that it calls: field -> `module:function`."""
        return {}

    def row_limits(self, text: int, source: int) -> dict[str, int]:
        """Return the most tokens that each field which bounds a row may allow.

        Args:
            text: The most tokens of a row of the model, of an encoder-decoder's decoder.
            source: The most tokens of a row of its encoder; as `text` where it has none.
        """
        return {field.name: min(text, source) for field in fields(self) if field.name == "length"}  # type: ignore[arg-type]

    def settle(self, objective: Objective, material: RunData) -> Objective:
        """Fill in what only the data knows (the names of the classes); the settled recipe is what a run keeps."""
        return objective

    def refuse(self, objective: Objective) -> None:
        """Raise a UserError for an objective that the segment's settings do not suit, though its fields would."""

    def untold(self, paths: Sequence[str], material: RunData) -> Source:
        """Records with the same fields and no label, for what learns from these too."""
        raise UserError(
            f"texts without a label are read beside records with a class, and {type(self).__name__} has none"
        )


def build_datasets(segment: ExamplesConfig, material: RunData, objective: Objective) -> DatasetSplits:
    """What a run learns from and is measured on: a mixture of the paths where the source has weights. UserError where all
    that is learnt is of one class."""
    found = _mixed(segment, material, objective) if material.source.weights else segment.cut(material, objective)
    class_counts.check_several_classes(found.train)
    return found


def _mixed(segment: ExamplesConfig, material: RunData, objective: Objective) -> DatasetSplits:
    cuts = [segment.cut(part, objective) for part in material.parts()]
    weights = material.source.weights
    train = MixtureSource([c.train for c in cuts], weights)
    read = {name: sum(c.read.get(name, 0) for c in cuts) for c in cuts for name in c.read}
    if material.source.valid:  # every part has these files
        return DatasetSplits(train, cuts[0].valid, cuts[0].bytes_per_target, read)
    held = [(c.valid, c.bytes_per_target, w) for c, w in zip(cuts, weights, strict=True) if c.valid is not None]
    if not held:
        return DatasetSplits(train, None, read=read, unheld=next((c.unheld for c in cuts if c.unheld), ""))
    # Held-out text in the same shares, as much of it as the scarcest part allows.
    unit = min(len(valid) / w for valid, _, w in held)
    shown = [spread(valid, max(1, int(unit * w))) for valid, _, w in held]
    ratio = sum(bytes_ * w for _, bytes_, w in held) / sum(w for _, _, w in held)
    return DatasetSplits(train, MixtureSource(shown, [w for _, _, w in held]), ratio, read)


def spread(source: Source, count: int) -> Source:
    """About `count` examples of a source at most, evenly spaced: the first ones alone would be those of one document. Those
    of one record (the windows of a question) stay together."""
    if len(source) <= count:
        return source
    whole = np.unique(source.owners)
    some = np.linspace(0, len(whole) - 1, max(1, count * len(whole) // len(source))).round().astype(int)
    return SubsetSource(source, np.flatnonzero(np.isin(source.owners, whole[some])))


@dataclass(frozen=True)
class WindowsConfig(ExamplesConfig):
    """Windows of `length` tokens of the running text; the documents in one do not see each other."""

    reads_documents: ClassVar[bool] = True
    remembers: ClassVar[bool] = True

    length: TokenCount = 256

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        train, valid = material.stores()
        held = windows.Windows(valid, self.length, tail=True, memory=material.memory) if valid else None
        # Who reads to the left is asked every token of the held-out store but the first, which nothing stands before;
        # once, if it has one question.
        once = valid if objective.reads() == "left" and len(objective.targets) == 1 else None
        ratio = int(once.bytes.sum()) / max(1, len(once.tokens) - len(once)) if once else 0.0
        return DatasetSplits(
            windows.Windows(train, self.length, memory=material.memory), held, ratio, train.manifest["counts"]
        )


@dataclass(frozen=True)
class ChunksConfig(ExamplesConfig):
    """Parts of single documents of at most `length` tokens; frame: [CLS] and [SEP] around each; shortest: documents of
    fewer tokens are left out."""

    reads_documents: ClassVar[bool] = True

    length: TokenCount = 128
    frame: bool = True
    shortest: TokenCount = 1

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        train, valid = material.stores()
        frame = material.tokenizer.vocab if self.frame else None
        held = windows.DocumentChunks(valid, self.length, frame, self.shortest) if valid else None
        return DatasetSplits(
            windows.DocumentChunks(train, self.length, frame, self.shortest), held, read=train.manifest["counts"]
        )


@dataclass(frozen=True)
class SegmentPairsConfig(ExamplesConfig):
    """Two neighbouring segments and a stranger, together at most `length` tokens: whole sentences, or cut anywhere."""

    reads_documents: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"first", "second", "other"})

    length: TokenCount = 128
    sentences: bool = True

    @property
    def text_units(self) -> frozenset[str]:
        return frozenset({"pairs"} if self.sentences else ())

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        train, valid = material.stores()
        if len(train) < 2:
            raise UserError(
                "pairs of segments need two documents or more, and there is one to train on: set source.split=blank (or line) if "
                f"blank lines (or lines) divide the documents of a text, or give more files (source.split is {material.source.split})"
            )
        whole = material.tokenizer.vocab if self.sentences else None
        held = windows.SegmentPairs(valid, self.length, whole) if valid and len(valid) > 1 else None
        return DatasetSplits(windows.SegmentPairs(train, self.length, whole), held, read=train.manifest["counts"])


@dataclass(frozen=True)
class WordWindowsConfig(ExamplesConfig):
    """Windows of running text with how often each word stays and is drawn as noise (`firth.data.word_windows`): word2vec."""

    reads_documents: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"tokens", "kept", "noise"})

    length: TokenCount = 512
    sample: NonNegativeFloat = 1e-3
    power: NonNegativeFloat = 0.75

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        train, valid = material.stores()
        counts = word_windows.WordWindows.count(np.asarray(train.tokens), material.tokenizer.vocab)
        if np.diff(train.offsets).max() - train.opened - 1 < 2:
            raise UserError(
                "every document is a single word, so no word has a neighbor: give longer documents, or set "
                f"source.split=file (it is {material.source.split})"
            )

        def shown(store: TokenStore) -> word_windows.WordWindows:
            return word_windows.WordWindows(
                windows.Windows(store, self.length, ahead=0, tail=True), counts, self.sample, self.power
            )

        return DatasetSplits(shown(train), shown(valid) if valid else None, read=train.manifest["counts"])


@dataclass(frozen=True)
class DialoguesConfig(ExamplesConfig):
    """Dialogues, asked on what the assistant says; the beginning is kept where one is longer than `length` tokens.

    prompt, answer_is: how a question and its answer are made of a record's fields; empty: as the record has them.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"tokens", "mask"})

    length: TokenCount = 256
    prompt: str = ""
    answer_is: str = ""

    @property
    def text_fields(self) -> tuple[Any, ...]:
        return (self.prompt, self.answer_is)

    def grouped_texts(self, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        return records.dialogue_texts(paths, (self.prompt, self.answer_is))

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        forms = (self.prompt, self.answer_is)
        return split_records(
            material, lambda paths: records.DialogueRecords(paths, material.tokenizer, self.length, forms=forms)
        )


@dataclass(frozen=True)
class Seq2SeqConfig(ExamplesConfig):
    """Prompts for an encoder and answers from a decoder, at most `length` and `answer` tokens.

    prompt, answer_is: how both are made of a record's fields, "translate to French: {en}"; empty: as the record has them.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"source", "target"})

    length: TokenCount = 256
    answer: TokenCount = 128
    prompt: str = ""
    answer_is: str = ""

    @property
    def longest(self) -> int:
        return max(self.length, self.answer)

    def row_limits(self, text: int, source: int) -> dict[str, int]:
        return {"length": source, "answer": text}

    @property
    def text_fields(self) -> tuple[Any, ...]:
        return (self.prompt, self.answer_is)

    def grouped_texts(self, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        return records.dialogue_texts(paths, (self.prompt, self.answer_is))

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        def read(paths: Sequence[str]) -> Source:
            return records.Seq2SeqRecords(
                paths, material.tokenizer, self.length, answer=self.answer, forms=(self.prompt, self.answer_is)
            )

        return split_records(material, read)


COMPARED = frozenset({"chosen_tokens", "chosen_mask", "rejected_tokens", "rejected_mask"})
"""The fields of two answers to one prompt."""


@dataclass(frozen=True)
class PreferencesConfig(ExamplesConfig):
    """Records with a prompt, a chosen and a rejected answer."""

    gives: ClassVar[frozenset[str]] = COMPARED

    length: TokenCount = 256

    def within(self, context: int) -> ExamplesConfig:
        return replace(self, length=min(self.length, context))

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        return split_records(material, lambda paths: records.PreferenceRecords(paths, material.tokenizer, self.length))


def model_directory(path: str | Path) -> Path:
    """The model in a run directory, or the directory itself where it is one."""
    path = Path(path)
    return path / "model" if (path / "model").is_dir() else path


def required_model(path: str, field: str, what: str) -> Path:
    if not path:
        raise UserError(f"the recipe lacks `{field}`: {what}")
    return model_directory(path)


def split_records(material: RunData, make: Callable[[Sequence[str]], Source]) -> DatasetSplits:
    """The records to learn from, and the held-out files; without those, the share `source.held_out` of the records."""
    source = make(material.source.paths(material.echo))
    if material.source.valid:
        valid = make(material.source.valid)
        shared = np.flatnonzero(np.isin(valid.families, source.families))
        if len(shared):
            material.echo(
                f"{len(shared):,} of {len(valid):,} examples in source.valid have a prompt or text that is trained on too: "
                f"the first is number {shared[0] + 1:,}"
            )
        return DatasetSplits(source, valid)
    apart = held_out(source, material)
    if apart.any():
        return DatasetSplits(SubsetSource(source, np.flatnonzero(~apart)), SubsetSource(source, np.flatnonzero(apart)))
    share = material.source.held_out
    many = len(np.unique(source.owners)) >= MIN_RECORDS
    why = f"of which source.held_out={share:g} comes to none or all" if many else f"fewer than {MIN_RECORDS}"
    if many and (count := len(np.unique(source.families))) < len(source):
        why += f" (they have {count:,} different prompts or texts, and all examples of one stay together)"
    unheld = f"nothing is held out of {len(source):,} examples, {why}, so what is learnt is measured on nothing else"
    return DatasetSplits(source, None, unheld=unheld if share else "")


def held_out(source: Source, material: RunData) -> np.ndarray:
    """Which examples of a source are held out (n,): none where others are named, or where there are too few of them."""
    share = 0.0 if material.source.valid else material.source.held_out
    return held_out_keys(source.families, share, len(np.unique(source.owners)))


def training_texts(
    segment: ExamplesConfig, source: DataConfig, paths: Sequence[str], counts: ReadStats
) -> Iterator[str]:
    """Yield the texts that a run's tokenizer is trained on: those that the run trains on, and nothing that it holds out.

    Args:
        segment: the segment that names the fields of records.
        source: what is held out.
        paths: the training files.
        counts: counts the documents and bytes that are yielded.
    """
    share = 0.0 if source.valid else source.held_out
    for part in [[path] for path in paths] if source.weights else [list(paths)]:
        grouped = segment.grouped_texts(part)
        if grouped is None:
            alone = replace(source, path=tuple(part), weights=())
            for document in documents_of(alone, part, False):
                counts.documents += 1
                counts.bytes += len(document.text.encode())
                yield document.text
            counts.files += text_of(alone, part, False).counts.files
            continue
        keys = np.fromiter((content_key(group) for group, _ in grouped), np.uint64)
        held = held_out_keys(keys, share, len(keys))
        for (_, texts), out in zip(segment.grouped_texts(part) or (), held, strict=True):
            if not out:
                yield from texts


EXAMPLES: dict[str, type[ExamplesConfig]] = {
    "windows": WindowsConfig,
    "pieces": ChunksConfig,
    "pairs": SegmentPairsConfig,
    "words": WordWindowsConfig,
    "dialogues": DialoguesConfig,
    "prompted": Seq2SeqConfig,
    "preferences": PreferencesConfig,
}
"""Name in a recipe -> class."""
