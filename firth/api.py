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
import io
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from firth.evaluate.predict import predict_with
from firth.evaluate.task import EvaluatedModel, load_evaluated_model
from firth.generate.embeddings import embed
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.io.atomic import make_directory, write_text
from firth.runs.evaluate_files import measure_with
from firth.runs.inference import LoadedModel, encode_prompt, objective_in, trained_length
from firth.runs.recipe import Recipe, load
from firth.runs.run import RunResult, run
from firth.tokenizer import chat
from firth.training.logging import OnMetrics
from firth.types import UserError

Rows = Sequence[Mapping[str, Any]]


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
    return Model(load_evaluated_model(Path(directory)), weights)


class Model:
    """A loaded model and its tokenizer.

    Attributes:
        tokenizer: The tokenizer.
        config: The model config.
    """

    def __init__(self, evaluated: EvaluatedModel, weights: str | None = None) -> None:
        self._evaluated = evaluated
        self._weights = weights
        self.tokenizer = evaluated.tokenizer
        self.config = evaluated.model.config

    @cached_property
    def _loaded(self) -> LoadedModel:
        engine = Engine(self._evaluated.model, self.tokenizer, weights=self._weights)
        objective = objective_in(self._evaluated.directory)
        return LoadedModel(engine.model, self.tokenizer, engine, objective)

    def _require_lm(self) -> LoadedModel:
        if not self._evaluated.model.has_lm_head:
            heads = ", ".join(self._evaluated.model.heads) or "none"
            raise UserError(f"{self._evaluated.directory}: this model has no LM head (its heads: {heads})")
        return self._loaded

    def generate(self, prompts: Sequence[str], **sampling: Any) -> list[str]:
        """Return the continuation of each prompt.

        Args:
            prompts: The texts.
            **sampling: Fields of `firth.generate.sampling.Sampling`: max_new_tokens, temperature, top_k, top_p, seed, ...

        Raises:
            UserError: The model has no LM head, or a prompt is longer than its context.
        """
        return self._require_lm().continue_text(_texts(prompts), Sampling(**sampling))

    def chat(self, conversations: Sequence[Sequence[chat.Message]], **sampling: Any) -> list[str]:
        """Return the next answer of each conversation, as `firth chat` does.

        Args:
            conversations: Lists of messages, {"role": "user", "content": "..."}, rendered with the model's chat template.
            **sampling: As in `generate`.

        Raises:
            UserError: The model has no LM head or chat template, or a conversation is longer than its context.
        """
        engine = self._require_lm().engine
        prompts = [chat.encode(self.tokenizer, messages, open=True)[0] for messages in conversations]
        return [completion.text for completion in engine.generate(prompts, Sampling(**sampling))]

    def score(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """Return log p(completion | prompt) of each pair in nats, summed over the completion's tokens."""
        loaded = self._require_lm()
        read = [encode_prompt(self.tokenizer, text, loaded.model) for text in _texts(prompts)]
        return loaded.engine.score(read, [self.tokenizer.encode(text) for text in _texts(completions)])

    def choose(self, prompt: str, options: Sequence[str]) -> int:
        """Return the index of the option with the highest log-probability after the prompt."""
        loaded = self._require_lm()
        read = encode_prompt(self.tokenizer, prompt, loaded.model)
        return loaded.engine.choose(read, [self.tokenizer.encode(text) for text in _texts(options)])

    def fill(self, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
        """Return the most likely tokens and their probabilities for each <mask> in a text, best first."""
        return [[(one.piece, one.probability) for one in gap] for gap in self._require_lm().engine.fill(text, top)]

    def embed(self, texts: Sequence[str], *, normalize: bool = False) -> np.ndarray:
        """Return one embedding per text: (n, hidden_size), float32. Longer texts are truncated to the trained length."""
        length = trained_length(self._evaluated)
        return embed(self._evaluated.model, self.tokenizer, _texts(texts), length=length, unit=normalize)[0]

    def predict(self, rows: Rows | Sequence[str]) -> list[dict[str, Any]]:
        """Return one row of predictions per record, from the model's task head: the label and its probability, ...

        Args:
            rows: Records with the fields of the training data, or texts.

        Raises:
            UserError: The model has no task head, or a record does not fit the task.
        """
        texts = all(isinstance(row, str) for row in rows)
        lines = [json.dumps({"text": row} if texts else row, ensure_ascii=False) for row in rows]
        stdin = io.BytesIO("".join(f"{line}\n" for line in lines).encode())
        return list(predict_with(self._evaluated, "-", stdin, form="jsonl"))

    def evaluate(self, paths: Sequence[str], *, task: str | None = None, limit: int | None = None) -> dict[str, Any]:
        """Return metrics by name on files, as `firth evaluate` does.

        Args:
            paths: Text or records.
            task: A task of `firth evaluate`; None for the model's own.
            limit: The most tokens (text) or records.
        """
        return measure_with(self._evaluated, _texts(paths), task=task, limit=limit)


def _texts(texts: Sequence[str]) -> list[str]:
    """Return a list of texts; UserError for a single string, which would be read letter by letter."""
    if isinstance(texts, str):
        raise UserError(f"a list of texts is needed, not one text: [{texts[:20]!r}]")
    return list(texts)


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
