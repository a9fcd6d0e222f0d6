"""The training and validation examples of a run, and the names of all kinds of examples: the `examples` section of a recipe.

A kind of examples is one frozen dataclass, derived from `firth.data.examples.ExamplesConfig`: `firth.data.windows` divides running text,
`firth.data.dialogues`, `labeled`, `semi_supervised` and `question_answering` read records, and `firth.align` adds the kinds
that a model takes part in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from firth.align.precompute import PseudoLabeledConfig, RefLogprobsConfig, UnpairedPreferencesConfig
from firth.align.rewards import SampledPreferencesConfig
from firth.align.rollouts import RolloutsConfig
from firth.corpora.input_files import ReadStats
from firth.data.dialogues import DialoguesConfig, PreferencesConfig, RankingsConfig, Seq2SeqConfig
from firth.data.examples import BuildContext, DataConfig, DatasetSplits, ExamplesConfig, check_several_classes
from firth.data.labeled import LabeledConfig, MultipleChoiceConfig, ScoredConfig, TaggedConfig
from firth.data.question_answering import QuestionsConfig
from firth.data.semi_supervised import MultiAnnotatorConfig, PartiallyLabeledConfig, SimulatedAnnotatorsConfig
from firth.data.source import MixtureSource, Source, SubsetSource
from firth.data.split import content_key, held_out_keys
from firth.data.windows import ChunksConfig, SegmentPairsConfig, WindowsConfig, WordWindowsConfig
from firth.objectives.objective import Objective
from firth.runs.prepare import documents_of, text_of


def build_datasets(examples: ExamplesConfig, data: BuildContext, objective: Objective) -> DatasetSplits:
    """Return the training and validation examples of a run; a mixture of the paths where the data has weights.

    Raises:
        UserError: All training examples are of one class.
    """
    found = _mixed(examples, data, objective) if data.config.weights else examples.build(data, objective)
    check_several_classes(found.train)
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
    "unpaired_preferences": UnpairedPreferencesConfig,
    "rankings": RankingsConfig,
    "rollouts": RolloutsConfig,
}
"""Name in a recipe -> class."""
