"""Encoder-decoders and prefix language models: T5, BART, prefix LM, salient spans for closed-book answers, and a text VAE.

Losses are held-out nats per predicted token, at the start (label frequencies) and at the end, of one seed on an older CPU
(docs/results/tiny-recipes.md). A published size has no data: set `data.path`.
"""

from __future__ import annotations

from dataclasses import replace

from firth.data.dialogues import Seq2SeqConfig
from firth.data.examples import DataConfig
from firth.data.windows import ChunksConfig
from firth.model import presets
from firth.model.config import (
    decoder_config,
    encoder_decoder_config,
)
from firth.objectives.causal_lm import PrefixLM
from firth.objectives.seq2seq import Denoising, SpanCorruption
from firth.objectives.sft import Seq2SeqSFT
from firth.objectives.vae import VAE
from firth.recipes.common import (
    HIDDEN_SIZE,
    MAX_POSITIONS,
    NARROW_HEADS,
    NARROW_HIDDEN_SIZE,
    NARROW_VOCAB_SIZE,
    NUM_LAYERS,
    VOCAB_SIZE,
    recipe_of_size,
    tiny_recipe,
)
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule


def t5(size: str = "tiny") -> Recipe:
    """Return T5: span corruption (Raffel 2020, section 3.1.4); published is the 11 B model.

        firth train t5                   dropped words 1.56 nats below their frequencies in 1,600 steps (Zen 4, shared: 5 minutes)
        firth train t5:small             17 M parameters
        firth train t5:published data.path=C4

    Published: 128 sequences of 512 tokens, 2**19 steps. The paper trains with Adafactor at 0.01 and the inverse square root of
    the step; here AdamW at 1e-4 with a cosine replaces it, as in T5's successors.
    """
    # The relative biases must grow to several units, and the untied head begins near zero.
    ours = OptimizerConfig(scalar_lr=3e-2)
    small = Recipe(
        name="t5",
        objective=SpanCorruption(),
        examples=ChunksConfig(max_length=256, add_special_tokens=False),
        data=DataConfig(corpus="shakespeare"),
        model=encoder_decoder_config(vocab_size=8192, hidden_size=384, num_layers=4, max_positions=512),
        batch=BatchConfig(size=16),
        optimizer=ours,
        schedule=Schedule("wsd"),
        budget=Budget(max_steps=1000),
        evaluation=EvalConfig(every=100, max_examples=256),
        checkpoint=CheckpointConfig(every=200),
    )
    body = encoder_decoder_config(
        NARROW_VOCAB_SIZE, NARROW_HIDDEN_SIZE, NUM_LAYERS // 2, num_heads=NARROW_HEADS, max_positions=MAX_POSITIONS
    )
    sizes = {
        name: Recipe(
            name="t5",
            objective=SpanCorruption(),
            examples=ChunksConfig(max_length=512, add_special_tokens=False),
            model=presets.PRESETS[shape],
            tokenizer=TokenizerConfig(algorithm="unigram", vocab_size=32100),
            batch=BatchConfig(size=128),
            optimizer=OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.0, beta2=0.999),
            schedule=Schedule("cosine", warmup_ratio=10_000 / 2**19),
            budget=Budget(max_steps=2**19),
            evaluation=EvalConfig(every=1000),
            checkpoint=CheckpointConfig(every=1000),
        )
        for name, shape in (("base", "t5-base"), ("large", "t5-large"), ("3b", "t5-3b"), ("published", "t5-11b"))
    }
    # In a row of 128 tokens the decoder does not find its sentinel among the others, and learns frequencies only.
    plan = tiny_recipe(
        "t5",
        SpanCorruption(),
        ChunksConfig(max_length=32, add_special_tokens=False),
        body,
        steps=1600,
        batch=BatchConfig(size=64),
        optimizer=ours,
    )
    return recipe_of_size("t5", size, {"tiny": plan, "small": small} | sizes)


