"""ALBERT (Lan 2020, arXiv:1909.11942): one block for all layers, narrow tables, and the order of two sentences.

    firth train albert             one block of width 192 passed four times, on Shakespeare: 134 s on two cores, held-out nats of
                                   hidden tokens from 6.56 (word frequencies) to 5.15; the order of sentences is not learnt (0.60,
                                   untrained 0.59)
    firth train albert:published   ALBERT-base: 12 M parameters; say data.path=FILES

What was measured of it is in docs/results/index.md. Masks are n-grams of up to three whole words (section 4.1).
"""

from __future__ import annotations

from dataclasses import replace

from firth.model import presets
from firth.model.config import encoder_config
from firth.objectives.masked_lm import MLM
from firth.objectives.sentence_order import SOP
from firth.recipes import sizes
from firth.runs.examples import SegmentPairsConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def albert(size: str = "tiny") -> Recipe:
    """An encoder with one block: `firth train albert`."""
    return sizes.one_of("albert", size, {"tiny": _tiny(), "published": _published()})


def _tiny() -> Recipe:
    modern = encoder_config(sizes.VOCAB, sizes.WIDTH, sizes.DEPTH, max_positions=sizes.CONTEXT)
    config = replace(
        modern, embedding_size=sizes.WIDTH // 3, num_layer_groups=1, first_attention_norm=True, type_vocab_size=2
    )
    return sizes.tiny(
        "albert", SOP() + MLM(mlm_probability=sizes.HIDDEN, noise="ngrams"), SegmentPairsConfig(max_length=128), config, steps=500, batch=BatchConfig(size=32, pack_to_length=128),
        samples=("The <mask> is good.", "I will <mask> you.", "What do you <mask> of it?"),
    )  # fmt: skip


def _published() -> Recipe:
    """Section 4.1: 125,000 steps of 4,096 pairs of 512 tokens, LAMB at 1.76e-3. There is no LAMB here: AdamW stands for it,
    at a rate that this batch has been trained with elsewhere (RoBERTa's large batches)."""
    config = presets.PRESETS["albert-base"]
    return Recipe(
        name="albert", objective=SOP() + MLM(noise="ngrams"), examples=SegmentPairsConfig(max_length=512), model=config,
        tokenizer=TokenizerConfig(algorithm="unigram", vocab_size=config.vocab_size), batch=BatchConfig(size=4096, gradient_accumulation_steps=64),
        optimizer=OptimizerConfig(name="adamw", lr=7e-4, weight_decay=0.01, beta2=0.98, eps=1e-6),
        schedule=Schedule("linear", warmup_ratio=3125 / 125_000), budget=Budget(max_steps=125_000),
        evaluation=EvalConfig(every=5000), checkpoint=CheckpointConfig(every=5000),
    )  # fmt: skip
