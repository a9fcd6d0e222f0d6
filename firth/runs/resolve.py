"""Resolve a recipe: fill in every setting that depends on its inputs or on this machine."""

from __future__ import annotations

import dataclasses
from typing import Literal

from firth.doctor import device as best_device
from firth.model.empty_weights import init_empty_weights
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS
from firth.pretrained.load_save import check_vocab_fits, load_model
from firth.runs import config_io
from firth.runs.compatibility import (
    check_available_memory,
    check_batching,
    check_fields,
    check_memory,
    check_pattern,
    limit_lengths,
)
from firth.runs.examples import ExamplesConfig, model_directory
from firth.runs.peft_options import FullFinetuning, add_layer_mixture, check_peft
from firth.runs.prepare import RunData
from firth.runs.recipe import Recipe, load, published
from firth.runs.recipe_names import RECIPES
from firth.runs.run_context import RunContext
from firth.runs.segmentation_warnings import Segmentation, resolve_segmentation
from firth.runs.tokenizer import resolved_size
from firth.training import precision


def resolve(recipe: Recipe, data: RunData, context: RunContext) -> Recipe:
    """Return the recipe with every open setting filled in: model config, vocabulary size, classes, batching, precision, paths.

    Args:
        recipe: The recipe.
        data: The data of the run; class names are read from its records.
        context: The run.

    Raises:
        UserError: The settings do not fit each other, the start model or this machine.
    """
    # Class names may be read from a corpus that has to be downloaded first.
    resolved = context.first_rank_first(lambda: _fill(recipe, data))
    resolved = dataclasses.replace(
        resolved, precision=_precision(recipe, context), word_segmentation=_segmentation(resolved, context)
    )
    assert resolved.model is not None
    check_batching(
        resolved.objective,
        resolved.model,
        pack=resolved.batch.packed_length,
        accumulate=resolved.batch.gradient_accumulation_steps,
        ranks=context.ranks.world,
    )
    check_available_memory(
        resolved.model, resolved.optimizer.name, isinstance(resolved.peft, FullFinetuning), best_device()
    )
    return resolved


def _fill(recipe: Recipe, data: RunData) -> Recipe:
    """Fill in what depends on the inputs: model config, vocabulary size, classes, batching and paths."""
    check_peft(recipe.peft, recipe.init_from)
    config, base = recipe.model, None
    if recipe.init_from:
        base = load_model(model_directory(recipe.init_from))
        base_config = base.config
        if (
            not recipe.examples.gives_memory or recipe.batch.packed_length
        ):  # records have no preceding text: fine-tune without memory
            base_config = dataclasses.replace(base_config, memory_length=0)
        config = base_config if config is None else config
    assert config is not None
    if recipe.init_from:
        check_vocab_fits(data.tokenizer, config, recipe.init_from)
    else:
        config = dataclasses.replace(config, vocab_size=data.tokenizer.vocab.size)
    added = max(one.added_tokens for one in recipe.objective.components())
    examples = limit_lengths(recipe.examples, _published_examples(recipe), recipe.peft, base, config, added, data.log)
    examples = examples.limit_to(config.max_positions)
    objective = recipe.peft.configure_objective(examples.configure_objective(recipe.objective, data).for_model(config))
    with init_empty_weights():
        kept = objective.heads(config).keys() & (base.heads.keys() - PREFIX_HEADS if base is not None else ())
    if kept and base is not None and "mixture" in base.heads:
        objective = add_layer_mixture(objective, frozen=False)  # the head of the base model reads it
    check_pattern(objective, config, examples, fixed=bool(recipe.init_from))
    check_fields(objective, examples, config)
    if (reads := objective.attention_pattern()) != "any":
        # Record how the model was trained: its model family may define another attention pattern.
        config = dataclasses.replace(config, causal=config.causal or reads == "causal", prefix_lm=reads == "prefix")
    packs = config.packable and not config.memory_length and objective.packable and recipe.peft.packable
    packs = packs and (base is None or base.prompt is None)  # each text of a packed row would need its own
    batch = recipe.batch.resolve(examples.max_tokens, packs)
    check_memory(config, examples, batch.packed_length)
    with init_empty_weights():
        model = LM(config, objective.heads(config))
    recipe.peft.check_model(model, base)
    tokenizer = dataclasses.replace(recipe.tokenizer, vocab_size=resolved_size(data.directory))
    resolved: Recipe = config_io.absolute_paths(
        dataclasses.replace(
            recipe, model=config, objective=objective, examples=examples, batch=batch, tokenizer=tokenizer
        )
    )
    return resolved


def _published_examples(recipe: Recipe) -> ExamplesConfig:
    """Return the examples config of the published recipe with this name, or else the defaults of its kind."""
    return published(recipe.name).examples if recipe.name in RECIPES else type(recipe.examples)()


def _precision(recipe: Recipe, context: RunContext) -> Literal["fp32", "bf16"]:
    """Resolve `precision`: a resumed run keeps its precision, and all ranks take that of the first."""
    before = (
        load(str(context.directory)).precision if context.resumed and recipe.precision == "auto" else recipe.precision
    )
    device = best_device()
    return "bf16" if context.ranks.from_first(precision.choose(before, device)) == "bf16" else "fp32"


def _segmentation(recipe: Recipe, context: RunContext) -> Segmentation:
    """Resolve `word_segmentation`: a resumed run keeps its own, also an "auto" that an older version wrote."""
    if not context.resumed or recipe.word_segmentation != "auto":
        return resolve_segmentation(recipe.objective, recipe.word_segmentation)
    before = load(str(context.directory)).word_segmentation
    return before if before == "auto" else resolve_segmentation(recipe.objective, before)
