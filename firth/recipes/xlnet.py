"""Encoders that predict in a random order: XLNet and MPNet.

    firth train xlnet             tiny: Shakespeare, loss of the tokens asked from 6.38 (word frequencies) to 4.65 in 500 steps,
                                  162 s on two cores
    firth train mpnet             the same from 6.34 to 4.35 in 600 steps, 149 s
    firth train xlnet:published source.path=BOOKS_WIKIPEDIA_AND_WEB

`firth fill` asks a trained MPNet as it asks BERT, and an XLNet by queries that nobody sees, as it was trained.
"""

from __future__ import annotations

from dataclasses import replace

from firth.model import presets
from firth.model.config import encoder
from firth.objectives.mpnet import MPNet
from firth.objectives.permuted_lm import PLM
from firth.recipes.bert import SAMPLES
from firth.recipes.sizes import CONTEXT, DEPTH, VOCAB, WIDTH, one_of, tiny
from firth.runs.examples import Pieces, Windows
from firth.runs.recipe import Batch, CheckpointConfig, EvalConfig, Recipe, TokenizerPlan
from firth.train.optimizer import Optimizer
from firth.train.schedule import Length, Schedule


def xlnet(size: str = "tiny") -> Recipe:
    """Permuted language modelling on XLNet's body, with the tokens before each row as its memory (Yang 2019).

    The paper (large, appendix A.4): 8,192 rows of 512 tokens, 500,000 steps, Adam at 4e-4 after 40,000 steps, a linear fall,
    a sixth of the tokens asked in spans of 1 to 5, a memory of 384 tokens, SentencePiece of 32,000. Its rows are two segments of
    256 tokens, [SEP] and [CLS] behind them; here each is one stretch of text, and the vectors for segments are not trained.
    The tiny size asks a third of the tokens, one by one: a short run learns from as much as it is asked.
    """
    paper = Recipe(
        name="xlnet", objective=PLM(noise="contexts"), segment=Windows(length=512), shape=presets.SHAPES["xlnet-large"],
        tokenizer=TokenizerPlan(algorithm="unigram", size=32000), batch=Batch(rows=8192), samples=SAMPLES,
        optimizer=Optimizer(name="adamw", rate=4e-4, weight_decay=0.01, beta2=0.999, eps=1e-6),
        schedule=Schedule("linear", warmup=0.08), length=Length(steps=500_000), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
    )  # fmt: skip
    body = replace(encoder(VOCAB, WIDTH, DEPTH, context=CONTEXT), position="xlnet", query=True, memory=128)
    return one_of("xlnet", size, {
        "tiny": tiny("xlnet", PLM(k=3), Windows(length=128), body, steps=500, batch=Batch(rows=16), samples=SAMPLES),
        "base": replace(paper, shape=presets.SHAPES["xlnet-base"]),
        "published": paper,
    })  # fmt: skip


def mpnet(size: str = "tiny") -> Recipe:
    """Masked and permuted language modelling, whole words (Song 2020).

    The paper (base, section 3.1 and appendix): 8,192 rows of 512 tokens, 500,000 steps, Adam at 6e-4 after 24,000 steps, a
    linear fall, 15% asked, BERT's vocabulary. The tiny size asks 30% and has rotary positions: with the paper's, which are
    learnt one by one, masked models too stay at word frequencies for the length of a short run (docs/results.md).
    """
    objective = MPNet(noise="words")
    paper = Recipe(
        name="mpnet", objective=objective, segment=Pieces(length=512), shape=presets.SHAPES["mpnet-base"],
        tokenizer=TokenizerPlan(algorithm="wordpiece", size=30527), batch=Batch(rows=8192), samples=SAMPLES,
        optimizer=Optimizer(name="adamw", rate=6e-4, weight_decay=0.01, beta2=0.98, eps=1e-6, clip=0.0),
        schedule=Schedule("linear", warmup=0.048), length=Length(steps=500_000), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
    )  # fmt: skip
    body = encoder(VOCAB, WIDTH, DEPTH, context=CONTEXT)
    return one_of("mpnet", size, {
        "tiny": tiny("mpnet", replace(objective, rate=0.3), Pieces(length=128), body, steps=600, batch=Batch(rows=16), samples=SAMPLES),
        "published": paper,
    })  # fmt: skip
