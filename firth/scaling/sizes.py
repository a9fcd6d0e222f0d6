"""One dial for the size of a model: the recipe of every width.

    layers          in proportion to the width, as in the recipe (at least 1)
    heads           of the recipe's width, or of the largest even width below it that divides the new one
    other widths    (MLP, recurrent cells, factorized embeddings) in proportion to the width
    learning rate   (recipe's width / width) ** LR_EXPONENT times the recipe's, for matrices and heads
    batch           the recipe's: the same tokens in every step at every size

A table of embeddings has one row per token at every width, so its rate stays (Yang et al. 2022). docs/results/scaling.md has
the check of the exponent.

>>> from firth.recipes.decoders import gpt
>>> [(w, scaled(gpt(), w).model.num_layers, scaled(gpt(), w).model.num_heads) for w in (48, 96, 192, 384)]
[(48, 1, 1), (96, 2, 2), (192, 4, 3), (384, 8, 6)]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch

from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.runs.recipe import EvalConfig, Recipe
from firth.training.schedule import Budget, Schedule
from firth.types import UserError

WARMUP_STEPS = 20
"""Steps of the warmup at every size and budget."""
DECAY_RATIO = 0.3
"""Share of a run in which the learning rate decays to 0."""
LR_EXPONENT = 0.5
"""How fast the learning rate falls with the width."""


def scaled(recipe: Recipe, width: int) -> Recipe:
    """Return a recipe whose model has another width.

    Raises:
        UserError: The recipe has no model config, or no model of this width exists.
    """
    if recipe.model is None:
        raise UserError(f"the recipe {recipe.name!r} has no model of its own to scale: use a recipe that pretrains")
    model = scaled_config(recipe.model, width)
    factor = (recipe.model.hidden_size / width) ** LR_EXPONENT
    optimizer = recipe.optimizer
    scalar_lr = None if optimizer.scalar_lr is None else optimizer.scalar_lr * factor
    embedding_lr = optimizer.lr if optimizer.embedding_lr is None else optimizer.embedding_lr
    rates = replace(optimizer, lr=optimizer.lr * factor, scalar_lr=scalar_lr, embedding_lr=embedding_lr)
    return replace(recipe, model=model, optimizer=rates)


def scaled_config(config: ModelConfig, width: int) -> ModelConfig:
    """Return a model config of another width, with the depth and all widths in proportion.

    Raises:
        UserError: Rotary positions need an even width.
    """
    ratio = width / config.hidden_size

    def part(value: int) -> int:
        return max(1, round(value * ratio)) if value else 0

    fields: dict[str, object] = {
        "hidden_size": width, "num_layers": part(config.num_layers), "intermediate_size": part(config.intermediate_size),
        "encoder.num_layers": part(config.encoder.num_layers), "embedding.size": part(config.embedding.size),
        "encoder.latent_size": part(config.encoder.latent_size),
    }  # fmt: skip
    if config.embedding.characters.max_length:
        filters = 64 * max(1, round(config.embedding.characters.num_filters * ratio / 64))
        fields["embedding.characters.num_filters"] = filters
    if config.num_layer_groups:
        fields["num_layer_groups"] = min(config.num_layer_groups, part(config.num_layers))
    if config.rnn.type:  # recurrent layers have no heads
        fields |= {"head_dim": 0}
    else:
        even = 2 if config.position.type == "rotary" else 1
        if width % even:
            raise UserError(f"the width {width} is odd, and rotary positions turn pairs of numbers: choose an even one")
        head = max(d for d in range(even, min(width, config.head_dim) + 1, even) if width % d == 0)
        shared = config.num_heads // config.num_kv_heads  # query heads per key head
        heads = width // head
        fields |= {
            "num_heads": heads,
            "head_dim": head,
            "num_kv_heads": heads // shared if heads % shared == 0 else heads,
        }
    return config.with_fields(fields)


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model.

    Args:
        multiplied: Those that a token is multiplied by, the LM head included and a separate embedding table not: the N of a fit.
        total: All of them.
    """

    multiplied: int
    total: int


def count_parameters(recipe: Recipe) -> ParameterCounts:
    """Count the parameters of a recipe's model with the heads of its objective, without allocating them."""
    assert recipe.model is not None
    return _count_parameters(recipe.model, recipe.objective)


@cache
def _count_parameters(config: ModelConfig, objective: Objective) -> ParameterCounts:
    with torch.device("meta"):
        model = LM(config, objective.heads(config))
    total = sum(p.numel() for p in model.parameters())
    table = 0 if config.tie_embeddings or config.embedding.characters.max_length else config.vocab_size
    return ParameterCounts(total - table * config.embedding_dim, total)


def planned_recipe(base: Recipe, width: int, steps: int) -> Recipe:
    """Return a recipe at a width and a number of steps, with the schedule of a sweep."""
    return replace(
        scaled(base, width), budget=Budget(max_steps=steps), schedule=Schedule("wsd", decay_ratio=DECAY_RATIO, warmup_steps=WARMUP_STEPS),
        evaluation=EvalConfig(every=max(1, steps // 4), max_examples=base.evaluation.max_examples),
    )  # fmt: skip
