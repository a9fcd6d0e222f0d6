"""Resolve a recipe: fill in every setting that depends on its inputs or on this machine."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

from firth.model.config import ModelConfig
from firth.model.init import init_empty_weights
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS
from firth.objectives.objective import Objective
from firth.pretrained.load_save import check_vocab_fits
from firth.runs import config_io
from firth.runs.build_model import builds_in_shards
from firth.runs.compatibility import check_pattern, limit_lengths
from firth.runs.peft_options import add_layer_mixture
from firth.runs.prepare import RunData
from firth.runs.recipe import MODEL_CONFIG_HINT, Recipe, ResolvedRecipe, check_recipe, load_resolved, published
from firth.runs.recipe_names import RECIPES
from firth.runs.run_context import RunContext
from firth.runs.tokenizer import resolve_segmentation, resolved_size
from firth.training.device import choose_precision, default_device
from firth.types import UserError


def resolve(recipe: Recipe, data: RunData, context: RunContext) -> ResolvedRecipe:
    """Fill in every open setting: model config, vocabulary size, class names, batching, precision, absolute paths.

    Args:
        recipe: The recipe.
        data: The data of the run; class names are read from its records.
        context: The run.

    Raises:
        UserError: The settings do not fit each other, the start model or this machine.
    """
    # Class names may be read from a corpus that has to be downloaded first.
    filled = context.ranks.first_rank_first(lambda: _fill(recipe, data, context.ranks.world))
    settings = {field.name: getattr(filled, field.name) for field in dataclasses.fields(Recipe)}
    settings |= {"precision": _precision(recipe, context), "word_segmentation": _segmentation(recipe, context)}
    return config_io.absolute_paths(ResolvedRecipe(**settings))


def _fill(recipe: Recipe, data: RunData, ranks: int) -> Recipe:
    """Fill in what the start model and the records determine: model config, lengths, classes, batching, tokenizer size."""
    sharded = recipe.distributed.shard != "none" and ranks > 1
    base = data.start.shape if sharded and builds_in_shards(recipe) else data.start.model
    config = _model_config(recipe, data, base)
    added = recipe.objective.constraints.added_tokens
    usual = published(recipe.name).examples if recipe.name in RECIPES else type(recipe.examples)()
    examples = limit_lengths(recipe.examples, usual, recipe.peft, base, config, added, data.log)
    examples = examples.limit_to(config.max_positions)
    check_pattern(recipe.objective, config, examples, fixed=bool(recipe.init_from))
    stats = functools.cache(lambda: examples.stats(data, recipe.objective.constraints.class_names))
    objective = recipe.peft.configure_objective(recipe.objective.configure(stats, config))
    if base is not None and "mixture" in base.heads and _keeps_head(objective, config, base):
        objective = add_layer_mixture(objective, frozen=False)  # the head of the base model reads it
    packs = (
        config.packable
        and not config.attention.memory_length
        and objective.constraints.packable
        and recipe.peft.packable
    )
    packs = packs and (base is None or base.prompt is None)  # each text of a packed row would need its own
    batch = recipe.batch.resolve(examples.max_tokens, packs)
    filled = dataclasses.replace(recipe, model=config, objective=objective, examples=examples, batch=batch)
    check_recipe(filled, ranks)
    if (reads := objective.attention) != "any":
        # Record how the model was trained: its model family may define another attention pattern.
        config = config.with_fields(
            {"causal": config.causal or reads == "causal", "attention.prefix_lm": reads == "prefix"}
        )
    with init_empty_weights():
        model = LM(config, objective.heads(config))
    recipe.peft.check_model(model, base)
    tokenizer = dataclasses.replace(recipe.tokenizer, vocab_size=resolved_size(data.directory))
    return dataclasses.replace(filled, model=config, tokenizer=tokenizer)


def _model_config(recipe: Recipe, data: RunData, base: LM | None) -> ModelConfig:
    """Return the model config of the recipe or of the start model, with the size of the tokenizer.

    Raises:
        UserError: There is neither, or the tokenizer has more ids than the start model.
    """
    config = recipe.model
    if base is None:
        if config is None:
            raise UserError(f"the recipe {recipe.name!r} has neither a model config nor init_from: {MODEL_CONFIG_HINT}")
        return dataclasses.replace(config, vocab_size=data.tokenizer.vocab.size)
    if config is None:
        config = base.config
        if not recipe.examples.gives_memory or recipe.batch.packed_length:
            config = config.with_fields({"attention.memory_length": 0})  # records have no preceding text
    if recipe.tokenizer.extend:
        config = dataclasses.replace(config, vocab_size=base.config.vocab_size)
    check_vocab_fits(data.tokenizer, config, recipe.init_from)
    return config


def _keeps_head(objective: Objective, config: ModelConfig, base: LM) -> bool:
    """Return whether the model has a head of the start model."""
    with init_empty_weights():
        return bool(objective.heads(config).keys() & (base.heads.keys() - PREFIX_HEADS))


def _precision(recipe: Recipe, context: RunContext) -> Literal["fp32", "bf16"]:
    """Resolve `precision`: a resumed run keeps its precision, and all ranks take that of the first."""
    recorded = context.resumed and recipe.precision == "auto"
    before = load_resolved(context.directory).precision if recorded else recipe.precision
    chosen = context.ranks.from_first(choose_precision(before, default_device()))
    return "bf16" if chosen == "bf16" else "fp32"


def _segmentation(recipe: Recipe, context: RunContext) -> Literal["icu", "uax29"]:
    """Resolve `word_segmentation`: a resumed run keeps its own."""
    recorded = context.resumed and recipe.word_segmentation == "auto"
    before = load_resolved(context.directory).word_segmentation if recorded else recipe.word_segmentation
    return resolve_segmentation(recipe.objective, before)
