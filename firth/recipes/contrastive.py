"""Representations of texts: the margin loss over neighbours and strangers, and SimCSE (Gao 2021).

    firth train contrastive        pairs of Shakespeare, from random weights: 300 steps, 92 s on two cores; the neighbour of a held-out
                                   piece is nearer than a stranger in 70% (64% untrained), beyond the margin in 63% (50%)
    firth train contrastive:published init_from=BERT_BASE data.path=mine/sentences.txt data.split_by=line
    firth train contrastive:published init_from=RUN_OF_AN_ENCODER data.path=mine/sentences.txt data.split_by=line

The published size says BERT-Base's shape, for a run without a start; a start brings its own.

What was measured of them is in docs/results/index.md.
"""

from __future__ import annotations

from firth.model.config import encoder_config
from firth.model.presets import PRESETS
from firth.objectives.contrastive import Contrastive, InfoNCE
from firth.recipes import sizes
from firth.runs.examples import ChunksConfig, SegmentPairsConfig
from firth.runs.recipe import BatchConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def contrastive(size: str = "tiny") -> Recipe:
    """Neighbouring pieces of a text near each other, strangers apart: `firth train contrastive`.

    The published size is unsupervised SimCSE on BERT-Base: 10^6 sentences once, 64 a step, two dropout views.
    """
    tiny = sizes.tiny(
        "contrastive",
        Contrastive(),
        SegmentPairsConfig(max_length=64),
        encoder_config(sizes.VOCAB, sizes.WIDTH, sizes.DEPTH, max_positions=sizes.CONTEXT),
        steps=300,
        batch=BatchConfig(size=32),
        optimizer=OptimizerConfig(lr=1e-3),
    )
    published = Recipe(
        name="contrastive",
        objective=InfoNCE(position="first"),
        examples=ChunksConfig(max_length=32),
        tokenizer=TokenizerConfig(algorithm="wordpiece", vocab_size=30522),
        model=PRESETS["bert-base"],
        batch=BatchConfig(size=64),
        optimizer=OptimizerConfig(name="adamw", lr=3e-5, weight_decay=0.0, beta2=0.999),
        schedule=Schedule("linear"),
        budget=Budget(max_steps=15_625),
    )
    return sizes.one_of("contrastive", size, {"tiny": tiny, "published": published})
