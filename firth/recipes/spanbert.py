"""SpanBERT (Joshi 2020, arXiv:1907.10529): hide spans, guess each token from its own place and from the span's ends.

    firth train spanbert             four blocks of width 192 on Shakespeare, 500 steps, three minutes on two cores: held-out nats of
                                     hidden tokens from 6.48 (word frequencies) to 5.35, and from their span's ends to 5.92
    firth train spanbert:published   BERT-large: 340 M parameters; say data.path=FILES

What was measured of it is in docs/results/index.md. Single segments and no NSP, as in the paper.
"""

from __future__ import annotations

from firth.model import presets
from firth.model.config import encoder_config
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.span_boundary import SBO
from firth.recipes import sizes
from firth.runs.examples import ChunksConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def spanbert(size: str = "tiny") -> Recipe:
    """An encoder that learns spans and their ends: `firth train spanbert`."""
    return sizes.one_of("spanbert", size, {"tiny": _tiny(), "published": _published()})


def _objective(rate: float) -> Objective:
    return MLM(mlm_probability=rate, noise="geometric", whole_span_replacement=True) + SBO()


def _tiny() -> Recipe:
    return sizes.tiny(
        "spanbert", _objective(sizes.HIDDEN), ChunksConfig(max_length=128), encoder_config(sizes.VOCAB, sizes.WIDTH, sizes.DEPTH, max_positions=sizes.CONTEXT),
        steps=500, batch=BatchConfig(size=32, pack_to_length=128),
        samples=("The <mask> is good.", "I will <mask> you.", "What do you <mask> of it?"),
    )  # fmt: skip


def _published() -> Recipe:
    """Section 4.2: 2.4 M steps of 256 rows of at most 512 tokens, Adam at 1e-4 with 10,000 steps of warmup."""
    config = presets.PRESETS["spanbert"]
    return Recipe(
        name="spanbert", objective=_objective(0.15), examples=ChunksConfig(max_length=512), model=config,
        tokenizer=TokenizerConfig(algorithm="wordpiece", vocab_size=config.vocab_size), batch=BatchConfig(size=256),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.1, beta2=0.999, eps=1e-8),
        schedule=Schedule("linear", warmup_ratio=10_000 / 2_400_000), budget=Budget(max_steps=2_400_000),
        evaluation=EvalConfig(every=10_000), checkpoint=CheckpointConfig(every=10_000),
    )  # fmt: skip
