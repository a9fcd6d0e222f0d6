"""A closed book: facts are read, the names and dates in them hidden, and then asked for from memory.

firth train closed_book                                             tiny: 1,100 places of WordNet, 138 s on two cores: nats of what is
                                                                    hidden, in training, from 4.60 to 0.34
firth train closed_book_questions init_from=runs/closed_book            questions about three quarters of them: 38% are then answered
                                                                    exactly, and 12% of those about the others (three seeds)
firth evaluate runs/closed_book_questions "$(firth fetch places | tail -1)/test.jsonl" --task generation

`objective.noise=spans` in the first command hides any tokens: the comparison of Guu 2020 and Roberts 2020. The same with
data.corpus=people and people/train.jsonl asks who and when.
"""

from __future__ import annotations

from dataclasses import replace

from firth.model import presets
from firth.model.config import encoder_decoder_config
from firth.objectives.sft import Seq2SeqSFT
from firth.objectives.span_corruption import SpanCorruption
from firth.recipes.sizes import CONTEXT, one_of, tiny
from firth.runs.examples import ChunksConfig, Seq2SeqConfig
from firth.runs.prepare import DataConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def closed_book(size: str = "tiny") -> Recipe:
    """Span corruption that hides names, dates and numbers (Guu 2020, section 3.4; Roberts 2020, section 3).

    The paper goes on from T5's weights (give them as `start`) for 100,000 steps of 196,608 tokens at a rate of 0.001, on
    sentences of Wikipedia; its largest model is T5's largest. Adafactor there, AdamW here.
    """
    objective, examples = SpanCorruption(noise="salient"), ChunksConfig(max_length=128, add_special_tokens=False)
    paper = Recipe(
        name="closed_book", objective=objective, examples=replace(examples, max_length=512), model=presets.PRESETS["t5-11b"],
        tokenizer=TokenizerConfig(algorithm="unigram", vocab_size=32100), batch=BatchConfig(size=384),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.0, beta2=0.999),
        schedule=Schedule("constant", warmup_ratio=0.01), budget=Budget(max_steps=100_000), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
    )  # fmt: skip
    # Nearly every name is one token of 8,192, and the body is small: each gloss is read some eighty times in two minutes.
    body = encoder_decoder_config(8192, 128, 1, max_positions=CONTEXT)
    plan = tiny(
        "closed_book",
        objective,
        examples,
        body,
        steps=3000,
        batch=BatchConfig(size=32),
        optimizer=OptimizerConfig(scalar_lr=3e-2),
    )
    # All of it is read: what is held out cannot be known.
    book, coder = (
        DataConfig(corpus="places", validation_fraction=0.0),
        TokenizerConfig(algorithm="bpe", vocab_size=8192),
    )
    return one_of("closed_book", size, {
        "tiny": replace(plan, data=book, tokenizer=coder), "published": paper,
    })  # fmt: skip


def closed_book_questions() -> Recipe:
    """Questions about a part of what was read; those of test.jsonl are about the rest."""
    return Recipe(
        name="closed_book_questions",
        objective=Seq2SeqSFT(),
        examples=Seq2SeqConfig(max_length=64, max_target_length=16),
        data=DataConfig(corpus="places/train.jsonl"),
        batch=BatchConfig(size=32),
        optimizer=OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.0),
        schedule=Schedule("linear", warmup_ratio=0.1),
        budget=Budget(max_steps=200),
        evaluation=EvalConfig(every=50, max_examples=200),
        checkpoint=CheckpointConfig(every=200),
    )
