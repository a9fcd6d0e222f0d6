"""What cannot be trained is refused when the recipe is read, in one sentence that names both and what would fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from firth import objectives
from firth.model.shape import decoder, encoder, encoder_decoder
from firth.objectives.causal import CausalLM
from firth.objectives.classification import Classification
from firth.objectives.mlm import MLM
from firth.objectives.nsp import NSP
from firth.objectives.span_corruption import SpanCorruption
from firth.recipes.fits import refuse_misfit
from firth.recipes.recipe import load
from firth.types import UserError

SHAPES = {
    "a causal decoder": decoder(vocab=10, width=64, depth=1),
    "an encoder": replace(encoder(vocab=10, width=64, depth=1), dropout=0.1),  # two views differ by it
    "an encoder-decoder": encoder_decoder(vocab=10, width=64, depth=1),
    "a Linformer": replace(encoder(vocab=10, width=64, depth=1), dropout=0.1, linformer=8),
    "a variational autoencoder": replace(encoder_decoder(vocab=10, width=64, depth=1), latent=32),
    "a left-to-right LSTM": load("lstm").shape,
    "an LSTM in two directions": replace(load("lstm").shape, causal=False, dropout=0.1),
    "an LSTM in two directions apart": replace(load("elmo").shape, dropout=0.1),
    "a table of word vectors": load("word2vec").shape,
}


def test_the_shapes_are_called_what_they_are() -> None:
    assert {noun: shape.noun for noun, shape in SHAPES.items()} == {noun: noun for noun in SHAPES}


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
@pytest.mark.parametrize("noun", SHAPES)
def test_a_misfit_is_refused_and_nothing_else(name: str, noun: str) -> None:
    objective, shape = objectives.find(name)(), SHAPES[noun]
    if objective.reads() in shape.honours:
        refuse_misfit(objective, shape)
        return
    with pytest.raises(UserError) as refusal:
        refuse_misfit(objective, shape)
    said = str(refusal.value)
    assert f"objective {name} " in said and noun in said
    offered = said.rpartition("serves: ")[2].split(", ")
    assert offered and name not in offered
    for other in offered:
        refuse_misfit(objectives.find(other)(), shape)


def test_every_objective_has_a_shape_that_serves_it() -> None:
    for name in objectives.OBJECTIVES:
        assert any(objectives.find(name)().reads() in shape.honours for shape in SHAPES.values()), name


def test_a_sum_is_refused_for_its_demanding_addend() -> None:
    with pytest.raises(UserError, match="objective nsp reads a text from both sides"):
        refuse_misfit(NSP() + MLM(), SHAPES["a causal decoder"])
    with pytest.raises(UserError, match="in different ways"):
        CausalLM() + NSP()


def test_settings_decide_what_an_objective_needs() -> None:
    refuse_misfit(SpanCorruption(layout="prefix"), SHAPES["an encoder"])
    with pytest.raises(UserError, match="source"):
        refuse_misfit(SpanCorruption(), SHAPES["an encoder"])
    refuse_misfit(Classification(at="last"), SHAPES["a causal decoder"])
    with pytest.raises(UserError, match="both sides"):
        refuse_misfit(Classification(at="first"), SHAPES["a causal decoder"])


def test_it_happens_when_the_recipe_is_read() -> None:
    with pytest.raises(UserError, match=r"objective mlm .* a causal decoder cannot: set shape\.causal=false"):
        load("gpt", ["objective=mlm"])
    assert load("gpt", ["objective=mlm", "shape.causal=false"]).shape == replace(load("gpt").shape, causal=False)
