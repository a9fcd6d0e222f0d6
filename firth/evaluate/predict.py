"""Predict: what a finetuned run says of records without answers, one row for each record, in their order.

    firth predict runs/classify reviews.csv              {"row": 1, "label": "good", "probability": 0.97, ...} a line
    echo "a fine film" | firth predict runs/classify -             one text a line
    firth predict runs/answer questions.json --out answers.csv
    firth predict runs/t5 pairs.csv                      {"row": 1, "answer": "une loutre", "probability": 0.61, "finish": "stop"}
    firth predict runs/chat questions.jsonl              as a decoder answers, behind its chat template

Records are read as in training (JSONL, CSV, TSV, Parquet; CoNLL's columns; SQuAD's JSON), with the fields of the run's recipe;
plain text has one text a line, for a tagger its words parted by blanks. Each row has its record's number and its `id`, if it
has one; a record without text has a row of nothing else, and one that cannot be read is an error (`firth.evaluate.prediction_inputs`).
What was cut or mended is told on the side.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from firth.evaluate.prediction_inputs import read_inputs
from firth.evaluate.task import EvaluatedModel, Progress, Say, Task, load_evaluated_model
from firth.evaluate.tasks import TASKS, default
from firth.evaluate.tasks.generation import GENERATION
from firth.evaluate.text_perplexity import reads_of
from firth.io.atomic import new_file
from firth.types import UserError


def predict(
    directory: Path,
    file: str,
    stdin: BinaryIO,
    progress: Progress = lambda _: None,
    *,
    form: str = "auto",
    say: Say = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """The rows. file: a file of records, of text by lines, or - for what `stdin` holds; form: of `firth.evaluate.prediction_inputs.FORMS`.

    say: told what was cut, mended or doubtful. Raises UserError where the model has no head of a task, and for records that do
    not fit it.
    """
    evaluated = load_evaluated_model(directory)
    task = served(evaluated)
    assert task.predict is not None and task.input_schema is not None
    with tempfile.TemporaryDirectory() as folder:
        found = read_inputs(file, stdin, form, task.input_schema(evaluated), Path(folder))
        for remark in found.remarks:
            say(remark)
        with found.named():
            told: Iterator[dict[str, Any]] = iter(())
            if any(found.told):
                items = task.load(evaluated, [str(found.path)], asked=False)
                for remark in task.notes(items):
                    say(found.shown(remark))
                told = task.predict(evaluated, items, progress)
            for row, there in zip(found.rows, found.told, strict=True):
                yield row | (next(told) if there else {})
            next(told, None)  # the model is left in the mode it was in


def served(evaluated: EvaluatedModel) -> Task:
    """The task that a model is asked; UserError where it is none that gives a row for each record."""
    name, config = default(evaluated), evaluated.model.config
    written = name == "likelihood" and evaluated.model.has_lm_head and not config.latent_size
    # A decoder goes on from whatever stands before; of encoder-decoders those of others, and not what a run has pretrained.
    if written and (not evaluated.recipe if config.num_encoder_layers else reads_of(config) == "causal"):
        name = GENERATION.name
    if name not in TASKS or TASKS[name].predict is None:
        there = ", ".join(evaluated.model.heads) or "no part"
        other = "generate" if config.latent_size else "fill" if "lm" in evaluated.model.heads else "embed"
        raise UserError(
            f"{evaluated.directory}: this model has {there} and no task's head: finetune it (firth train classification, regress, "
            f"choose, tag, answer, instruct or text_to_text); as it is, it serves `firth {other}`"
        )
    return TASKS[name]


def check_output_path(out: Path) -> None:
    """UserError, before anything is computed, for a file that cannot be written; its directory is made."""
    if out.is_dir():
        raise UserError(f"{out}: this is a directory: name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{out}: {out.parent} is no directory: name another file") from None


def write(rows: Iterator[dict[str, Any]], out: Path | None, say: Callable[[str], None]) -> int:
    """Write the rows as JSON lines, or as CSV where `out` ends so; to `say` a line at a time where it is None. Returns how
    many there were."""
    count = 0
    if out is None:
        for row in rows:
            say(json.dumps(row, ensure_ascii=False))
            count += 1
        return count
    with new_file(out) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        if out.suffix.lower() == ".csv":
            count = _table(rows, file)
        else:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
    return count


def _table(rows: Iterator[dict[str, Any]], file: TextIO) -> int:
    """Rows as CSV. The columns are those of the first row that says something, and of those before it; a row that has others
    is a UserError."""
    count, waiting = 0, list[dict[str, Any]]()
    writer: Any = None
    for row in rows:
        count += 1
        waiting.append(flattened(row))
        if writer is None and row.keys() <= {"row", "id"}:
            continue
        if writer is None:
            names = {name: None for one in waiting for name in ("row", "id", *one) if any(name in w for w in waiting)}
            writer = csv.DictWriter(file, list(names))
            writer.writeheader()
        for one in waiting:
            if more := one.keys() - {*writer.fieldnames}:
                raise UserError(
                    f"row {one['row']} has a column {min(more)!r} that the first has not, as a table cannot: write JSON lines"
                )
            writer.writerow(one)
        waiting = []
    if waiting:
        writer = csv.DictWriter(file, list({name: None for one in waiting for name in one}))
        writer.writeheader()
        writer.writerows(waiting)
    return count


def flattened(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a column for each class; lists as text.

    >>> flattened({"label": "good", "probabilities": {"bad": 0.1, "good": 0.9}, "tags": ["B", "O"]})
    {'label': 'good', 'probability_bad': 0.1, 'probability_good': 0.9, 'tags': 'B O'}
    """
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            out |= {f"probability_{key}": one for key, one in value.items()}
        else:
            out[name] = (
                " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
            )
    return out
