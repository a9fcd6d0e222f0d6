"""Prefix language models: the first part read both ways, the rest written.

firth train prefix_lm                 tiny: Shakespeare, 800 steps, 161 s on two cores: held-out nats a token of the rest from 6.33
                                      (word frequencies) to 4.35
firth train prefix_lm:halves          the first half to an encoder, the second from a decoder
firth train prefix_lm:published data.path=C4
"""

from __future__ import annotations

from dataclasses import replace

from firth.model import presets
from firth.model.config import decoder_config, encoder_decoder_config
from firth.objectives.prefix_lm import PrefixLM
from firth.recipes.sizes import CONTEXT, DEPTH, VOCAB, WIDTH, one_of, tiny
from firth.runs.examples import ChunksConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def prefix_lm(size: str = "tiny") -> Recipe:
    """A decoder that reads a prefix of any length both ways (Raffel 2020, section 3.2, "prefix LM": T5's body, one side).

    The paper: 128 rows of 512 tokens, 2**19 steps with Adafactor, for which AdamW stands here (see `t5`).
    """
    examples = ChunksConfig(max_length=128, add_special_tokens=False, min_length=2)
    paper = Recipe(
        name="prefix_lm", objective=PrefixLM(), examples=replace(examples, max_length=512),
        model=replace(presets.PRESETS["t5-base"], num_encoder_layers=0, causal=False),
        tokenizer=TokenizerConfig(algorithm="unigram", vocab_size=32100), batch=BatchConfig(size=128),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.0, beta2=0.999),
        schedule=Schedule("cosine", warmup_ratio=10_000 / 2**19), budget=Budget(max_steps=2**19), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
    )  # fmt: skip
    # What reads both ways is no causal decoder to others: only firth loads it.
    body = replace(decoder_config(VOCAB, WIDTH, DEPTH, max_positions=CONTEXT), causal=False)
    sides = encoder_decoder_config(VOCAB, WIDTH, DEPTH // 2, max_positions=CONTEXT)
    halves = PrefixLM(min_prefix=0.5, max_prefix=0.5, layout="seq2seq")
    return one_of("prefix_lm", size, {
        "tiny": tiny(
            "prefix_lm", PrefixLM(), examples, body, steps=800, batch=BatchConfig(size=16),
            optimizer=OptimizerConfig(embedding_lr=0.3),
        ),
        "halves": tiny(
            "prefix_lm", halves, examples, sides, steps=800, batch=BatchConfig(size=16), optimizer=OptimizerConfig(scalar_lr=3e-2)
        ),
        "published": paper,
    })  # fmt: skip
