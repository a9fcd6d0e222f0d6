"""Labeled records on which every model of a comparison is finetuned and tested.

If the records are the pretraining text (the headlines of `sarcasm`) or name the document they are from (the play, in
`questions`), the test records are those of held-out documents, so no model was pretrained on its test records. Other
records are split by their own names. The training records are drawn for each seed, the same for every recipe, so intervals
over seeds include the variance of the draw.

    probe = draw_probe("questions", LabeledConfig(), data, paths, labels=500, seeds=3, folder=Path("runs/compare/probe"), log=print)
    probe.classes, probe.num_tested          ('question', 'statement'), 1210

Pretraining helps a probe on the same kind of text, so `questions` is the default for models of Shakespeare: whether a
sentence of a play was a question, with its punctuation removed.
"""

from __future__ import annotations

import glob
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firth.corpora import catalog, readers
from firth.data.examples import DataConfig
from firth.data.labeled import LabeledConfig
from firth.data.split import place
from firth.runs.prepare import held_out_of
from firth.types import LogLine, UserError

QUESTIONS, ELSEWHERE = "questions", "sarcasm"
"""Default probes for models of Shakespeare and of other text."""

WORDS = range(5, 26)  # of a sentence: shorter ones are ambiguous, longer ones would be truncated
MARKS = {"?": "question", ".": "statement"}

MAX_TEST_RECORDS = 2000
"""Most test records."""

TEST_SHARE = 0.2
"""Share of test records where they are not from the pretraining text."""

DRAW_STREAM = 0x70726F6265
"""Random stream of the draw, distinct from other streams of the same seed."""


@dataclass(frozen=True)
class ProbeDataset:
    """Finetuning data of a comparison.

    Args:
        name: Name of the probe.
        examples: How the records are read.
        classes: Names of the classes.
        num_tested: Number of test records.
        majority_share: Share of the most frequent class in the test records.
        folder: Folder of test.jsonl and train-SEED.jsonl.
    """

    name: str
    examples: LabeledConfig
    classes: tuple[str, ...]
    num_tested: int
    majority_share: float
    folder: Path

    def data(self, seed: int) -> DataConfig:
        """Return the training and validation files of a seed."""
        return DataConfig(
            path=(str(self.folder / f"train-{seed}.jsonl"),), validation_path=(str(self.folder / "test.jsonl"),)
        )


def draw_probe(
    probe: str,
    examples: LabeledConfig,
    data: DataConfig,
    paths: Sequence[str],
    *,
    labels: int,
    seeds: int,
    folder: Path,
    log: LogLine,
) -> ProbeDataset:
    """Draw and write the training and test records of a probe.

    Args:
        probe: Files, the name of a corpus, "questions", or "" to choose by the text.
        examples: How the records are read.
        data: The pretraining data.
        paths: Files of the pretraining text.
        labels: Number of training records of a seed.
        seeds: Number of seeds.
        folder: Output folder.
        log: Prints progress.

    Raises:
        UserError: A record has no text or class, or there are too few records or only one class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = probe or (QUESTIONS if data.corpus == "shakespeare" and not data.path else ELSEWHERE)
    if probe == QUESTIONS:
        named = [str(questions(catalog.fetch("shakespeare", log) / "speeches.jsonl", folder / "questions.jsonl"))]
    else:
        named = catalog.paths(probe, log) if probe in catalog.CATALOG else [probe]
    records = _records(named, examples)
    documents = {d.name for d in readers.documents(paths, field=data.text_field, split=data.split_by)}
    own = not data.validation_path and not documents.isdisjoint(name for name, _ in records)
    names = {name for name, _ in records}
    held = held_out_of(data, paths).names if own else {name for name in names if place(name) < TEST_SHARE}
    train = [row for name, row in records if name not in held]
    test = [row for name, row in records if name in held][:MAX_TEST_RECORDS]
    if not test or len(train) < labels:
        raise UserError(
            f"{probe}: of {len(records)} records, {len(test)} are for testing and {len(train)} for training, but --labels "
            f"is {labels}: give more records, or fewer --labels"
        )
    classes = tuple(sorted({_class(row[examples.label_field]) for _, row in records}))
    if len(classes) < 2:
        raise UserError(f"{probe}: every record has the class {classes[0]!r}: give records of two classes or more")
    _write(folder / "test.jsonl", test)
    for seed in range(seeds):
        drawn = np.random.default_rng((seed, DRAW_STREAM)).permutation(len(train))[:labels]
        _write(folder / f"train-{seed}.jsonl", [train[i] for i in drawn])
    majority = Counter(_class(row[examples.label_field]) for row in test).most_common(1)[0][1] / len(test)
    return ProbeDataset(probe, examples, classes, len(test), majority, folder)


def sentences(text: str) -> list[dict[str, str]]:
    """Return the questions and statements of a speech without their final punctuation, which would reveal the label.

    >>> sentences("Who's there, my lord, at this hour? I know not, for the night is dark. Nay!")[0]
    {'text': "Who's there, my lord, at this hour", 'label': 'question'}
    """
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        if len(sentence.split()) in WORDS and sentence[-1] in MARKS:
            found.append({"text": sentence[:-1].rstrip(), "label": MARKS[sentence[-1]]})
    return found


def questions(speeches: Path, file: Path) -> Path:
    """Write labeled sentences with the names of their plays, as many statements as questions of each play."""
    by_play: dict[str, dict[str, list[dict[str, str]]]] = {}
    with speeches.open(encoding="utf-8") as lines:
        for speech in map(json.loads, lines):
            for row in sentences(speech["text"]):
                play = by_play.setdefault(f"{speech['play']}.txt", {label: [] for label in MARKS.values()})
                play[row["label"]].append(row)
    rows = []
    for name, labels in by_play.items():
        few = min(map(len, labels.values()))
        for some in labels.values():  # evenly spaced over the play
            rows += [some[i * len(some) // few] | {"name": name} for i in range(few)]
    _write(file, rows)
    return file


def _records(paths: Sequence[str], examples: LabeledConfig) -> list[tuple[str, dict[str, Any]]]:
    """Return every record with its document name (`firth.corpora.readers`)."""
    found = []
    for file, name in readers.files(paths).items():
        for location, record in readers.records([glob.escape(str(file))]):
            readers.text_field(record, examples.text_field, location)
            if not isinstance(record.get(examples.label_field), str | int):
                raise UserError(
                    f"{location}: the field {examples.label_field!r} should hold a class; the record has {', '.join(record)}"
                )
            found.append((str(record.get("name") or name + location.removeprefix(str(file))), record))
    return found


def _class(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
