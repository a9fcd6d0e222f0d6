"""Decoders that predict the next token: GPT, GPT-2, GPT-3 and Llama.

The tiny sizes of gpt2, gpt3 and llama have the layers of their papers, so that four generations of decoders can be compared on
one's own text: `firth compare gpt gpt2 llama --max-seconds 120`. Held-out bits per byte are of one seed on an older CPU
(docs/results/tiny-recipes.md); 2.92 is the level of word frequencies, 3.86 of an untrained model.

Small data that is read many times overfits. Dropout and weight decay delay that, for about a third more time per step:

    firth train gpt data.path=BOOK max_steps=800 model.dropout=0.1 optimizer.weight_decay=1 evaluation.best_metric=loss

Two plays read 9.2 times: held-out loss 5.48 at the end with both and 5.85 without (three seeds), but 5.33 with or without after
a third of the run: `evaluation.best_metric` keeps the better model. Five plays read 7.9 times: 4.76 against 5.08 (three seeds),
and 4.76 against 4.79 at the best evaluation. An encoder learns more slowly with them (`roberta`, 9.0 times, two seeds: 5.77
against 5.54).
"""

from __future__ import annotations

from dataclasses import replace

from firth.data.examples import DataConfig
from firth.data.windows import WindowsConfig
from firth.model import presets
from firth.model.config import (
    ModelConfig,
    decoder_config,
)
from firth.objectives.causal_lm import CausalLM
from firth.recipes.common import (
    HIDDEN_SIZE,
    MAX_POSITIONS,
    NUM_LAYERS,
    VOCAB_SIZE,
    recipe_of_size,
    tiny_recipe,
)
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule

SAMPLES = ("The ", "I think that ", "What is ")
"""Prompts that the report continues before and after training."""


def gpt(size: str = "tiny") -> Recipe:
    """Return GPT (Radford 2018): tiny and small have firth's own decoder, published has the paper's 117 M parameters.

        firth train gpt                  2.92 to 1.96 bits per byte in 600 steps, 128 s
        firth train gpt:small            17 M parameters, the model of the benchmarks
        firth train gpt:published data.path=BOOKS

    Published: 64 sequences of 512 tokens, Adam at 2.5e-4 after 2,000 warmup steps, a cosine to 0, 40,000 merges, dropout 0.1.
    Its 100 epochs of BooksCorpus are about 3.6 M steps by the compute that the paper states (0.96 petaflop/s-days).
    """
    # An untied table begins at unit variance, so its steps must be of another size than a matrix's.
    ours = OptimizerConfig(embedding_lr=0.3)
    small = Recipe(
        name="gpt",
        objective=CausalLM(),
        examples=WindowsConfig(max_length=256),
        data=DataConfig(corpus="shakespeare"),
        model=decoder_config(vocab_size=8192, hidden_size=384, num_layers=6, max_positions=512),
        batch=BatchConfig(size=8),
        optimizer=ours,
        schedule=Schedule("wsd"),
        budget=Budget(max_steps=1200),
        evaluation=EvalConfig(every=100, max_examples=256),
        checkpoint=CheckpointConfig(every=200),
        sample_prompts=SAMPLES,
    )
    adam = OptimizerConfig(name="adamw", lr=2.5e-4, weight_decay=0.01, beta2=0.999, max_grad_norm=1.0)
    paper = _published("gpt", presets.PRESETS["gpt"], 64, 512, adam, warmup=2000, steps=3_600_000)
    return recipe_of_size(
        "gpt",
        size,
        {
            "tiny": _tiny(
                "gpt", decoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS), ours
            ),
            "small": small,
            "published": replace(paper, tokenizer=TokenizerConfig(algorithm="bpe", vocab_size=40478)),
        },
    )


def gpt2(size: str = "tiny") -> Recipe:
    """Return GPT-2 (Radford 2019): pre-norm, byte-level BPE; published is the 1.5 B model.

        firth train gpt2                 3.86 to 2.43 bits per byte in 600 steps, 117 s

    The paper gives 512 sequences of 1,024 tokens and no learning rate; rate, warmup and length are GPT-3's for its sizes (Brown
    2020, table 2.1 and appendix B).
    """
    steps = {"small": ("gpt2", 6e-4), "medium": ("gpt2-medium", 3e-4), "large": ("gpt2-large", 2.5e-4),
             "published": ("gpt2-xl", 2e-4)}  # fmt: skip
    sizes = {
        name: replace(
            _published("gpt2", presets.PRESETS[shape], 512, 1024, _brown(rate), warmup=715, steps=572_000),
            tokenizer=TokenizerConfig(vocab_size=50257),
        )
        for name, (shape, rate) in steps.items()
    }
    return recipe_of_size("gpt2", size, {"tiny": _tiny("gpt2", _gpt2_config(), _adamw())} | sizes)


