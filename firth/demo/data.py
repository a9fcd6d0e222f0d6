"""Data of the demo: one small set of files, made from Shakespeare's plays or from a user's own folder.

    train.jsonl, valid.jsonl           {"text"}: documents to pretrain on, and documents held out whole
    labeled-train.jsonl, -valid       {"text", "label"}: a real label of passages; the held-out ones come from held-out documents
    dialogues-train.jsonl, -valid      {"prompt", "completion"}: a cue and its answer
    material.json                      descriptions of the tasks, and the name of the ground-truth reward

Every stage of the demo reads these files and nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from firth.io.atomic import new_directory, new_file
from firth.types import UserError

Row = dict[str, str]


@dataclass(frozen=True)
class DemoText:
    """Descriptions of the data of one demo, for the terminal and the report.

    Args:
        title: Name of the text.
        held_out: Names of the held-out documents.
        question: Description of the classification task.
        labels: Its classes.
        cue: Description of the dialogues.
        scorer: Name in `firth.demo.scorers.SCORERS`.
        samples: Prompts to continue.
        bytes: UTF-8 bytes of the training text.
    """

    title: str
    held_out: tuple[str, ...]
    question: str
    labels: tuple[str, ...]
    cue: str
    scorer: str
    samples: tuple[str, ...]
    bytes: int

    def save(self, directory: Path) -> None:
        (directory / "material.json").write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), "utf-8")

    @staticmethod
    def load(directory: Path) -> DemoText:
        fields: dict[str, Any] = json.loads((directory / "material.json").read_text("utf-8"))
        lists = {k: tuple(v) for k, v in fields.items() if isinstance(v, list)}
        whole: Any = fields | lists
        return DemoText(**whole)


@dataclass(frozen=True)
class DemoFiles:
    """The rows of a demo's files, before they are written."""

    train: Sequence[Row]
    valid: Sequence[Row]
    labeled_train: Sequence[Row]
    labeled_valid: Sequence[Row]
    dialogues_train: Sequence[Row]
    dialogues_valid: Sequence[Row]


def write(directory: Path, files: DemoFiles, material: DemoText) -> DemoText:
    """All of it or nothing: the folder appears under its name only when it is whole."""
    for name, rows in asdict(files).items():
        if not rows:
            raise UserError(
                f"the text is too small for the demo: no {name.replace('_', ' ')} rows; give it about 200 kB or more"
            )
    with new_directory(directory) as partial:
        for name, rows in vars(files).items():
            write_rows(partial / f"{name.replace('_', '-')}.jsonl", rows)
        material.save(partial)
    return material


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that `write_rows` wrote."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def balanced(rows: Sequence[Row], n: int, rng: random.Random) -> list[Row]:
    """At most n rows in random order, every label equally often: a constant answer scores 1 / labels."""
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    if not by_label:
        return []
    each = min(n // len(by_label), *(len(some) for some in by_label.values()))
    chosen = [row for label in sorted(by_label) for row in rng.sample(by_label[label], each)]
    rng.shuffle(chosen)
    return chosen
