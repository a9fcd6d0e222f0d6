"""The labelled records that every contender of a comparison is finetuned and tested on.

The records that are tested on are chosen by their names, as held-out documents are: where they are also the text that is
learnt from (the headlines of `sarcasm`, unlabelled), no model has read a text that it is tested on. The labels that are
learnt from are drawn anew for each seed, the same for every contender, so that intervals over seeds hold their luck too.

    drawn = draw("sarcasm", Labelled(), source, paths, labels=1000, seeds=3, folder=Path("runs/compare/probe"))
    drawn.classes, drawn.tested          ('sarcastic', 'serious'), 1437
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firth.data.split import enough, place
from firth.recipes.material import Echo, Text
from firth.recipes.segments import Labelled
from firth.text import corpora, read
from firth.types import UserError

MOST = 2000
"""Records that are tested on, at most."""

APART = 0.2
"""Share of the records that is tested on, where they are not the text."""

DRAW = 0x70726F6265
"""Sets the draw of the labels apart from others of the same seed."""


@dataclass(frozen=True)
class Drawn:
    """classes: their names. tested: how many records are tested on. folder: test.jsonl, and train-SEED.jsonl."""

    classes: tuple[str, ...]
    tested: int
    folder: Path

    def source(self, seed: int) -> Text:
        """What a seed learns from and is tested on."""
        return Text(path=(str(self.folder / f"train-{seed}.jsonl"),), valid=(str(self.folder / "test.jsonl"),))


def draw(
    probe: str, cut: Labelled, source: Text, paths: Sequence[str], *, labels: int, seeds: int, folder: Path, echo: Echo
) -> Drawn:
    """Write the files. probe: files or the name of a corpus. paths: the files of the text that is learnt from.

    Raises UserError for a record without a text or a class, too few records, or a single class.
    """
    named = corpora.paths(probe, echo) if probe in corpora.CATALOGUE else [probe]
    records = _records(named, cut)
    own = set(read.files(named)) <= set(read.files(paths)) and not source.valid
    share = enough(source.held_out, [name for name, _ in records]) if own else APART
    known = [row for name, row in records if place(name) >= share]
    apart = [row for name, row in records if place(name) < share][:MOST]
    if not apart or len(known) < labels:
        raise UserError(
            f"{probe}: of {len(records)} records, {len(apart)} are to be tested on and {len(known)} to be learnt from, and "
            f"{labels} labels are asked: give more records, or fewer --labels"
        )
    classes = tuple(sorted({_class(row[cut.label]) for _, row in records}))
    if len(classes) < 2:
        raise UserError(f"{probe}: every record has the class {classes[0]!r}: there is nothing to tell apart")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "test.jsonl", apart)
    for seed in range(seeds):
        some = np.random.default_rng((seed, DRAW)).permutation(len(known))[:labels]
        _write(folder / f"train-{seed}.jsonl", [known[i] for i in some])
    return Drawn(classes, len(apart), folder)


def _records(paths: Sequence[str], cut: Labelled) -> list[tuple[str, dict[str, Any]]]:
    """Every record, with the name that it has as a document (`firth.text.read`)."""
    found = []
    for file, name in read.files(paths).items():
        for where, record in read.records([glob.escape(str(file))]):
            read.text_field(record, cut.text, where)
            if not isinstance(record.get(cut.label), str | int):
                raise UserError(
                    f"{where}: the field {cut.label!r} should hold a class; the record has {', '.join(record)}"
                )
            found.append((str(record.get("name") or name + where.removeprefix(str(file))), record))
    return found


def _class(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