def gpt3(size: str = "tiny") -> Recipe:
    """Return GPT-3 (Brown 2020): GPT-2's layers, 96 of them, of width 12,288; 3.2 M tokens per step, 300 B in all.

        firth train gpt3                 to 2.35 bits per byte in 600 steps, 92 s

    Attention is dense in all layers, where the paper alternates with banded sparse attention. Tiny has eight layers of half the width.
    """
    deep = replace(
        _gpt2_config(),
        hidden_size=HIDDEN_SIZE // 2,
        num_layers=2 * NUM_LAYERS,
        num_heads=3,
        head_dim=32,
        intermediate_size=2 * HIDDEN_SIZE,
    )
    whole = _published("gpt3", presets.PRESETS["gpt3"], 1563, 2048, _brown(0.6e-4), warmup=117, steps=93_750)
    return recipe_of_size(
        "gpt3",
        size,
        {
            "tiny": _tiny("gpt3", deep, _adamw()),
            "published": replace(whole, tokenizer=TokenizerConfig(vocab_size=50257)),
        },
    )


def llama(size: str = "tiny") -> Recipe:
    """Return Llama (Touvron 2023): 4 M tokens per step, 1 T in all, AdamW at 3e-4 with a cosine to a tenth.

    firth train llama                to 2.21 bits per byte in 600 steps, 109 s
    """
    small = presets.llama(
        VOCAB_SIZE,
        HIDDEN_SIZE,
        NUM_LAYERS,
        HIDDEN_SIZE // 64,
        intermediate_size=2 * HIDDEN_SIZE,
        max_positions=MAX_POSITIONS,
    )
    adamw = OptimizerConfig(name="adamw", lr=3e-4, weight_decay=0.1, beta2=0.95)
    whole = _published("llama", presets.PRESETS["llama-7b"], 2048, 2048, adamw, warmup=2000, steps=250_000)
    return recipe_of_size(
        "llama",
        size,
        {
            "tiny": _tiny("llama", small, _adamw()),
            "published": replace(
                whole, tokenizer=TokenizerConfig(vocab_size=32000), schedule=_cosine_to_tenth(2000, 250_000)
            ),
        },
    )


def _gpt2_config() -> ModelConfig:
    """Return GPT-2's layers at the tiny size, without dropout: two minutes are less than an epoch."""
    return replace(
        presets.gpt2(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, HIDDEN_SIZE // 64, max_positions=MAX_POSITIONS), dropout=0.0
    )


def _tiny(name: str, config: ModelConfig, optimizer: OptimizerConfig) -> Recipe:
    return tiny_recipe(
        name,
        CausalLM(),
        WindowsConfig(max_length=MAX_POSITIONS),
        config,
        steps=600,
        batch=BatchConfig(size=8),
        optimizer=optimizer,
        samples=SAMPLES,
    )


def _adamw() -> OptimizerConfig:
    """Return the optimizer of the papers' models at the tiny size; Muon was tuned for firth's own decoder."""
    return OptimizerConfig(name="adamw", lr=2e-3, weight_decay=0.1, beta2=0.95)


def _brown(rate: float) -> OptimizerConfig:
    """Return GPT-3's AdamW (Brown 2020, appendix B)."""
    return OptimizerConfig(name="adamw", lr=rate, weight_decay=0.1, beta2=0.95, max_grad_norm=1.0)


def _cosine_to_tenth(warmup: int, steps: int) -> Schedule:
    """Return a cosine schedule to a tenth of the learning rate."""
    return Schedule("cosine", warmup_ratio=warmup / steps, min_lr_ratio=0.1)


def _published(
    name: str, config: ModelConfig, rows: int, length: int, optimizer: OptimizerConfig, warmup: int, steps: int
) -> Recipe:
    """Return a published size, without data."""
    schedule = Schedule("cosine", warmup_ratio=warmup / steps) if name == "gpt" else _cosine_to_tenth(warmup, steps)
    return Recipe(
        name=name,
        objective=CausalLM(),
        examples=WindowsConfig(max_length=length),
        model=config,
        batch=BatchConfig(size=rows),
        optimizer=optimizer,
        schedule=schedule,
        budget=Budget(max_steps=steps),
        evaluation=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )
