"""Word vectors and recurrent language models: word2vec, LSTM, ELMo.

    firth vectors runs/word2vec king --out vectors.txt
    firth train lstm init_embeddings_from=runs/word2vec model.hidden_size=128
    firth train classification init_from=runs/lstm data.path=labeled.jsonl
    firth train token_features init_from=runs/elmo data.path=tagged.jsonl

Vectors are copied unchanged, so model.hidden_size must be theirs: 128 for the tiny word2vec. Numbers are of one seed on an older CPU
(docs/results/recurrent.md).
"""

from __future__ import annotations

from dataclasses import replace

from firth.data.examples import DataConfig
from firth.data.labeled import TaggedConfig
from firth.data.windows import WindowsConfig, WordWindowsConfig
from firth.model.config import ModelConfig, recurrent_config, word_vector_config
from firth.model.config_groups import (
    CharacterConfig,
    EmbeddingConfig,
    LMHeadConfig,
    NormConfig,
    PositionConfig,
    RNNConfig,
)
from firth.objectives.causal_lm import BiLM, CausalLM
from firth.objectives.token_tasks import LayerMixture, TokenClassification
from firth.objectives.word2vec import Word2Vec
from firth.recipes.common import (
    DATA,
    HIDDEN_SIZE,
    MAX_POSITIONS,
    VOCAB_SIZE,
    recipe_of_size,
    tiny_recipe,
)
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule

WORDS = TokenizerConfig(algorithm="word", vocab_size=20_000)
"""The tokenizer of whole words."""


def word2vec(size: str = "tiny") -> Recipe:
    """Return word2vec: skip-gram with negative sampling (Mikolov 2013).

        firth train word2vec             held-out loss per word (six pairs and their noise) 24.8 to 15.2, half a minute

    Published: 1.6 billion words, windows of 5, 300 dimensions for each of 692,000 words (Mikolov 2013b, section 3).
    """
    tiny = Recipe(
        name="word2vec",
        objective=Word2Vec(),
        examples=WordWindowsConfig(),
        data=DATA,
        tokenizer=WORDS,
        model=word_vector_config(WORDS.vocab_size, 128),
        batch=BatchConfig(size=16),
        optimizer=OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.0, beta2=0.99, max_grad_norm=0.0),
        schedule=Schedule("linear", warmup_ratio=0.02),
        budget=Budget(max_steps=1500),
        evaluation=EvalConfig(every=500, max_examples=256),
        checkpoint=CheckpointConfig(every=500),
        sample_prompts=("king", "good", "went", "blood"),
        precision="fp32",
    )
    published = replace(
        tiny, data=DataConfig(), tokenizer=TokenizerConfig(algorithm="word", vocab_size=692_000), model=word_vector_config(692_000, 300),
        examples=WordWindowsConfig(subsampling_threshold=1e-5), batch=BatchConfig(size=256), budget=Budget(max_steps=12_000),
        evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=2000),
    )  # fmt: skip
    return recipe_of_size("word2vec", size, {"tiny": tiny, "published": published})


def lstm(size: str = "tiny") -> Recipe:
    """Return an LSTM language model (Dai and Le 2015).

        firth train lstm                 2.93 to 2.05 bits per byte in 600 steps, 76 s

    Published: one layer of 1,024 cells over embeddings of 512 (section 4); here both have width 1,024.
    """
    tiny = tiny_recipe(
        "lstm", CausalLM(), WindowsConfig(max_length=128), recurrent_config(VOCAB_SIZE, 256, 2, max_positions=MAX_POSITIONS),
        steps=600, batch=BatchConfig(size=16), optimizer=OptimizerConfig(lr=6e-3), samples=("The ", "I think that ", "What is "),
    )  # fmt: skip
    published = replace(
        tiny,
        data=DataConfig(),
        tokenizer=TokenizerConfig(algorithm="word", vocab_size=30_000),
        sample_prompts=(),
        model=replace(recurrent_config(30_000, 1024, 1, max_positions=400), dropout=0.25),
        examples=WindowsConfig(max_length=400),
        batch=BatchConfig(size=128),
        budget=Budget(max_steps=100_000),
        evaluation=EvalConfig(every=2000),
        checkpoint=CheckpointConfig(every=2000),
    )
    return recipe_of_size("lstm", size, {"tiny": tiny, "published": published})


def elmo(size: str = "tiny") -> Recipe:
    """Return ELMo: two LSTM language models, forward and backward, over character CNNs (Peters 2018).

        firth train elmo                 nats per token: forward 8.32 to 5.19, backward 8.32 to 5.12, in 500 steps, 116 s

    Published (section 3.4): two layers of 4,096 cells with projections of 512, 2,048 filters over 50 bytes, a billion words for
    ten epochs, a softmax over whole words.
    """
    tiny = tiny_recipe(
        "elmo", BiLM(), WindowsConfig(max_length=64), elmo_config(VOCAB_SIZE, 2 * HIDDEN_SIZE, 2, characters=16, filters=256),
        steps=500, batch=BatchConfig(size=32), optimizer=OptimizerConfig(scalar_lr=1e-3),
    )  # fmt: skip
    published = replace(
        tiny, data=DataConfig(), tokenizer=TokenizerConfig(algorithm="word", vocab_size=100_000), examples=WindowsConfig(max_length=20),
        model=replace(elmo_config(100_000, 1024, 2, characters=50, filters=2048, hidden=4096), dropout=0.1, max_positions=400),
        optimizer=OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.0), batch=BatchConfig(size=384),
        budget=Budget(max_steps=1_000_000), evaluation=EvalConfig(every=5000), checkpoint=CheckpointConfig(every=5000),
    )  # fmt: skip
    return recipe_of_size("elmo", size, {"tiny": tiny, "published": published})


def elmo_config(vocab: int, width: int, depth: int, characters: int, filters: int, hidden: int = 0) -> ModelConfig:
    """Return ELMo's model config: two separate stacks over spelled words."""
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=depth,
        num_heads=1,
        intermediate_size=hidden,
        max_positions=MAX_POSITIONS,
        causal=False,
        norm=NormConfig(placement="post"),
        position=PositionConfig("none"),
        tie_embeddings=False,
        lm_head=LMHeadConfig(bias=True),
        rnn=RNNConfig("lstm", separate_directions=True, residual=True),
        embedding=EmbeddingConfig(characters=CharacterConfig(max_length=characters, num_filters=filters)),
    )


def token_features() -> Recipe:
    """Return token classification from a frozen pretrained model, by a learned mixture of its layers."""
    return Recipe(
        name="tag_features",
        objective=LayerMixture() + TokenClassification(),
        examples=TaggedConfig(max_length=128),
        batch=BatchConfig(size=32),
        optimizer=OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.0, beta2=0.98),
        schedule=Schedule("linear", warmup_ratio=0.1),
        budget=Budget(max_steps=300),
        evaluation=EvalConfig(max_examples=2000),
        checkpoint=CheckpointConfig(every=300),
    )
