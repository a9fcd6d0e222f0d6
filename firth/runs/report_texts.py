"""Write what a model says before and after training, for the report of its run: samples and answers to held-out prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from firth.align import held_out
from firth.align.held_out import HeldOutTexts, PromptSplits
from firth.data.examples import DatasetSplits
from firth.generate.sampling import Sampling
from firth.io.atomic import write_text
from firth.io.json_files import read_rows, row_line
from firth.model.model import LM
from firth.runs.loaded_model import Model
from firth.runs.prepare import RunData
from firth.runs.recipe import ResolvedRecipe, published
from firth.runs.recipe_names import RECIPES
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

SAMPLES = "samples.jsonl"


def delete_texts(directory: Path) -> None:
    """Delete the texts of a run that ended before its first checkpoint."""
    for name in (SAMPLES, held_out.FILE):
        (directory / name).unlink(missing_ok=True)


def write_texts(recipe: ResolvedRecipe, model: LM, data: RunData, splits: DatasetSplits, step: int) -> None:
    """Write samples and answers to held-out prompts at a step.

    Args:
        recipe: The resolved recipe.
        model: The model at this step.
        data: The data of the run.
        splits: The examples of the run.
        step: Optimizer steps taken so far.
    """
    _write_samples(recipe, prompts_of(recipe, splits, data.tokenizer), model, data.tokenizer, data.directory, step)
    _write_held_out_texts(recipe, splits, model, data, step)


def prompts_of(recipe: ResolvedRecipe, splits: DatasetSplits, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the prompts to sample from: those of the recipe, or, on another text than a published recipe's, held-out beginnings.

    The published prompts are English and suit the recipe's own text. Where the user gives a text and no prompts, each is replaced by
    the first words of a held-out example, with a mask before the last word if the prompt has one.
    """
    held = splits.validation
    own = published(recipe.name) if recipe.name in RECIPES else None
    if own is None or held is None or not len(held) or recipe.sample_prompts != own.sample_prompts:
        return recipe.sample_prompts
    if recipe.data.corpus == own.data.corpus:
        return recipe.sample_prompts
    found = []
    for prompt, at in zip(recipe.sample_prompts, spaced(len(held), len(recipe.sample_prompts)), strict=False):
        masked, count = "<mask>" in prompt, len(prompt.split())
        shown = next((held[at][name] for name in ("tokens", "first") if name in held[at]), ())
        words = tokenizer.decode(shown).split()
        if "<" in prompt and not masked:  # <prior>, <to>: no beginnings of a text
            found.append(prompt)
        elif len(words) > count:
            found.append(" ".join([*words[: count - 1], "<mask>", words[count]] if masked else words[:count]))
    return tuple(found) or recipe.sample_prompts


def spaced(total: int, count: int) -> list[int]:
    """Return `count` evenly spaced numbers below `total`; fewer if there are fewer."""
    return sorted({i * total // max(count, 1) for i in range(count)})


def _write_samples(
    recipe: ResolvedRecipe, prompts: Sequence[str], model: LM, tokenizer: Tokenizer, directory: Path, step: int
) -> None:
    """Write the model's samples for the prompts at a step to samples.jsonl, once per step."""
    loaded = Model.of(model, tokenizer, recipe.objective)
    sampling = Sampling(max_new_tokens=64, temperature=0.8, seed=recipe.seed)

    def rows() -> Iterator[dict[str, Any]]:
        for prompt in prompts:
            if not loaded.supports(prompt):  # the prompts of a recipe may not suit the objective that the user sets
                continue
            try:
                text = loaded.sample(prompt, sampling)
            except UserError as error:  # a failed sample must not stop a run
                text = f"({error})"
            yield {"step": step, "prompt": prompt, "text": text}

    if prompts:
        _add_rows(directory / SAMPLES, step, rows)


def texts_of(recipe: ResolvedRecipe, splits: DatasetSplits) -> HeldOutTexts | None:
    """Return the held-out prompts that the report shows answers to; None if the run does not train on answers to prompts."""
    if isinstance(splits, PromptSplits):
        return splits.texts
    return held_out.choose(splits.train, splits.validation, recipe.examples.fields)


def _write_held_out_texts(recipe: ResolvedRecipe, splits: DatasetSplits, model: LM, data: RunData, step: int) -> None:
    """Write the model's answers to held-out prompts at a step, for the report, if the run trains on answers to prompts."""
    texts = texts_of(recipe, splits)
    if texts is not None:

        def rows() -> Iterable[dict[str, Any]]:
            with data.autocast():
                return texts.rows(model, data.tokenizer, step, recipe.seed)

        _add_rows(data.directory / held_out.FILE, step, rows)


def _add_rows(path: Path, step: int, make: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """Add the rows of a step to a JSONL file, once per step; the random state of training is unchanged."""
    rows = read_rows(path, {"step": int, "prompt": str}, "delete the file: it is for the report alone")
    if not any(row["step"] == step for row in rows):
        with torch.random.fork_rng():
            rows += make()
        write_text(path, "".join(row_line(row, ascii_only=False) for row in rows))
