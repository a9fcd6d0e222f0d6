"""Evaluate a run on files, with the metrics of its task, or with its own objective if that is not a task.

    firth evaluate runs/electra held-out.txt         loss/generator, loss/replaced, replaced_accuracy, auc
    firth evaluate runs/vae held-out.txt             elbo, kl, active
    firth evaluate runs/elmo held-out.txt            loss/forward, loss/backward
    firth evaluate runs/bert held-out.txt --task objective       the accuracy of NSP and the masked loss

Examples are built as in the run's recipe. The objective's losses and metrics are those of the evaluation during training
(`firth.runs.validation`), in fp32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from firth.evaluate import evaluate as tasks
from firth.evaluate.heads import head_of
from firth.evaluate.task import EvaluatedModel, load_evaluated_model
from firth.evaluate.tasks import TASKS, default_for
from firth.runs import examples
from firth.runs.prepare import RunData
from firth.runs.recipe import load_resolved
from firth.runs.start_model import StartModel
from firth.runs.validation import Validator
from firth.training.distributed import Ranks
from firth.types import LOGGER, UserError

OBJECTIVE = "objective"
"""Name of the task that evaluates a run's own objective."""


def measure(
    directory: Path,
    paths: Sequence[str],
    *,
    task: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluate a run or model directory on files; return metrics by name.

    Args:
        directory: A run or model directory.
        paths: Text or records; runs for the task "glue".
        task: One of `firth.evaluate.tasks.TASKS`, "likelihood", "glue" or "objective"; None chooses the model's own task.
        limit: The most tokens to evaluate, spread over the text; for a task, the number of records, from the first.

    Raises:
        UserError: The model does not support the task, or the files hold nothing to evaluate.
    """
    if task == "glue":
        return tasks.evaluate(directory, paths, task=task, limit=limit)
    return measure_with(load_evaluated_model(directory), paths, task=task, limit=limit)


def measure_with(
    evaluated: EvaluatedModel,
    paths: Sequence[str],
    *,
    task: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluate a loaded model on files; see `measure`."""
    task = default_for(evaluated, paths) if task is None else task
    if task == "likelihood" and (evaluated.model.config.encoder.latent_size or not evaluated.model.has_lm_head):
        task = ""  # only the objective can evaluate a bound (VAE) or two separate directions (ELMo)
    if task in (OBJECTIVE, ""):
        noted = {} if limit is None else {"limit": limit}
        return {"task": OBJECTIVE} | noted | by_objective(evaluated, paths, limit)
    return tasks.evaluate_model(evaluated, paths, task=task, limit=limit)


def by_objective(evaluated: EvaluatedModel, paths: Sequence[str], limit: int | None) -> dict[str, Any]:
    """Return the losses and metrics of a run's own objective on files.

    Raises:
        UserError: The directory has no recipe, or its model has a task head, which is evaluated by its task.
    """
    where = evaluated.directory
    if not (where / "recipe.yaml").is_file():
        raise UserError(
            f"{where}: this model has {', '.join(evaluated.model.heads) or 'no head'}, and no recipe of its training: "
            f"name its run directory, or a task that it supports (--task {', '.join(TASKS)})"
        )
    if head := head_of(dict(evaluated.model.heads)):
        raise UserError(f"{where}: this model has a head for {head}: leave out --task to evaluate it")
    recipe = load_resolved(where)
    source = replace(recipe.data, path=tuple(paths), validation_path=tuple(paths), corpus="", weights=(), cache_dir="")
    with tempfile.TemporaryDirectory() as folder:
        data = RunData(
            source, evaluated.tokenizer, Path(folder), recipe.batch.size, recipe.seed,
            lambda _: None, recipe.model.attention.memory_length, start=StartModel(recipe.init_from),
        )  # fmt: skip
        cut = examples.build_datasets(recipe.examples, data, recipe.objective)
        if cut.validation is None or not len(cut.validation):
            raise UserError(f"{', '.join(paths)}: there is nothing to evaluate in it")
        for remark in cut.validation.notes:
            LOGGER.warning(remark)
        count = len(cut.validation)
        if limit is not None:
            some = examples.spread(cut.validation, 64)
            mean = sum(max(field.size for field in some[i].values()) for i in range(len(some))) / len(some)
            count = max(1, min(count, round(limit / mean)))
        shown = replace(recipe, evaluation=replace(recipe.evaluation, max_examples=count))
        held = Validator(shown, cut.validation, cut.bytes_per_target, evaluated.tokenizer, Ranks())
        return {"examples": len(held.examples), "share": len(held.examples) / len(cut.validation)} | held.measure(
            evaluated.model, 0
        )
