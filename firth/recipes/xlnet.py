"""Encoders that predict in a random order: XLNet and MPNet.

    firth train xlnet             tiny: Shakespeare, loss of the tokens asked from 6.38 (word frequencies) to 4.65 in 500 steps,
                                  162 s on two cores
    firth train mpnet             the same from 6.34 to 4.35 in 600 steps, 149 s
    firth train xlnet:published data.path=BOOKS_WIKIPEDIA_AND_WEB

`firth fill` asks a trained MPNet as it asks BERT, and an XLNet by queries that nobody sees, as it was trained.
"""

from __future__ import annotations

from dataclasses import replace

from firth.model import presets
from firth.model.config import encoder_config
from firth.objectives.mpnet import MPNet
from firth.objectives.permuted_lm import PLM
from firth.recipes.bert import SAMPLES
from firth.recipes.sizes import CONTEXT, DEPTH, VOCAB, WIDTH, one_of, tiny
from firth.runs.examples import ChunksConfig, WindowsConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def xlnet(size: str = "tiny") -> Recipe:
    """Permuted language modelling on XLNet's body, with the tokens before each row as its memory (Yang 2019).

    The paper (large, appendix A.4): 8,192 rows of 512 tokens, 500,000 steps, Adam at 4e-4 after 40,000 steps, a linear fall,
    a sixth of the tokens asked in spans of 1 to 5, a memory of 384 tokens, SentencePiece of 32,000. Its rows are two segments of
    256 tokens, [SEP] and [CLS] behind them; here each is one stretch of text, and the vectors for segments are not trained.
    The tiny size asks a third of the tokens, one by one: a short run learns from as much as it is asked.
    """
    paper = Recipe(
        name="xlnet", objective=PLM(noise="contexts"), examples=WindowsConfig(max_length=512), model=presets.PRESETS["xlnet-large"],
        tokenizer=TokenizerConfig(algorithm="unigram", vocab_size=32000), batch=BatchConfig(size=8192), sample_prompts=SAMPLES,
        optimizer=OptimizerConfig(name="adamw", lr=4e-4, weight_decay=0.01, beta2=0.999, eps=1e-6),
        schedule=Schedule("linear", warmup_ratio=0.08), budget=Budget(max_steps=500_000), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
    )  # fmt: skip
    body = replace(
        encoder_config(VOCAB, WIDTH, DEPTH, max_positions=CONTEXT),
        position="xlnet",
        mask_embedding=True,
        memory_length=128,
    )
    return one_of("xlnet", size, {
        "tiny": tiny("xlnet", PLM(k=3), WindowsConfig(max_length=128), body, steps=500, batch=BatchConfig(size=16), samples=SAMPLES),
        "base": replace(paper, model=presets.PRESETS["xlnet-base"]),
        "published": paper,
    })  # fmt: skip


def mpnet(size: str = "tiny") -> Recipe:
    """Masked and permuted language modelling, whole words (Song 2020).

    The paper (base, section 3.1 and appendix): 8,192 rows of 512 tokens, 500,000 steps, Adam at 6e-4 after 24,000 steps, a
    linear fall, 15% asked, BERT's vocabulary. The tiny size asks 30% and has rotary positions: with the paper's, which are
    learnt one by one, masked models too stay at word frequencies for the length of a short run (docs/results/index.md).
    """
    objective = MPNet(noise="words")
    paper = Recipe(
        name="mpnet", objective=objective, examples=ChunksConfig(max_length=512), model=presets.PRESETS["mpnet-base"],
        tokenizer=TokenizerConfig(algorithm="wordpiece", vocab_size=30527), batch=BatchConfig(size=8192), sample_prompts=SAMPLES,
        optimizer=OptimizerConfig(name="adamw", lr=6e-4, weight_decay=0.01, beta2=0.98, eps=1e-6, max_grad_norm=0.0),
        schedule=Schedule("linear", warmup_ratio=0.048), budget=Budget(max_steps=500_000), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
    )  # fmt: skip
    body = encoder_config(VOCAB, WIDTH, DEPTH, max_positions=CONTEXT)
    return one_of("mpnet", size, {
        "tiny": tiny("mpnet", replace(objective, mlm_probability=0.3), ChunksConfig(max_length=128), body, steps=600, batch=BatchConfig(size=16), samples=SAMPLES),
        "published": paper,
    })  # fmt: skip
