"""The encoder-decoder that mends a damaged text: BART.

firth train bart              tiny: Shakespeare, 600 steps, 166 s on two cores: held-out nats a token of the mended text from 6.33
                              (word frequencies) to 4.29
firth train bart objective.noises=[deletion]                                one damage alone, as in the paper's table 1
firth train bart:published data.path=BOOKS_NEWS_AND_STORIES
"""

from __future__ import annotations

from firth.model import presets
from firth.model.config import encoder_decoder_config
from firth.objectives.denoise import Denoising
from firth.recipes.sizes import CONTEXT, DEPTH, VOCAB, WIDTH, one_of, tiny
from firth.runs.examples import ChunksConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def bart(size: str = "tiny") -> Recipe:
    """Sentences shuffled, then 30% of the tokens in spans behind one mask each (Lewis 2019, section 5.1).

    The paper (large): 12 blocks a side, 8,000 rows, 500,000 steps, GPT-2's byte-level BPE, dropout off for the last tenth
    of the steps (here it stays on). It states no rates; published takes RoBERTa's, whose batches it says it uses.
    """
    paper = {
        name: Recipe(
            name="bart", objective=Denoising(), examples=ChunksConfig(max_length=512, add_special_tokens=False), model=presets.PRESETS[shape],
            tokenizer=TokenizerConfig(vocab_size=50265), batch=BatchConfig(size=8000, pack_to_length=512),
            optimizer=OptimizerConfig(name="adamw", lr=4e-4, weight_decay=0.01, beta2=0.98, eps=1e-6, max_grad_norm=0.0),
            schedule=Schedule("linear", warmup_ratio=0.06), budget=Budget(max_steps=500_000), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
        )
        for name, shape in (("base", "bart-base"), ("published", "bart-large"))
    }  # fmt: skip
    # Half of the blocks on each side: as many parameters as the other tiny bodies.
    body = encoder_decoder_config(VOCAB, WIDTH, DEPTH // 2, max_positions=CONTEXT)
    # The relative biases must grow to several units, and the untied head begins near zero.
    ours = OptimizerConfig(scalar_lr=3e-2)
    plan = tiny(
        "bart",
        Denoising(),
        ChunksConfig(max_length=128, add_special_tokens=False),
        body,
        steps=600,
        batch=BatchConfig(size=16),
        optimizer=ours,
    )
    return one_of("bart", size, {"tiny": plan} | paper)
