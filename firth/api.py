"""The Python API, as `import firth` offers it.

    import firth

    recipe = firth.load_recipe("gpt", {"data.path": "mine.txt", "max_steps": 200})
    result = firth.train(recipe, "runs/mine")
    model = firth.load_model("runs/mine")
    model.generate(["The quick"], max_new_tokens=20)

It does what the commands of the same names do. Records may be lists of dicts (`df.to_dict("records")` for a DataFrame).
Messages go to the Python logger "firth" (`logging.basicConfig(level=logging.INFO)` shows them); on a terminal, training shows a
progress bar.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from firth.io.atomic import make_directory, write_text
from firth.runs.loaded_model import Model, Rows, open_model
from firth.runs.recipe import Recipe, load
from firth.runs.run import RunResult, run
from firth.training.logging import OnMetrics
from firth.types import UserError


def load_recipe(name: str | Path, settings: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Load a recipe and change settings.

    Args:
        name: A published name ("gpt", "bert:published"), a YAML file or a run directory.
        settings: Field -> value ({"batch.size": 64}), or assignments as on the command line (["batch.size=64"]).

    Raises:
        UserError: A name, field or value is invalid.

    >>> load_recipe("gpt", {"batch.size": 64}).batch.size
    64
    """
    if isinstance(settings, Mapping):
        settings = [f"{field}={_yaml(value)}" for field, value in settings.items()]
    return load(str(name), settings)


def train(
    recipe: Recipe,
    directory: str | Path,
    *,
    rows: Rows | None = None,
    validation_rows: Rows | None = None,
    on_metrics: OnMetrics | None = None,
) -> RunResult:
    """Train a recipe in a directory, or resume or return the run that the directory holds.

    Args:
        recipe: The recipe.
        directory: The run directory.
        rows: Training records, instead of the recipe's data; they are kept in the directory as rows.jsonl.
        validation_rows: Validation records; without them, some of `rows` are held out.
        on_metrics: Called with each row of metrics.jsonl as it is written: the step and the metrics by name.

    Returns:
        The directory, the steps and the metrics of the exported step.

    Raises:
        UserError: The recipe is invalid, or the directory holds a run of another recipe or of other data.
    """
    directory = Path(directory)
    if rows is not None:
        make_directory(directory)
        data = dataclasses.replace(
            recipe.data,
            corpus="",
            path=(_write_rows(rows, directory / "rows.jsonl"),),
            validation_path=()
            if validation_rows is None
            else (_write_rows(validation_rows, directory / "validation-rows.jsonl"),),
        )
        recipe = dataclasses.replace(recipe, data=data)
    elif validation_rows is not None:
        raise UserError("validation_rows needs rows: without them, set data.validation_path in the recipe")
    return run(recipe, directory, on_metrics=on_metrics)


def load_model(directory: str | Path, weights: str | None = None) -> Model:
    """Load a run directory, a model directory (transformers' format too), an adapter or a GGUF file.

    Args:
        directory: The directory or file.
        weights: Dtype of the weights in memory for generation: "fp32", "bf16", "int8" or None for the stored one.

    Raises:
        UserError: There is no model, or it is invalid.
    """
    return open_model(Path(directory), weights)


def _yaml(value: Any) -> str:
    """Return a value as the YAML of an assignment."""
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def _write_rows(rows: Rows, file: Path) -> str:
    """Write records as JSON lines, once, and return the path.

    Raises:
        UserError: The file holds other records, or a record is not JSON.
    """
    try:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except TypeError as error:
        raise UserError(f"the rows must be dicts of texts, numbers and lists: {error}") from None
    if not file.exists():
        write_text(file, text)
    elif file.read_text("utf-8") != text:
        raise UserError(f"{file} holds other rows: choose another directory, or delete that one")
    return str(file)
