"""The labelled records that every contender of a comparison is finetuned and tested on.

A record is tested on if the document of its name was held out: of records that are themselves the text (the headlines of
`sarcasm`, unlabelled), or that name the document they are from (`questions`, the play), no model has read what it is
tested on. Records from elsewhere are divided by their own names. The labels that are learnt from are drawn anew for each
seed, the same for every contender, so that intervals over seeds hold their luck too.

    drawn = draw("questions", Labelled(), source, paths, labels=500, seeds=3, folder=Path("runs/compare/probe"))
    drawn.classes, drawn.tested          ('question', 'statement'), 1210

Pretraining shows in a probe of the same kind of text, so `questions` is asked of models that read Shakespeare: whether a
sentence of a play was a question, its mark taken away.
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
from firth.data.split import place
from firth.runs.labeled_examples import LabeledConfig
from firth.runs.prepare import DataConfig, held_out_of
from firth.types import LogLine, UserError

QUESTIONS, ELSEWHERE = "questions", "sarcasm"
"""The probe of models that read Shakespeare, and of others, where none is named."""

WORDS = range(5, 26)  # of a sentence: shorter ones say too little, longer ones are cut by the model's length
MARKS = {"?": "question", ".": "statement"}

MOST = 2000
"""Records that are tested on, at most."""

APART = 0.2
"""Share of the records that is tested on, where they are not from the text."""

DRAW = 0x70726F6265
"""Sets the draw of the labels apart from others of the same seed."""


@dataclass(frozen=True)
class ProbeDataset:
    """name: of the probe. cut: how its records are read. classes: their names. tested: how many records are tested on, of
    which the commonest class has the share `commonest`. folder: where test.jsonl and train-SEED.jsonl lie."""

    name: str
    cut: LabeledConfig
    classes: tuple[str, ...]
    tested: int
    commonest: float
    folder: Path

    def source(self, seed: int) -> DataConfig:
        """What a seed learns from and is tested on."""
        return DataConfig(
            path=(str(self.folder / f"train-{seed}.jsonl"),), validation_path=(str(self.folder / "test.jsonl"),)
        )


def draw_probe(
    probe: str,
    cut: LabeledConfig,
    source: DataConfig,
    paths: Sequence[str],
    *,
    labels: int,
    seeds: int,
    folder: Path,
    echo: LogLine,
) -> ProbeDataset:
    """Write the files. probe: files, the name of a corpus, "questions", or "" to choose by the text.
    paths: the files of the text that is learnt from.

    Raises UserError for a record without a text or a class, too few records, or a single class.
    """
    folder.mkdir(parents=True, exist_ok=True)
    probe = probe or (QUESTIONS if source.corpus == "shakespeare" and not source.path else ELSEWHERE)
    if probe == QUESTIONS:
        named = [str(questions(catalog.fetch("shakespeare", echo) / "speeches.jsonl", folder / "questions.jsonl"))]
    else:
        named = catalog.paths(probe, echo) if probe in catalog.CATALOG else [probe]
    records = _records(named, cut)
    documents = {d.name for d in readers.documents(paths, field=source.text_field, split=source.split_by)}
    own = not source.validation_path and not documents.isdisjoint(name for name, _ in records)
    names = {name for name, _ in records}
    held = held_out_of(source, paths).names if own else {name for name in names if place(name) < APART}
    known = [row for name, row in records if name not in held]
    apart = [row for name, row in records if name in held][:MOST]
    if not apart or len(known) < labels:
        raise UserError(
            f"{probe}: of {len(records)} records, {len(apart)} are to be tested on and {len(known)} to be learnt from, and "
            f"{labels} labels are asked: give more records, or fewer --labels"
        )
    classes = tuple(sorted({_class(row[cut.label_field]) for _, row in records}))
    if len(classes) < 2:
        raise UserError(f"{probe}: every record has the class {classes[0]!r}: there is nothing to tell apart")
    _write(folder / "test.jsonl", apart)
    for seed in range(seeds):
        some = np.random.default_rng((seed, DRAW)).permutation(len(known))[:labels]
        _write(folder / f"train-{seed}.jsonl", [known[i] for i in some])
    commonest = Counter(_class(row[cut.label_field]) for row in apart).most_common(1)[0][1] / len(apart)
    return ProbeDataset(probe, cut, classes, len(apart), commonest, folder)


def sentences(text: str) -> list[dict[str, str]]:
    """The questions and statements of a speech, without the mark that ends them: what is asked must be read off the words.

    >>> sentences("Who's there, my lord, at this hour? I know not, for the night is dark. Nay!")[0]
    {'text': "Who's there, my lord, at this hour", 'label': 'question'}
    """
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
        if len(sentence.split()) in WORDS and sentence[-1] in MARKS:
            found.append({"text": sentence[:-1].rstrip(), "label": MARKS[sentence[-1]]})
    return found


def questions(speeches: Path, file: Path) -> Path:
    """Write the sentences of the plays with the names of their plays, of each play as many statements as questions."""
    by_play: dict[str, dict[str, list[dict[str, str]]]] = {}
    with speeches.open(encoding="utf-8") as lines:
        for speech in map(json.loads, lines):
            for row in sentences(speech["text"]):
                play = by_play.setdefault(f"{speech['play']}.txt", {label: [] for label in MARKS.values()})
                play[row["label"]].append(row)
    rows = []
    for name, labels in by_play.items():
        few = min(map(len, labels.values()))
        for some in labels.values():  # spread over the whole play
            rows += [some[i * len(some) // few] | {"name": name} for i in range(few)]
    _write(file, rows)
    return file


def _records(paths: Sequence[str], cut: LabeledConfig) -> list[tuple[str, dict[str, Any]]]:
    """Every record, with the name that it has as a document (`firth.corpora.readers`)."""
    found = []
    for file, name in readers.files(paths).items():
        for where, record in readers.records([glob.escape(str(file))]):
            readers.text_field(record, cut.text_field, where)
            if not isinstance(record.get(cut.label_field), str | int):
                raise UserError(
                    f"{where}: the field {cut.label_field!r} should hold a class; the record has {', '.join(record)}"
                )
            found.append((str(record.get("name") or name + where.removeprefix(str(file))), record))
    return found


def _class(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
