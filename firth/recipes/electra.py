"""ELECTRA (Clark 2020, arXiv:2003.10555): tell which tokens a small generator has put there.

    firth train electra             four blocks of width 192 on Shakespeare, 450 steps, 169 s on two cores: the
                                    generator's held-out loss from 6.29 to 5.10; 11% of what it replaced is told from the
                                    text, and 1% of the text taken for it
    firth train electra:published   ELECTRA-small: 14 M parameters, without the generator; say data.path=FILES
    firth train electra:base        ELECTRA-base: 110 M
    firth train electra objective.kind=adversarial_rtd      the generator paid for fooling the other (appendix F)

What was measured of it is in docs/results/index.md. What is saved is an ElectraForPreTraining (of the published shapes),
with the generator beside it.
"""

from __future__ import annotations

from dataclasses import replace

from firth.model import presets
from firth.model.config import ModelConfig, encoder_config
from firth.objectives.replaced_tokens import RTD
from firth.recipes import sizes
from firth.runs.examples import ChunksConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def electra(size: str = "tiny") -> Recipe:
    """An encoder that judges every token: `firth train electra`."""
    small = _published(
        RTD(generator_size=1 / 4), presets.PRESETS["electra-small"], length=128, rows=128, rate=5e-4, steps=1_000_000
    )
    base = _published(
        RTD(generator_size=1 / 3), presets.PRESETS["electra-base"], length=512, rows=256, rate=2e-4, steps=766_000
    )
    return sizes.one_of("electra", size, {"tiny": _tiny(), "published": small, "base": base})


def _tiny() -> Recipe:
    config = replace(
        encoder_config(sizes.VOCAB, sizes.WIDTH, sizes.DEPTH, max_positions=sizes.CONTEXT),
        embedding_size=sizes.WIDTH // 2,
    )
    # The paper's quarters would be a generator of width 48, which learns next to nothing in so short a run.
    return sizes.tiny(
        "electra",
        RTD(generator_size=1 / 2),
        ChunksConfig(max_length=128),
        config,
        steps=450,
        batch=BatchConfig(size=32, pack_to_length=128),
    )


def _published(objective: RTD, config: ModelConfig, *, length: int, rows: int, rate: float, steps: int) -> Recipe:
    """The paper's table 6: Adam, a warmup of 10,000 steps, a linear fall to zero."""
    return Recipe(
        name="electra", objective=objective, examples=ChunksConfig(max_length=length), model=config,
        tokenizer=TokenizerConfig(algorithm="wordpiece", vocab_size=config.vocab_size), batch=BatchConfig(size=rows),
        optimizer=OptimizerConfig(name="adamw", lr=rate, weight_decay=0.01, beta2=0.999, eps=1e-6),
        schedule=Schedule("linear", warmup_ratio=10_000 / steps), budget=Budget(max_steps=steps),
        evaluation=EvalConfig(every=10_000), checkpoint=CheckpointConfig(every=10_000),
    )  # fmt: skip
