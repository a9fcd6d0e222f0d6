"""The sizes that a published recipe comes in, and what all the tiny ones share.

    firth train electra              the default size
    firth train electra:published    the paper's own, for a machine that has the days

Tiny recipes read one text with one kind of tokenizer and have one body (four blocks of width 192), so that what differs
between two of them is what their papers changed; each takes about two minutes on two cores. A published size says no
text: give it yours with data.path=FILES.
"""

from __future__ import annotations

from collections.abc import Mapping

from firth.model.config import ModelConfig
from firth.objectives.objective import Objective
from firth.runs.examples import ExamplesConfig
from firth.runs.prepare import DataConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule
from firth.types import UserError

VOCAB, WIDTH, DEPTH, CONTEXT = 4096, 192, 4, 256
"""The body that the tiny recipes share; its vocabulary is that of a tokenizer trained on the text."""

HIDDEN = 0.3
"""Share of the tokens that tiny masked recipes hide: more answers a step, and a start that is sooner past word frequencies than
with BERT's 15% (`roberta`, 800 steps: held-out loss 4.42 against 4.85, though fewer hidden are easier to guess; on Brown after
600 steps 15% was worth less than nothing: docs/results/index.md). Large models want more than 15% too (Wettig 2023)."""

TEXT = DataConfig(corpus="shakespeare")


def one_of(recipe: str, size: str, sizes: Mapping[str, Recipe]) -> Recipe:
    """The recipe of a size; UserError with the sizes there are."""
    if size not in sizes:
        raise UserError(f"the recipe {recipe!r} has no size {size!r}; there is {', '.join(sizes)}")
    return sizes[size]


def tiny(
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
    """A recipe of the tiny size: Shakespeare's plays, 4,096 subwords, a warm start and a linear fall at the end."""
    return Recipe(
        name=name, objective=objective, examples=examples, data=TEXT, tokenizer=TokenizerConfig(vocab_size=VOCAB), model=config,
        batch=batch, optimizer=optimizer or OptimizerConfig(), schedule=Schedule("wsd"), budget=Budget(max_steps=steps),
        evaluation=EvalConfig(every=steps // 4, max_examples=256), checkpoint=CheckpointConfig(every=steps // 4), sample_prompts=samples,
    )  # fmt: skip
