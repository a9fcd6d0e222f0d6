"""A text VAE (Bowman 2016): sentences through a Gaussian latent, with an annealed KL and word dropout.

    firth train vae data.path=mine/     on Shakespeare: held-out ELBO from -6.30 to -4.90 nats a token in 600 steps, of which the
                                          latent carries 0.9 nats a text; 127 s on two cores

The samples are texts drawn from the prior, and those on the straight line between two. The report says how many nats the
latent carries, and whether the posterior has collapsed. What was measured of it is in docs/results/index.md.
"""

from __future__ import annotations

from dataclasses import replace

from firth.model.config import encoder_decoder_config
from firth.objectives.vae import VAE
from firth.recipes import sizes
from firth.runs.examples import ChunksConfig
from firth.runs.recipe import BatchConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule


def vae(size: str = "tiny") -> Recipe:
    """An autoencoder of short texts with a latent of 32 numbers: `firth train vae`.

    The published size has Bowman's numbers where a Transformer has a place for them (13 units, KL annealed, 62.5% of the
    words kept, 20,000 words); his trunks are LSTMs of one layer.
    """
    samples = ("<prior>", "I will go with you. <to> What is the matter?")
    body = encoder_decoder_config(sizes.VOCAB, sizes.WIDTH, sizes.DEPTH // 2, max_positions=sizes.CONTEXT)
    tiny = sizes.tiny(
        "vae",
        VAE(latent_size=32, kl_anneal_steps=300, word_dropout=0.4),
        ChunksConfig(max_length=32, add_special_tokens=False),
        replace(body, latent_size=32),
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
        model=replace(encoder_decoder_config(20_000, 512, 2, max_positions=64), latent_size=13),
        batch=BatchConfig(size=32),
        optimizer=OptimizerConfig(),
        schedule=Schedule("wsd"),
        budget=Budget(max_steps=100_000),
        sample_prompts=samples,
    )
    return sizes.one_of("vae", size, {"tiny": tiny, "published": published})
