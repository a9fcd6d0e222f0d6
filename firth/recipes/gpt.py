"""Decoders that predict the next token: GPT, GPT-2, GPT-3's shape, Llama.

    firth train gpt             tiny, firth's own decoder: Shakespeare, 128 s on two cores, held-out bits a byte from 2.92 (word
                                frequencies) to 1.96
    firth train gpt2            117 s, from 3.86 (nothing) to 2.43
    firth train gpt3            92 s, to 2.35
    firth train llama           109 s, to 2.21
    firth train gpt:small       17 M parameters, the one that the benchmarks train
    firth train gpt:published data.path=BOOKS

The tiny sizes of gpt2, gpt3 and llama have the blocks of their papers, so that four generations of decoders can be
compared on one's own text (docs/results/index.md: one seed so far): `firth compare gpt gpt2 llama --seconds 120`.

A small text that is read many times is soon overfitted; two keys delay that, for about a third more time a step:

    firth train gpt data.path=BOOK max_steps=800 model.dropout=0.1 optimizer.weight_decay=1 evaluation.best_metric=loss

Two plays read 9.2 times: held-out loss 5.48 at the end with the two keys and 5.85 without (three seeds), but 5.33 with or without
after a third of the run: `evaluation.best_metric` keeps the better model. Five plays read 7.9 times: 4.76 against 5.08 (three seeds), and
4.76 against 4.79 at the best measurement. An encoder learns more slowly with them (`roberta`, 9.0 times, two seeds: 5.77
against 5.54).
"""

from __future__ import annotations

from dataclasses import replace

from firth.model import presets
from firth.model.config import ModelConfig, decoder_config
from firth.objectives.causal_lm import CausalLM
from firth.recipes.sizes import CONTEXT, DEPTH, VOCAB, WIDTH, one_of, tiny
from firth.runs.examples import WindowsConfig
from firth.runs.prepare import DataConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule

SAMPLES = ("The ", "I think that ", "What is ")


def gpt(size: str = "tiny") -> Recipe:
    """Generative pretraining (Radford 2018): tiny and small have firth's decoder, published has the paper's 117 M.

    The paper: 64 rows of 512 tokens, Adam at 2.5e-4 after 2,000 updates, a cosine to 0, 40,000 merges, dropout 0.1. Its
    100 epochs of BooksCorpus are about 3.6 M steps by its stated compute (0.96 petaflop/s-days).
    """
    # An untied table begins at unit variance, so its steps must be of another size than a matrix's.
    ours = OptimizerConfig(embedding_lr=0.3)
    small = Recipe(
        name="gpt", objective=CausalLM(), examples=WindowsConfig(max_length=256), data=DataConfig(corpus="shakespeare"),
        model=decoder_config(vocab_size=8192, hidden_size=384, num_layers=6, max_positions=512), batch=BatchConfig(size=8), optimizer=ours,
        schedule=Schedule("wsd"), budget=Budget(max_steps=1200), evaluation=EvalConfig(every=100, max_examples=256), checkpoint=CheckpointConfig(every=200), sample_prompts=SAMPLES,
    )  # fmt: skip
    adam = OptimizerConfig(name="adamw", lr=2.5e-4, weight_decay=0.01, beta2=0.999, max_grad_norm=1.0)
    paper = _long("gpt", presets.PRESETS["gpt"], 64, 512, adam, warmup=2000, steps=3_600_000)
    return one_of("gpt", size, {
        "tiny": _tiny("gpt", decoder_config(VOCAB, WIDTH, DEPTH, max_positions=CONTEXT), ours),
        "small": small,
        "published": replace(paper, tokenizer=TokenizerConfig(algorithm="bpe", vocab_size=40478)),
    })  # fmt: skip