def bart(size: str = "tiny") -> Recipe:
    """Return BART: reconstruct a text from a corrupted one (Lewis 2019, section 5.1).

        firth train bart                 6.33 to 4.29 in 600 steps, 166 s
        firth train bart objective.noises=[deletion]
        firth train bart:published data.path=BOOKS_NEWS_AND_STORIES

    Sentences are permuted, then 30% of the tokens are replaced in spans by one mask each. The second command uses one kind of
    noise alone, as in the paper's table 1. Published (large): 12 layers on each side, 8,000 sequences, 500,000 steps, GPT-2's
    byte-level BPE. The paper turns dropout off for the last tenth of the steps (here it stays on) and states no learning rate;
    RoBERTa's is used, whose batches it takes.
    """
    paper = {
        name: Recipe(
            name="bart",
            objective=Denoising(),
            examples=ChunksConfig(max_length=512, add_special_tokens=False),
            model=presets.PRESETS[shape],
            tokenizer=TokenizerConfig(vocab_size=50265),
            batch=BatchConfig(size=8000, pack_to_length=512),
            optimizer=OptimizerConfig(
                name="adamw", lr=4e-4, weight_decay=0.01, beta2=0.98, eps=1e-6, max_grad_norm=0.0
            ),
            schedule=Schedule("linear", warmup_ratio=0.06),
            budget=Budget(max_steps=500_000),
            evaluation=EvalConfig(every=1000),
            checkpoint=CheckpointConfig(every=1000),
        )
        for name, shape in (("base", "bart-base"), ("published", "bart-large"))
    }
    # Half of the blocks on each side: as many parameters as the other tiny bodies.
    body = encoder_decoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS // 2, max_positions=MAX_POSITIONS)
    # The relative biases must grow to several units, and the untied head begins near zero.
    ours = OptimizerConfig(scalar_lr=3e-2)
    plan = tiny_recipe(
        "bart",
        Denoising(),
        ChunksConfig(max_length=128, add_special_tokens=False),
        body,
        steps=600,
        batch=BatchConfig(size=16),
        optimizer=ours,
    )
    return recipe_of_size("bart", size, {"tiny": plan} | paper)


def prefix_lm(size: str = "tiny") -> Recipe:
    """Return a prefix LM: a decoder that attends to a prefix of any length in both directions (Raffel 2020, section 3.2).

        firth train prefix_lm            6.33 to 4.35 in 800 steps, 161 s
        firth train prefix_lm:halves     the first half to an encoder, the second from a decoder
        firth train prefix_lm:published data.path=C4

    Published: T5-base's layers, 128 sequences of 512 tokens, 2**19 steps; AdamW replaces Adafactor (see `t5`).
    """
    examples = ChunksConfig(max_length=128, add_special_tokens=False, min_length=2)
    paper = Recipe(
        name="prefix_lm",
        objective=PrefixLM(),
        examples=replace(examples, max_length=512),
        model=presets.PRESETS["t5-base"].with_fields({"encoder.num_layers": 0, "causal": False}),
        tokenizer=TokenizerConfig(algorithm="unigram", vocab_size=32100),
        batch=BatchConfig(size=128),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.0, beta2=0.999),
        schedule=Schedule("cosine", warmup_ratio=10_000 / 2**19),
        budget=Budget(max_steps=2**19),
        evaluation=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )
    # What reads both ways is no causal decoder to others: only firth loads it.
    body = replace(decoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS), causal=False)
    sides = encoder_decoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS // 2, max_positions=MAX_POSITIONS)
    halves = PrefixLM(min_prefix=0.5, max_prefix=0.5, layout="seq2seq")
    return recipe_of_size(
        "prefix_lm",
        size,
        {
            "tiny": tiny_recipe(
                "prefix_lm",
                PrefixLM(),
                examples,
                body,
                steps=800,
                batch=BatchConfig(size=16),
                optimizer=OptimizerConfig(embedding_lr=0.3),
            ),
            "halves": tiny_recipe(
                "prefix_lm",
                halves,
                examples,
                sides,
                steps=800,
                batch=BatchConfig(size=16),
                optimizer=OptimizerConfig(scalar_lr=3e-2),
            ),
            "published": paper,
        },
    )


