"""Predictions of a finetuned run for unlabeled records: one row per record, in their order.

    firth predict runs/classify reviews.csv              {"row": 1, "label": "good", "probability": 0.97, ...} a line
    echo "a fine film" | firth predict runs/classify -             one text a line
    firth predict runs/answer questions.json --out answers.csv
    firth predict runs/t5 pairs.csv                      {"row": 1, "answer": "une loutre", "probability": 0.61, "finish": "stop"}
    firth predict runs/chat questions.jsonl              answers of a decoder, with its chat template

Records are read as in training (JSONL, CSV, TSV, Parquet, CoNLL columns, SQuAD JSON), with the fields of the run's recipe.
Plain text has one text per line; for token classification its words are separated by blanks. Each row has the number of
its record and its `id`, if it has one. A record without text has a row of nothing else, and a record that cannot be read
is an error (`firth.evaluate.prediction_inputs`). Warnings name what was truncated or repaired.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from firth.evaluate.heads import HeadOutput
from firth.evaluate.prediction_inputs import InputRecords, read_inputs
from firth.evaluate.task import EvaluatedModel, Progress, Task, load_evaluated_model
from firth.evaluate.tasks import TASKS, default_task
from firth.evaluate.tasks.generation import GENERATION
from firth.generate.scoring import scoring_mode
from firth.generate.slices import Slices
from firth.io.atomic import new_file
from firth.types import LOGGER, LogLine, UserError


def predict(
    directory: Path,
    file: str,
    stdin: BinaryIO,
    progress: Progress = lambda _: None,
    *,
    form: str = "auto",
) -> Iterator[dict[str, Any]]:
    """Yield a row of predictions for each record.

    Args:
        directory: A run or model directory.
        file: A file of records or of lines of text; "-" reads `stdin`.
        stdin: Standard input.
        progress: Called with the share done, 0 to 1.
        form: Format of the file, of `firth.evaluate.prediction_inputs.FORMS`, or "auto".

    Raises:
        UserError: The model has no task head, or a record does not fit the task.
    """
    yield from predict_with(load_evaluated_model(directory), file, stdin, progress, form=form)


def predict_with(
    evaluated: EvaluatedModel,
    file: str,
    stdin: BinaryIO,
    progress: Progress = lambda _: None,
    *,
    form: str = "auto",
) -> Iterator[dict[str, Any]]:
    """Yield a row of predictions of a loaded model for each record; see `predict`."""
    task = prediction_task(evaluated)
    assert task.predict is not None
    with _loaded(evaluated, task, file, stdin, form) as (records, items):
        predictions = iter(()) if items is None else task.predict(evaluated, items, progress)
        for row, has_text in zip(records.rows, records.has_text, strict=True):
            yield row | (next(predictions) if has_text else {})
        next(predictions, None)  # exhaust the generator, which restores the mode of the model


def predict_slices(evaluated: EvaluatedModel, lines: bytes, max_tokens: int) -> Slices[list[dict[str, Any]]]:
    """Return a row of predictions of a task head for each record, in slices of a forward pass.

    Args:
        evaluated: A model whose task reads a head (`Task.head`).
        lines: The records, as JSON lines.
        max_tokens: Most padded tokens of a forward pass, or those of one row of a record.

    Raises:
        UserError: A record does not fit the task.
    """
    task = prediction_task(evaluated)
    assert task.head is not None
    with _loaded(evaluated, task, "-", io.BytesIO(lines), "jsonl") as (records, items):
        outputs: list[HeadOutput] = []
        for some in task.head.batches(evaluated, items, lambda _: None, max_tokens) if items is not None else ():
            outputs += some
            yield
        predictions = iter(()) if items is None else task.head.rows(evaluated, items, iter(outputs))
        rows = zip(records.rows, records.has_text, strict=True)
        return [row | (next(predictions) if has_text else {}) for row, has_text in rows]


@contextmanager
def _loaded(
    evaluated: EvaluatedModel, task: Task, file: str, stdin: BinaryIO, form: str
) -> Iterator[tuple[InputRecords, Any]]:
    """Yield the records and the items of a task, None if no record has text; errors in the context have the user's locations."""
    assert task.input_schema is not None
    with tempfile.TemporaryDirectory() as folder:
        records = read_inputs(file, stdin, form, task.input_schema(evaluated), Path(folder))
        for note in records.notes:
            LOGGER.warning(note)
        with records.user_locations():
            items = None
            if any(records.has_text):
                items = task.load(evaluated, [str(records.path)], labeled=False)
                for note in task.notes(items):
                    LOGGER.warning(records.with_user_locations(note))
            yield records, items


def prediction_task(evaluated: EvaluatedModel) -> Task:
    """Return the task by which a model predicts.

    Raises:
        UserError: The model has no task with one row per record.
    """
    name, config = default_task(evaluated), evaluated.model.config
    generates = name == "likelihood" and evaluated.model.has_lm_head and not config.encoder.latent_size
    # Any causal decoder can continue a prompt. A foreign encoder-decoder is finetuned, one pretrained by a run is not.
    if generates and (not evaluated.recipe if config.encoder.num_layers else scoring_mode(config) == "causal"):
        name = GENERATION.name
    if name not in TASKS or TASKS[name].predict is None:
        heads = ", ".join(evaluated.model.heads) or "none"
        other = "generate" if config.encoder.latent_size else "fill" if "lm" in evaluated.model.heads else "embed"
        raise UserError(
            f"{evaluated.directory}: this model has no task head (heads: {heads}): finetune it (firth train classification, "
            "regression, multiple_choice, token_classification, question_answering, sft or text_to_text); without "
            f"finetuning, use `firth {other}`"
        )
    return TASKS[name]


def check_output_path(out: Path) -> None:
    """Create the directory of an output file; UserError, before anything is computed, if it cannot be written."""
    if out.is_dir():
        raise UserError(f"{out}: this is a directory: name a file in it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{out}: {out.parent} is not a directory: name another file") from None


def write(rows: Iterator[dict[str, Any]], out: Path | None, log: LogLine) -> int:
    """Write rows as JSON lines, or as CSV if `out` ends in .csv.

    Args:
        rows: The rows.
        out: The output file; None prints each line with `log`.
        log: Prints a line.

    Returns:
        Number of rows.
    """
    count = 0
    if out is None:
        for row in rows:
            log(json.dumps(row, ensure_ascii=False))
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
    """Write rows as CSV with the columns of the first row that has predictions and of the rows before it.

    Raises:
        UserError: A later row has another column.
    """
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
                    f"row {one['row']} has a column {min(more)!r} that the first row does not have: write JSON lines, not CSV"
                )
            writer.writerow(one)
        waiting = []
    if waiting:
        writer = csv.DictWriter(file, list({name: None for one in waiting for name in one}))
        writer.writeheader()
        writer.writerows(waiting)
    return count


def flattened(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with a column for each class and lists joined as text.

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