def gpt2(size: str = "tiny") -> Recipe:
    """GPT-2 (Radford 2019): the norm goes before, byte-level BPE; published is the 1.5 B one.

    The paper gives 512 rows of 1,024 tokens and no rate; rate, warmup and length are GPT-3's for its sizes (Brown 2020,
    table 2.1 and appendix B).
    """
    steps = {"small": ("gpt2", 6e-4), "medium": ("gpt2-medium", 3e-4), "large": ("gpt2-large", 2.5e-4),
             "published": ("gpt2-xl", 2e-4)}  # fmt: skip
    sizes = {
        name: replace(
            _long("gpt2", presets.PRESETS[shape], 512, 1024, _brown(rate), warmup=715, steps=572_000),
            tokenizer=TokenizerConfig(vocab_size=50257),
        )
        for name, (shape, rate) in steps.items()
    }
    return one_of("gpt2", size, {"tiny": _tiny("gpt2", _plain(), _adamw())} | sizes)


def gpt3(size: str = "tiny") -> Recipe:
    """GPT-3's shape (Brown 2020): GPT-2's blocks, 96 of them, 12,288 wide; 3.2 M tokens a step, 300 B in all.

    All attention is dense here, where the paper alternates with banded sparse attention. Tiny has eight blocks of half
    the width, for nothing else of it fits into two minutes.
    """
    deep = replace(
        _plain(), hidden_size=WIDTH // 2, num_layers=2 * DEPTH, num_heads=3, head_dim=32, intermediate_size=2 * WIDTH
    )
    whole = _long("gpt3", presets.PRESETS["gpt3"], 1563, 2048, _brown(0.6e-4), warmup=117, steps=93_750)
    return one_of("gpt3", size, {
        "tiny": _tiny("gpt3", deep, _adamw()),
        "published": replace(whole, tokenizer=TokenizerConfig(vocab_size=50257)),
    })  # fmt: skip


def llama(size: str = "tiny") -> Recipe:
    """Llama (Touvron 2023): 4 M tokens a step, 1 T in all, AdamW at 3e-4 with a cosine to a tenth."""
    small = presets.llama(VOCAB, WIDTH, DEPTH, WIDTH // 64, intermediate_size=2 * WIDTH, max_positions=CONTEXT)
    adamw = OptimizerConfig(name="adamw", lr=3e-4, weight_decay=0.1, beta2=0.95)
    whole = _long("llama", presets.PRESETS["llama-7b"], 2048, 2048, adamw, warmup=2000, steps=250_000)
    return one_of("llama", size, {
        "tiny": _tiny("llama", small, _adamw()),
        "published": replace(whole, tokenizer=TokenizerConfig(vocab_size=32000), schedule=_tenth(2000, 250_000)),
    })  # fmt: skip


def _plain() -> ModelConfig:
    """GPT-2's blocks at the tiny size, without dropout: two minutes are less than an epoch."""
    return replace(presets.gpt2(VOCAB, WIDTH, DEPTH, WIDTH // 64, max_positions=CONTEXT), dropout=0.0)


def _tiny(name: str, config: ModelConfig, optimizer: OptimizerConfig) -> Recipe:
    return tiny(
        name,
        CausalLM(),
        WindowsConfig(max_length=CONTEXT),
        config,
        steps=600,
        batch=BatchConfig(size=8),
        optimizer=optimizer,
        samples=SAMPLES,
    )


def _adamw() -> OptimizerConfig:
    """What the papers' blocks are trained with: Muon was tuned for ours."""
    return OptimizerConfig(name="adamw", lr=2e-3, weight_decay=0.1, beta2=0.95)


def _brown(rate: float) -> OptimizerConfig:
    """GPT-3's AdamW (Brown 2020, appendix B)."""
    return OptimizerConfig(name="adamw", lr=rate, weight_decay=0.1, beta2=0.95, max_grad_norm=1.0)


def _tenth(warmup: int, steps: int) -> Schedule:
    return Schedule("cosine", warmup_ratio=warmup / steps, min_lr_ratio=0.1)


def _long(
    name: str, config: ModelConfig, rows: int, length: int, optimizer: OptimizerConfig, warmup: int, steps: int
) -> Recipe:
    """A published size: no text, which the user gives."""
    schedule = Schedule("cosine", warmup_ratio=warmup / steps) if name == "gpt" else _tenth(warmup, steps)
    return Recipe(
        name=name, objective=CausalLM(), examples=WindowsConfig(max_length=length), model=config, batch=BatchConfig(size=rows),
        optimizer=optimizer, schedule=schedule, budget=Budget(max_steps=steps), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
    )  # fmt: skip
