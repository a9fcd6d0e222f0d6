"""The encoder-decoder that writes what was dropped: T5.

firth train t5                tiny: Shakespeare, 800 steps, 122 s on two cores: held-out nats a token of what was dropped from 5.70
                              (word frequencies) to 4.44
firth train t5:small          17 M parameters
firth train t5:published data.path=C4
"""

from __future__ import annotations

from firth.model import presets
from firth.model.config import encoder_decoder_config
from firth.objectives.span_corruption import SpanCorruption
from firth.recipes.sizes import CONTEXT, DEPTH, VOCAB, WIDTH, one_of, tiny
from firth.runs.examples import ChunksConfig
from firth.runs.prepare import DataConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def t5(size: str = "tiny") -> Recipe:
    """Span corruption (Raffel 2020, section 3.1.4): 128 rows of 512 tokens, 2**19 steps; published is the 11 B one.

    The paper trains with Adafactor at 0.01 and the inverse square root of the step. firth has AdamW and Muon: published
    takes AdamW at 1e-4 with a cosine in its place, as its successors did, so that recipe is the paper's in all but this.
    """
    # The relative biases must grow to several units, and the untied head begins near zero.
    ours = OptimizerConfig(scalar_lr=3e-2)
    small = Recipe(
        name="t5", objective=SpanCorruption(), examples=ChunksConfig(max_length=256, add_special_tokens=False), data=DataConfig(corpus="shakespeare"),
        model=encoder_decoder_config(vocab_size=8192, hidden_size=384, num_layers=4, max_positions=512), batch=BatchConfig(size=16), optimizer=ours,
        schedule=Schedule("wsd"), budget=Budget(max_steps=1000), evaluation=EvalConfig(every=100, max_examples=256), checkpoint=CheckpointConfig(every=200),
    )  # fmt: skip
    # Half of the blocks on each side: as many parameters as the other tiny bodies.
    body = encoder_decoder_config(VOCAB, WIDTH, DEPTH // 2, max_positions=CONTEXT)
    sizes = {
        name: Recipe(
            name="t5", objective=SpanCorruption(), examples=ChunksConfig(max_length=512, add_special_tokens=False), model=presets.PRESETS[shape],
            tokenizer=TokenizerConfig(algorithm="unigram", vocab_size=32100), batch=BatchConfig(size=128),
            optimizer=OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.0, beta2=0.999),
            schedule=Schedule("cosine", warmup_ratio=10_000 / 2**19), budget=Budget(max_steps=2**19), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
        )
        for name, shape in (("base", "t5-base"), ("large", "t5-large"), ("3b", "t5-3b"), ("published", "t5-11b"))
    }  # fmt: skip
    plan = tiny(
        "t5",
        SpanCorruption(),
        ChunksConfig(max_length=128, add_special_tokens=False),
        body,
        steps=800,
        batch=BatchConfig(size=16),
        optimizer=ours,
    )
    return one_of("t5", size, {"tiny": plan, "small": small} | sizes)
