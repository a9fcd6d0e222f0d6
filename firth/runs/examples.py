"""Build training and validation examples from text or records: the `examples` section of a recipe.

Each kind of examples is one class that returns two `Source`s, for training and validation. windows, chunks, segment_pairs and
word_windows split running text; dialogues, seq2seq and preferences read records. Further kinds are in
`firth.runs.labeled_examples`, `firth.runs.noisy_label_examples` and `firth.runs.alignment_examples`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from firth.align.precompute import PseudoLabeledConfig, RefLogprobsConfig
from firth.align.rewards import SampledPreferencesConfig
from firth.align.rollouts import RolloutsConfig
from firth.corpora.read_stats import ReadStats
from firth.data import class_counts, windows
from firth.data.annotations import MultiAnnotatorConfig, SimulatedAnnotatorsConfig
from firth.data.config import DataConfig
from firth.data.dialogues import DialoguesConfig, PreferencesConfig, Seq2SeqConfig
from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig
from firth.data.labeled import LabeledConfig, MultipleChoiceConfig, ScoredConfig, TaggedConfig
from firth.data.question_answering import QuestionsConfig
from firth.data.rankings import RankingsConfig
from firth.data.source import MixtureSource, Source, SubsetSource
from firth.data.split import content_key, held_out_keys
from firth.data.token_store import TokenStore
from firth.data.unlabeled import PartiallyLabeledConfig
from firth.fields import NonNegativeFloat, TokenCount
from firth.objectives.objective import Objective
from firth.runs.prepare import documents_of, text_of
from firth.types import UserError


def build_datasets(examples: ExamplesConfig, data: BuildContext, objective: Objective) -> DatasetSplits:
    """Return the training and validation examples of a run; a mixture of the paths where the data has weights.

    Raises:
        UserError: All training examples are of one class.
    """
    found = _mixed(examples, data, objective) if data.config.weights else examples.build(data, objective)
    class_counts.check_several_classes(found.train)
    return found


def _mixed(examples: ExamplesConfig, data: BuildContext, objective: Objective) -> DatasetSplits:
    cuts = [examples.build(part, objective) for part in data.per_path()]
    weights = data.config.weights
    train = MixtureSource([c.train for c in cuts], weights)
    read = {name: sum(c.read_stats.get(name, 0) for c in cuts) for c in cuts for name in c.read_stats}
    if data.config.validation_path:  # the same files for every path
        return DatasetSplits(train, cuts[0].validation, cuts[0].bytes_per_target, read)
    held = [
        (c.validation, c.bytes_per_target, w) for c, w in zip(cuts, weights, strict=True) if c.validation is not None
    ]
    if not held:
        return DatasetSplits(
            train,
            None,
            read_stats=read,
            no_validation_reason=next((c.no_validation_reason for c in cuts if c.no_validation_reason), ""),
        )
    # Held-out text with the same weights, as much of it as the smallest path allows.
    unit = min(len(valid) / w for valid, _, w in held)
    shown = [spread(valid, max(1, int(unit * w))) for valid, _, w in held]
    ratio = sum(bytes_ * w for _, bytes_, w in held) / sum(w for _, _, w in held)
    return DatasetSplits(train, MixtureSource(shown, [w for _, _, w in held]), ratio, read)


def spread(source: Source, count: int) -> Source:
    """Return at most about `count` evenly spaced examples of a source.

    The first `count` could all come from one document. Examples of one record (the windows of a question) stay together.
    """
    if len(source) <= count:
        return source
    whole = np.unique(source.record_ids)
    some = np.linspace(0, len(whole) - 1, max(1, count * len(whole) // len(source))).round().astype(int)
    return SubsetSource(source, np.flatnonzero(np.isin(source.record_ids, whole[some])))


@dataclass(frozen=True)
class WindowsConfig(ExamplesConfig):
    """Windows of `max_length` tokens over the concatenated documents; attention does not cross documents."""

    reads_documents: ClassVar[bool] = True
    gives_memory: ClassVar[bool] = True

    max_length: TokenCount = 256

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        train, valid = data.stores()
        held = windows.Windows(valid, self.max_length, tail=True, memory=data.memory_length) if valid else None
        # A causal objective with one label field predicts every held-out token once, except the first of each document.
        once = valid if objective.attention == "causal" and len(objective.labels) == 1 else None
        ratio = int(once.bytes.sum()) / max(1, len(once.tokens) - len(once)) if once else 0.0
        return DatasetSplits(
            windows.Windows(train, self.max_length, memory=data.memory_length), held, ratio, train.manifest["counts"]
        )


@dataclass(frozen=True)
class ChunksConfig(ExamplesConfig):
    """Chunks of single documents.

    Args:
        max_length: The most tokens of a chunk.
        add_special_tokens: Whether each chunk is enclosed in [CLS] and [SEP].
        min_length: Documents with fewer tokens are dropped.
    """

    reads_documents: ClassVar[bool] = True

    max_length: TokenCount = 128
    add_special_tokens: bool = True
    min_length: TokenCount = 1

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        train, valid = data.stores()
        frame = data.tokenizer.vocab if self.add_special_tokens else None
        held = windows.DocumentChunks(valid, self.max_length, frame, self.min_length) if valid else None
        return DatasetSplits(
            windows.DocumentChunks(train, self.max_length, frame, self.min_length),
            held,
            read_stats=train.manifest["counts"],
        )


@dataclass(frozen=True)
class SegmentPairsConfig(ExamplesConfig):
    """Two neighboring segments and a random one from another document.

    Args:
        max_length: The most tokens of a pair.
        whole_sentences: Whether segments consist of whole sentences; else they are split anywhere.
    """

    reads_documents: ClassVar[bool] = True
    base_fields: ClassVar[frozenset[str]] = frozenset({"first", "second", "other"})

    max_length: TokenCount = 128
    whole_sentences: bool = True

    @property
    def text_units(self) -> frozenset[str]:
        return frozenset({"pairs"} if self.whole_sentences else ())

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        train, valid = data.stores()
        if len(train) < 2:
            raise UserError(
                "pairs of segments need two documents or more, and there is one to train on: set data.split_by=blank (or line) if "
                f"blank lines (or lines) divide the documents of a text, or give more files (data.split_by is {data.config.split_by})"
            )
        whole = data.tokenizer.vocab if self.whole_sentences else None
        held = windows.SegmentPairs(valid, self.max_length, whole) if valid and len(valid) > 1 else None
        return DatasetSplits(
            windows.SegmentPairs(train, self.max_length, whole), held, read_stats=train.manifest["counts"]
        )


@dataclass(frozen=True)
class WordWindowsConfig(ExamplesConfig):
    """Windows with word2vec's subsampling and noise probabilities (`firth.data.windows`).

    Args:
        max_length: Tokens of a window.
        subsampling_threshold: Words that are more frequent than this are dropped at random.
        noise_exponent: Power of the word frequencies in the noise distribution.
    """

    reads_documents: ClassVar[bool] = True
    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "kept", "noise"})

    max_length: TokenCount = 512
    subsampling_threshold: NonNegativeFloat = 1e-3
    noise_exponent: NonNegativeFloat = 0.75

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        train, valid = data.stores()
        counts = windows.WordWindows.count(np.asarray(train.tokens), data.tokenizer.vocab)
        if np.diff(train.offsets).max() - train.opened - 1 < 2:
            raise UserError(
                "every document is a single word, so no word has a neighbor: give longer documents, or set "
                f"data.split_by=file (it is {data.config.split_by})"
            )

        def shown(store: TokenStore) -> windows.WordWindows:
            return windows.WordWindows(
                windows.Windows(store, self.max_length, ahead=0, tail=True),
                counts,
                self.subsampling_threshold,
                self.noise_exponent,
            )

        return DatasetSplits(shown(train), shown(valid) if valid else None, read_stats=train.manifest["counts"])


def training_texts(
    examples: ExamplesConfig, source: DataConfig, paths: Sequence[str], counts: ReadStats
) -> Iterator[str]:
    """Yield the texts that a run's tokenizer is trained on: its training texts without the held-out ones.

    Args:
        examples: Names the fields of records.
        source: Where the data is and what is held out.
        paths: The training files.
        counts: Counts the documents and bytes that are yielded.
    """
    share = 0.0 if source.validation_path else source.validation_fraction
    for part in [[path] for path in paths] if source.weights else [list(paths)]:
        grouped = examples.tokenizer_texts(part)
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
        for (_, texts), out in zip(examples.tokenizer_texts(part) or (), held, strict=True):
            if not out:
                yield from texts


EXAMPLES: dict[str, type[ExamplesConfig]] = {
    "windows": WindowsConfig,
    "chunks": ChunksConfig,
    "segment_pairs": SegmentPairsConfig,
    "word_windows": WordWindowsConfig,
    "dialogues": DialoguesConfig,
    "seq2seq": Seq2SeqConfig,
    "preferences": PreferencesConfig,
    "labeled": LabeledConfig,
    "scored": ScoredConfig,
    "multiple_choice": MultipleChoiceConfig,
    "tagged": TaggedConfig,
    "questions": QuestionsConfig,
    "partially_labeled": PartiallyLabeledConfig,
    "pseudo_labeled": PseudoLabeledConfig,
    "simulated_annotators": SimulatedAnnotatorsConfig,
    "multi_annotator": MultiAnnotatorConfig,
    "sampled_preferences": SampledPreferencesConfig,
    "ref_logprobs": RefLogprobsConfig,
    "rankings": RankingsConfig,
    "rollouts": RolloutsConfig,
}
"""Name in a recipe -> class."""
