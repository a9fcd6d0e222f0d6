"""Linformer (Wang 2020): BERT's objective, keys and values mixed into k slots, so that length costs linearly.

    firth train linformer       masked tokens of Shakespeare, rows of 256 tokens in 64 slots: 400 steps, 138 s on two cores, held-out loss
                                from 6.40 (word frequencies) to 5.20
    firth train linformer:published data.path=mine/  the paper's: RoBERTa-Base, rows of 512 tokens, k = 256

What was measured of them is in docs/results/index.md; time and memory against full attention are in `bench/linformer.py`.
"""

from __future__ import annotations

from dataclasses import replace

from firth.model.config import encoder_config
from firth.model.presets import bert
from firth.objectives.masked_lm import MLM
from firth.recipes import sizes
from firth.runs.examples import ChunksConfig
from firth.runs.recipe import BatchConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def linformer(size: str = "tiny") -> Recipe:
    """An encoder whose attention is linear in the length of a row: `firth train linformer`. Rows are padded, not packed."""
    tiny = sizes.tiny(
        "linformer",
        MLM(mlm_probability=sizes.HIDDEN),
        ChunksConfig(max_length=sizes.CONTEXT),
        replace(encoder_config(sizes.VOCAB, sizes.WIDTH, sizes.DEPTH, max_positions=sizes.CONTEXT), linformer_k=64),
        steps=400,
        batch=BatchConfig(size=16),
        samples=("The <mask> is good.", "I will <mask> you."),
    )
    published = Recipe(
        name="linformer",
        objective=MLM(),
        examples=ChunksConfig(max_length=512),
        tokenizer=TokenizerConfig(vocab_size=50265),
        model=replace(bert(50265, 768, 12, 12, type_vocab_size=0), linformer_k=256),
        batch=BatchConfig(size=256),
        # The paper's 250,000 updates on BookCorpus and Wikipedia; rates and the rest are RoBERTa's.
        optimizer=OptimizerConfig(name="adamw", lr=6e-4, weight_decay=0.01, beta2=0.98, eps=1e-6),
        schedule=Schedule("linear", warmup_ratio=0.05),
        budget=Budget(max_steps=250_000),
    )  # fmt: skip
    return sizes.one_of("linformer", size, {"tiny": tiny, "published": published})
