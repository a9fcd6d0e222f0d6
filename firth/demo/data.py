"""Data files of the demo, made from Shakespeare's plays or from a user's own folder.

    train.jsonl, valid.jsonl           {"text"}: documents for pretraining, and held-out documents
    labeled-train.jsonl, -valid        {"text", "label"}: labeled passages; the held-out ones come from held-out documents
    dialogues-train.jsonl, -valid      {"prompt", "completion"}: a prompt and its answer
    material.json                      descriptions of the tasks, and the name of the ground-truth reward

Every stage of the demo reads these files and no others.
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

INFO = "material.json"
"""File name of the `DatasetInfo`; it exists if the data of a demo is complete."""


@dataclass(frozen=True)
class DatasetInfo:
    """Description of the data of one demo, for the terminal and the report.

    Args:
        title: Name of the text.
        held_out: Names of the held-out documents.
        question: Description of the classification task.
        labels: Names of its classes.
        cue: Description of the dialogues.
        scorer: Name of the ground-truth reward in `firth.demo.scorers.SCORERS`.
        samples: Prompts for samples of the decoder.
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
        """Write the description to a directory.

        Args:
            directory: The data directory.
        """
        (directory / INFO).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), "utf-8")

    @staticmethod
    def load(directory: Path) -> DatasetInfo:
        """Read the description that `save` wrote.

        Args:
            directory: The data directory.

        Returns:
            The description.
        """
        fields: dict[str, Any] = json.loads((directory / INFO).read_text("utf-8"))
        tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        arguments: Any = fields | tuples
        return DatasetInfo(**arguments)


@dataclass(frozen=True)
class DemoFiles:
    """Rows of the data files of a demo.

    Args:
        train: Training documents.
        valid: Held-out documents.
        labeled_train: Labeled training passages.
        labeled_valid: Labeled held-out passages.
        dialogues_train: Prompts and completions for training.
        dialogues_valid: Held-out prompts and completions.
    """

    train: Sequence[Row]
    valid: Sequence[Row]
    labeled_train: Sequence[Row]
    labeled_valid: Sequence[Row]
    dialogues_train: Sequence[Row]
    dialogues_valid: Sequence[Row]


def write_data(directory: Path, files: DemoFiles, info: DatasetInfo) -> DatasetInfo:
    """Write the data of a demo atomically: the directory appears when all its files are complete.

    Args:
        directory: The data directory.
        files: Rows of each file.
        info: Description of the data.

    Returns:
        `info`.

    Raises:
        UserError: A file would have no rows.
    """
    for name, rows in asdict(files).items():
        if not rows:
            raise UserError(
                f"the text is too small for the demo: no {name.replace('_', ' ')} rows; give it about 200 kB or more"
            )
    with new_directory(directory) as partial:
        for name, rows in vars(files).items():
            write_rows(partial / f"{name.replace('_', '-')}.jsonl", rows)
        info.save(partial)
    return info


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to a JSONL file atomically.

    Args:
        path: The file.
        rows: One JSON object per line.
    """
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file.

    Args:
        path: A file that `write_rows` wrote.

    Returns:
        Its rows, in order.
    """
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sample_balanced(rows: Sequence[Row], max_rows: int, rng: random.Random) -> list[Row]:
    """Sample rows with equally many rows of each label, in random order.

    A constant prediction then has an accuracy of 1 / (number of labels).

    Args:
        rows: Labeled rows.
        max_rows: Largest number of rows.
        rng: Random number generator.

    Returns:
        The sampled rows.
    """
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    if not by_label:
        return []
    per_label = min(max_rows // len(by_label), *(len(group) for group in by_label.values()))
    sampled = [row for label in sorted(by_label) for row in rng.sample(by_label[label], per_label)]
    rng.shuffle(sampled)
    return sampled
