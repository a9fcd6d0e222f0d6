"""Build the model of a run: architecture, weights of the start model, adapters."""

from __future__ import annotations

from dataclasses import dataclass

from firth.generate import embeddings
from firth.model.model import LM, compile_blocks
from firth.pretrained.load_save import init_from_model
from firth.runs.prepare import RunData
from firth.runs.recipe import ResolvedRecipe
from firth.runs.start_model import model_directory
from firth.training.device import default_device
from firth.types import LogLine


@dataclass(frozen=True, eq=False)
class BuiltModel:
    """The model of a run.

    Args:
        model: The model, on the training device.
        added_heads: Names of the heads that the start model does not have.
    """

    model: LM
    added_heads: list[str]


def assemble_model(resolved: ResolvedRecipe, data: RunData, log: LogLine) -> BuiltModel:
    """Build the model on the training device, with the weights of the start model and the adapters of `peft`."""
    tokenizer = data.tokenizer
    model = LM(resolved.model, resolved.objective.heads(resolved.model))
    added: list[str] = []
    base = data.start.model
    if base is not None:
        dropped, added = init_from_model(model, base, model_directory(resolved.init_from))
        changed = [f"{what} {', '.join(names)}" for what, names in (("drops", dropped), ("adds", added)) if names]
        log(f"{resolved.name} starts from {resolved.init_from}" + (f": {'; '.join(changed)}" if changed else ""))
    else:
        model.set_token_characters([tokenizer.token(i) for i in range(tokenizer.vocab.size)])
    if resolved.init_embeddings_from:
        loaded = embeddings.load_embeddings(model, model_directory(resolved.init_embeddings_from))
        log(f"{resolved.name} takes {loaded}; everything else is initialized at random")
    model.restrict_vocab(tokenizer.vocab)
    resolved.peft.apply(model, added, tokenizer, resolved.seed)
    for stack in model.stacks():
        stack.gradient_checkpointing = resolved.gradient_checkpointing
    device = default_device()
    if next(model.parameters()).device.type != device.type:
        model.to(device)
    if resolved.compile:
        compile_blocks(model)
    return BuiltModel(model, added)
