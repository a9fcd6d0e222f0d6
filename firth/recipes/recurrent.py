"""The ancestors: word vectors and recurrent language models.

    firth train word2vec        skip-gram with negative sampling (Mikolov 2013), W1: half a minute on two cores, held-out loss a
                                word (six pairs and their noise) from 24.8 to 15.2
    firth train lstm            an LSTM language model (Dai and Le 2015), W2: 76 s, from 2.93 bits a byte (word frequencies) to 2.05
    firth train elmo            two LSTMs that spell their words (Peters 2018), W4: 116 s, nats a token forwards from 8.32 to 5.19,
                                backwards from 8.32 to 5.12

and what is done with them:

    firth vectors runs/word2vec king --out vectors.txt
    firth train lstm init_embeddings_from=runs/word2vec model.hidden_size=128                     its vectors, all else at random
    firth train classification init_from=runs/lstm data.path=labelled.jsonl
    firth train token_features init_from=runs/elmo data.path=tagged.jsonl             frozen, a mixture of its layers

Vectors are taken over as they are, so model.hidden_size must be theirs: 128 of the tiny word2vec. The text is
Shakespeare's plays unless `data.path` says another; one seed (docs/results/index.md).
"""

from __future__ import annotations

from dataclasses import replace

from firth.model.config import ModelConfig, recurrent_config, word_vector_config
from firth.objectives.bilm import BiLM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.layer_mixture import LayerMixture
from firth.objectives.token_classification import TokenClassification
from firth.objectives.word2vec import Word2Vec
from firth.recipes import sizes
from firth.runs.examples import WindowsConfig, WordWindowsConfig
from firth.runs.labeled_examples import TaggedConfig
from firth.runs.prepare import DataConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule

WORDS = TokenizerConfig(algorithm="word", vocab_size=20_000)


def word2vec(size: str = "tiny") -> Recipe:
    """A vector for each word, from the company it keeps: `firth train word2vec`. What was measured: docs/results/index.md.

    published: 1.6 billion words, windows of 5, 300 numbers for each of 692,000 words (Mikolov 2013b, section 3).
    """
    tiny = Recipe(
        name="word2vec", objective=Word2Vec(), examples=WordWindowsConfig(), data=sizes.TEXT, tokenizer=WORDS,
        model=word_vector_config(WORDS.vocab_size, 128), batch=BatchConfig(size=16),
        optimizer=OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.0, beta2=0.99, max_grad_norm=0.0),
        schedule=Schedule("linear", warmup_ratio=0.02), budget=Budget(max_steps=1500),
        evaluation=EvalConfig(every=500, max_examples=256), checkpoint=CheckpointConfig(every=500), sample_prompts=("king", "good", "went", "blood"),
        precision="fp32",
    )  # fmt: skip
    published = replace(
        tiny, data=DataConfig(), tokenizer=TokenizerConfig(algorithm="word", vocab_size=692_000), model=word_vector_config(692_000, 300),
        examples=WordWindowsConfig(subsampling_threshold=1e-5), batch=BatchConfig(size=256), budget=Budget(max_steps=12_000),
        evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=2000),
    )  # fmt: skip
    return sizes.one_of("word2vec", size, {"tiny": tiny, "published": published})


def lstm(size: str = "tiny") -> Recipe:
    """A language model with an LSTM where others have attention: `firth train lstm`. What was measured: docs/results/index.md.

    published: one layer of 1,024 cells over embeddings of 512 (Dai and Le 2015, section 4). Here its width is 1,024 both.
    """
    tiny = sizes.tiny(
        "lstm", CausalLM(), WindowsConfig(max_length=128), recurrent_config(sizes.VOCAB, 256, 2, max_positions=sizes.CONTEXT),
        steps=600, batch=BatchConfig(size=16), optimizer=OptimizerConfig(lr=6e-3), samples=("The ", "I think that ", "What is "),
    )  # fmt: skip
    published = replace(
        tiny, data=DataConfig(), tokenizer=TokenizerConfig(algorithm="word", vocab_size=30_000), sample_prompts=(),
        model=replace(recurrent_config(30_000, 1024, 1, max_positions=400), dropout=0.25), examples=WindowsConfig(max_length=400),
        batch=BatchConfig(size=128), budget=Budget(max_steps=100_000), evaluation=EvalConfig(every=2000), checkpoint=CheckpointConfig(every=2000),
    )  # fmt: skip
    return sizes.one_of("lstm", size, {"tiny": tiny, "published": published})


def elmo(size: str = "tiny") -> Recipe:
    """Two language models, one from each side, over words that are spelled: `firth train elmo`. What was measured: docs/results/index.md.

    published: two layers of 4,096 cells that hand on 512 numbers, 2,048 filters over 50 bytes, a billion words for ten
    epochs (Peters 2018, section 3.4); the softmax is over whole words, as there.
    """
    tiny = sizes.tiny(
        "elmo", BiLM(), WindowsConfig(max_length=64), bilm(sizes.VOCAB, 2 * sizes.WIDTH, 2, characters=16, filters=256),
        steps=500, batch=BatchConfig(size=32), optimizer=OptimizerConfig(scalar_lr=1e-3),
    )  # fmt: skip
    published = replace(
        tiny, data=DataConfig(), tokenizer=TokenizerConfig(algorithm="word", vocab_size=100_000), examples=WindowsConfig(max_length=20),
        model=replace(bilm(100_000, 1024, 2, characters=50, filters=2048, hidden=4096), dropout=0.1, max_positions=400),
        optimizer=OptimizerConfig(name="adamw", lr=1e-3, weight_decay=0.0), batch=BatchConfig(size=384),
        budget=Budget(max_steps=1_000_000), evaluation=EvalConfig(every=5000), checkpoint=CheckpointConfig(every=5000),
    )  # fmt: skip
    return sizes.one_of("elmo", size, {"tiny": tiny, "published": published})


def bilm(vocab: int, width: int, depth: int, characters: int, filters: int, hidden: int = 0) -> ModelConfig:
    """ELMo's shape: two stacks apart, over spelled words."""
    return ModelConfig(
        vocab_size=vocab, hidden_size=width, num_layers=depth, num_heads=1, intermediate_size=hidden, max_positions=sizes.CONTEXT, causal=False,
        norm_placement="post", position="none", tie_embeddings=False, lm_head_bias=True, rnn_type="lstm", separate_directions=True, rnn_residual=True,
        max_characters=characters, char_filters=filters,
    )  # fmt: skip


def token_features() -> Recipe:
    """A tag for each word from a pretrained model that stays as it is, by a mixture of its layers: `firth train token_features`."""
    return Recipe(
        name="tag_features", objective=LayerMixture() + TokenClassification(), examples=TaggedConfig(max_length=128), batch=BatchConfig(size=32),
        optimizer=OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.0, beta2=0.98), schedule=Schedule("linear", warmup_ratio=0.1),
        budget=Budget(max_steps=300), evaluation=EvalConfig(max_examples=2000), checkpoint=CheckpointConfig(every=300),
    )  # fmt: skip
