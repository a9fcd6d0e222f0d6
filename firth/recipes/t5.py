"""The encoder-decoder that writes what was dropped: T5.

firth train t5                tiny: Shakespeare, 800 steps, 122 s on two cores: held-out nats a token of what was dropped from 5.70
                              (word frequencies) to 4.44
firth train t5:small          17 M parameters
firth train t5:published source.path=C4
"""

from __future__ import annotations

from firth.model import presets
from firth.model.config import encoder_decoder
from firth.objectives.span_corruption import SpanCorruption
from firth.recipes.sizes import CONTEXT, DEPTH, VOCAB, WIDTH, one_of, tiny
from firth.runs.examples import Pieces
from firth.runs.prepare import Text
from firth.runs.recipe import Batch, CheckpointConfig, EvalConfig, Recipe, TokenizerPlan
from firth.train.optimizer import Optimizer
from firth.train.schedule import Length, Schedule


def t5(size: str = "tiny") -> Recipe:
    """Span corruption (Raffel 2020, section 3.1.4): 128 rows of 512 tokens, 2**19 steps; published is the 11 B one.

    The paper trains with Adafactor at 0.01 and the inverse square root of the step. firth has AdamW and Muon: published
    takes AdamW at 1e-4 with a cosine in its place, as its successors did, so that recipe is the paper's in all but this.
    """
    # The relative biases must grow to several units, and the untied head begins near zero.
    ours = Optimizer(rest_rate=3e-2)
    small = Recipe(
        name="t5", objective=SpanCorruption(), segment=Pieces(length=256, frame=False), source=Text(corpus="shakespeare"),
        shape=encoder_decoder(vocab=8192, width=384, depth=4, context=512), batch=Batch(rows=16), optimizer=ours,
        schedule=Schedule("wsd"), length=Length(steps=1000), evaluation=EvalConfig(every=100, max_examples=256), checkpoint=CheckpointConfig(every=200),
    )  # fmt: skip
    # Half of the blocks on each side: as many parameters as the other tiny bodies.
    body = encoder_decoder(VOCAB, WIDTH, DEPTH // 2, context=CONTEXT)
    sizes = {
        name: Recipe(
            name="t5", objective=SpanCorruption(), segment=Pieces(length=512, frame=False), shape=presets.SHAPES[shape],
            tokenizer=TokenizerPlan(algorithm="unigram", size=32100), batch=Batch(rows=128),
            optimizer=Optimizer(name="adamw", rate=1e-4, weight_decay=0.0, beta2=0.999),
            schedule=Schedule("cosine", warmup=10_000 / 2**19), length=Length(steps=2**19), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
        )
        for name, shape in (("base", "t5-base"), ("large", "t5-large"), ("3b", "t5-3b"), ("published", "t5-11b"))
    }  # fmt: skip
    plan = tiny(
        "t5", SpanCorruption(), Pieces(length=128, frame=False), body, steps=800, batch=Batch(rows=16), optimizer=ours
    )
    return one_of("t5", size, {"tiny": plan, "small": small} | sizes)
