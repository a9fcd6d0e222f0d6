"""Encoders that guess hidden tokens: BERT and RoBERTa.

firth train bert              tiny: Shakespeare, 800 steps, 136 s on two cores: held-out masked loss, at 30% hidden, from 6.30 (word
                              frequencies) to 4.29; the next sentence is not learnt (0.60, untrained 0.59)
firth train roberta           the same without sentence pairs, masks drawn anew at each visit: from 6.35 to 4.41 in 125 s
firth train roberta:small     11 M parameters
firth train bert:published data.path=BOOKS_AND_WIKIPEDIA
"""

from __future__ import annotations

from dataclasses import replace

from firth.model import presets
from firth.model.config import encoder_config
from firth.objectives.masked_lm import MLM
from firth.objectives.next_sentence import NSP
from firth.recipes.sizes import CONTEXT, DEPTH, HIDDEN, VOCAB, WIDTH, one_of, tiny
from firth.runs.examples import ChunksConfig, SegmentPairsConfig
from firth.runs.prepare import DataConfig
from firth.runs.recipe import BatchConfig, CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule

SAMPLES = ("The <mask> is good.", "I will <mask> you.", "What do you <mask> of it?")


def bert(size: str = "tiny") -> Recipe:
    """Next sentence prediction and masked words together, ten fixed maskings of the text (Devlin 2019).

    The paper (appendix A.2): 256 rows of 512 tokens, 1 M steps, Adam at 1e-4 after 10,000 steps, a linear fall. It reads
    rows of 128 tokens for the first 90% of the steps; here all are of 512 (set examples.max_length=128 for theirs).
    """
    paper = Recipe(
        name="bert", objective=NSP() + MLM(num_maskings=10), examples=SegmentPairsConfig(max_length=512), model=presets.PRESETS["bert-base"],
        tokenizer=TokenizerConfig(algorithm="wordpiece", vocab_size=30522), batch=BatchConfig(size=256),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.01, beta2=0.999), sample_prompts=SAMPLES,
        schedule=Schedule("linear", warmup_ratio=0.01), budget=Budget(max_steps=1_000_000), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
    )  # fmt: skip
    body = replace(encoder_config(VOCAB, WIDTH, DEPTH, max_positions=CONTEXT), type_vocab_size=2)
    return one_of("bert", size, {
        "tiny": tiny("bert", NSP() + MLM(mlm_probability=HIDDEN, num_maskings=10), SegmentPairsConfig(max_length=128), body, steps=800, batch=BatchConfig(size=16), samples=SAMPLES),
        "published": paper,
        "large": replace(paper, model=presets.PRESETS["bert-large"]),
    })  # fmt: skip


def roberta(size: str = "tiny") -> Recipe:
    """BERT without sentence pairs, masks drawn anew at each visit, larger batches (Liu 2019, section 5 and table 9).

    The paper (large): 8,192 rows of 512 tokens, 500,000 steps, Adam at 4e-4 after 30,000 steps, byte-level BPE of 50,265.
    Its position table has two more rows than BERT's, of which nothing is ever read.
    """
    small = Recipe(
        name="roberta", objective=MLM(mlm_probability=HIDDEN), examples=ChunksConfig(max_length=128), data=DataConfig(corpus="shakespeare"),
        model=encoder_config(vocab_size=8192, hidden_size=384, num_layers=6, max_positions=512), batch=BatchConfig(size=32, pack_to_length=128), sample_prompts=SAMPLES,
        schedule=Schedule("wsd"), budget=Budget(max_steps=1000), evaluation=EvalConfig(every=100, max_examples=256), checkpoint=CheckpointConfig(every=200),
    )  # fmt: skip
    paper = Recipe(
        name="roberta", objective=MLM(), examples=ChunksConfig(max_length=512), model=presets.PRESETS["roberta-large"],
        tokenizer=TokenizerConfig(vocab_size=50265), batch=BatchConfig(size=8192, pack_to_length=512), sample_prompts=SAMPLES,
        optimizer=OptimizerConfig(name="adamw", lr=4e-4, weight_decay=0.01, beta2=0.98, eps=1e-6, max_grad_norm=0.0),
        schedule=Schedule("linear", warmup_ratio=0.06), budget=Budget(max_steps=500_000), evaluation=EvalConfig(every=1000), checkpoint=CheckpointConfig(every=1000),
    )  # fmt: skip
    body = encoder_config(VOCAB, WIDTH, DEPTH, max_positions=CONTEXT)
    return one_of("roberta", size, {
        "tiny": tiny("roberta", MLM(mlm_probability=HIDDEN), ChunksConfig(max_length=128), body, steps=800, batch=BatchConfig(size=16, pack_to_length=128), samples=SAMPLES),
        "small": small,
        "published": paper,
    })  # fmt: skip
