"""Sizes of the published recipes, and what the tiny ones share.

    firth train electra              the tiny size
    firth train electra:published    the paper's own size

Most tiny recipes share one text, one kind of tokenizer and one model size (four layers of width 192), so that two of them differ by what
their papers changed; each takes about two minutes on two cores. T5 and ELECTRA are narrower
(`NARROW_HIDDEN_SIZE`). Published sizes have no data: set data.path=FILES.
"""

from __future__ import annotations

from collections.abc import Mapping

from firth.data.examples import DataConfig, ExamplesConfig
from firth.model.config import ModelConfig
from firth.objectives.objective import Objective
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule
from firth.types import UserError

VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, MAX_POSITIONS = 4096, 192, 4, 256
"""The size of the tiny models; the vocabulary size is that of a tokenizer trained on the text."""

MLM_PROBABILITY = 0.3
"""Share of tokens that tiny masked models predict. More predictions per step get a short run past word frequencies sooner than BERT's 15%
(`roberta`, 800 steps: held-out loss 4.42 against 4.85, though fewer masks are easier; docs/results/encoders.md). Large models
profit from more than 15% too (Wettig 2023)."""

NARROW_VOCAB_SIZE, NARROW_HIDDEN_SIZE, NARROW_HEADS = 2048, 128, 8
"""The size of the tiny T5 and ELECTRA. Models that fill gaps stay at word frequencies for their first one to two million tokens.
These are narrow, so that they read more tokens in the same time, and have heads of 16 (docs/results/tiny-recipes.md)."""

DATA = DataConfig(corpus="shakespeare")


def recipe_of_size(recipe: str, size: str, sizes: Mapping[str, Recipe]) -> Recipe:
    """Return the recipe of a size.

    Raises:
        UserError: There is no such size; the error lists the sizes.
    """
    if size not in sizes:
        raise UserError(f"the recipe {recipe!r} has no size {size!r}; there is {', '.join(sizes)}")
    return sizes[size]


def tiny_recipe(
    name: str,
    objective: Objective,
    examples: ExamplesConfig,
    config: ModelConfig,
    *,
    steps: int,
    batch: BatchConfig,
    optimizer: OptimizerConfig | None = None,
    samples: tuple[str, ...] = (),
) -> Recipe:
    """Return a recipe of the tiny size: Shakespeare's plays, byte-level subwords, a warmup-stable-decay schedule."""
    return Recipe(
        name=name, objective=objective, examples=examples, data=DATA,
        tokenizer=TokenizerConfig(vocab_size=config.vocab_size), model=config, batch=batch,
        optimizer=optimizer or OptimizerConfig(), schedule=Schedule("wsd"), budget=Budget(max_steps=steps),
        evaluation=EvalConfig(every=steps // 4, max_examples=256), checkpoint=CheckpointConfig(every=steps // 4), sample_prompts=samples,
    )  # fmt: skip