def closed_book(size: str = "tiny") -> Recipe:
    """Return span corruption of names, dates and numbers, to answer from memory (Guu 2020, section 3.4; Roberts 2020, section 3).

        firth train closed_book          1,100 glosses of places, 3,000 steps, 138 s: training loss 4.60 to 0.34

    `objective.noise=spans` masks any tokens, the baseline of both papers; `data.corpus=people` has names and dates. The papers
    continue T5 (set `init_from`) for 100,000 steps of 196,608 tokens at 0.001 on sentences of Wikipedia with Adafactor; AdamW
    here.
    """
    objective, examples = SpanCorruption(noise="salient"), ChunksConfig(max_length=128, add_special_tokens=False)
    paper = Recipe(
        name="closed_book",
        objective=objective,
        examples=replace(examples, max_length=512),
        model=presets.PRESETS["t5-11b"],
        tokenizer=TokenizerConfig(algorithm="unigram", vocab_size=32100),
        batch=BatchConfig(size=384),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.0, beta2=0.999),
        schedule=Schedule("constant", warmup_ratio=0.01),
        budget=Budget(max_steps=100_000),
        evaluation=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )
    # Nearly every name is one token of 8,192, and the body is small: each gloss is read some eighty times in two minutes.
    body = encoder_decoder_config(8192, 128, 1, max_positions=MAX_POSITIONS)
    plan = tiny_recipe(
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
    return recipe_of_size(
        "closed_book",
        size,
        {
            "tiny": replace(plan, data=book, tokenizer=coder),
            "published": paper,
        },
    )


def closed_book_questions() -> Recipe:
    """Return finetuning on questions about a part of what `closed_book` read; test.jsonl has the others.

        firth train closed_book_questions init_from=runs/closed_book

        firth evaluate runs/closed_book_questions "$(firth fetch places | tail -1)/test.jsonl" --task generation

    38% of the questions about three quarters of the places are then answered exactly, and 12% of the others (three seeds).
    """
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


def vae(size: str = "tiny") -> Recipe:
    """Return a text VAE: sentences through a Gaussian latent, with KL annealing and word dropout (Bowman 2016).

        firth train vae                  ELBO -6.30 to -4.90 nats per token in 600 steps, 127 s; the latent carries 0.9 nats per text

    The samples are texts from the prior and texts between two others. The report says how many nats the latent carries and
    whether the posterior has collapsed. Published has Bowman's numbers where a Transformer has a place for them (13 latent
    dimensions, 62.5% of the words kept, 20,000 words); his networks are one-layer LSTMs.
    """
    samples = ("<prior>", "I will go with you. <to> What is the matter?")
    body = encoder_decoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS // 2, max_positions=MAX_POSITIONS)
    tiny = tiny_recipe(
        "vae",
        VAE(latent_size=32, kl_anneal_steps=300, word_dropout=0.4),
        ChunksConfig(max_length=32, add_special_tokens=False),
        body.with_fields({"encoder.latent_size": 32}),
        steps=600,
        batch=BatchConfig(size=64),
        optimizer=OptimizerConfig(scalar_lr=1e-2),
        samples=samples,
    )
    published = Recipe(
        name="vae",
        objective=VAE(latent_size=13, kl_anneal_steps=10_000, word_dropout=0.375),
        examples=ChunksConfig(max_length=64, add_special_tokens=False),
        tokenizer=TokenizerConfig(vocab_size=20_000),
        model=encoder_decoder_config(20_000, 512, 2, max_positions=64).with_fields({"encoder.latent_size": 13}),
        batch=BatchConfig(size=32),
        optimizer=OptimizerConfig(),
        schedule=Schedule("wsd"),
        budget=Budget(max_steps=100_000),
        sample_prompts=samples,
    )
    return recipe_of_size("vae", size, {"tiny": tiny, "published": published})
