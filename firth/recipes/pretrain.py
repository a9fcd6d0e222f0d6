"""Three families pretrained on running text, with firth's default shapes and optimizer.

    firth train gpt source.path=mine/         a decoder, next token
    firth train bert source.path=mine/        an encoder, masked tokens
    firth train t5 source.path=mine/          an encoder-decoder, corrupted spans

The shapes are the modern ones (`firth.model.shape`); what each run takes and reaches is in docs/results.md.
"""

from __future__ import annotations

from firth.model.shape import decoder, encoder, encoder_decoder
from firth.objectives.causal import CausalLM
from firth.objectives.mlm import MLM
from firth.objectives.span_corruption import SpanCorruption
from firth.recipes.material import Text
from firth.recipes.recipe import Batch, Checks, Recipe
from firth.recipes.segments import Pieces, Windows
from firth.train.optimizer import Optimizer
from firth.train.schedule import Length, Schedule

CHECKS = Checks(every=100, examples=256, save=200)


def gpt() -> Recipe:
    """A decoder of 17 M parameters on Shakespeare: `firth train gpt`."""
    return Recipe(
        name="gpt",
        objective=CausalLM(),
        segment=Windows(length=256),
        source=Text(corpus="shakespeare"),
        shape=decoder(vocab=8192, width=384, depth=6, context=512),
        batch=Batch(rows=8),
        # An untied table begins at unit variance, so its steps must be of another size than a matrix's.
        optimizer=Optimizer(embedding_rate=0.3),
        schedule=Schedule("wsd"),
        length=Length(steps=1200),
        samples=("The ", "I think that ", "What is "),
        checks=CHECKS,
    )


def bert() -> Recipe:
    """An encoder on Shakespeare: `firth train bert`."""
    return Recipe(
        name="bert",
        objective=MLM(),
        segment=Pieces(length=128),
        source=Text(corpus="shakespeare"),
        shape=encoder(vocab=8192, width=384, depth=6, context=512),
        batch=Batch(rows=32, pack=128),
        optimizer=Optimizer(),
        schedule=Schedule("wsd"),
        length=Length(steps=1000),
        checks=CHECKS,
        samples=("The <mask> is good.", "I will <mask> you.", "What do you <mask> of it?"),
    )


def t5() -> Recipe:
    """An encoder-decoder on Shakespeare: `firth train t5`."""
    return Recipe(
        name="t5",
        objective=SpanCorruption(),
        segment=Pieces(length=256, frame=False),
        source=Text(corpus="shakespeare"),
        shape=encoder_decoder(vocab=8192, width=384, depth=4, context=512),
        batch=Batch(rows=16),
        # The relative biases must grow to several units, and the untied head begins near zero (docs/results.md).
        optimizer=Optimizer(rest_rate=3e-2),
        schedule=Schedule("wsd"),
        length=Length(steps=1000),
        checks=CHECKS,
    )
