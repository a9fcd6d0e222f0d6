"""Encoders: BERT, RoBERTa, SpanBERT, ALBERT, ELECTRA, XLNet, MPNet, Linformer, and contrastive sentence encoders.

A name alone is the tiny size: four layers of width 192 on Shakespeare's plays (`electra`: three of width 128), two to three minutes
on two cores. Losses are held-out nats per predicted token, at the start (label frequencies) and at the end, of one seed on an older CPU
(docs/results/tiny-recipes.md). A published size has no data: set `data.path`.
"""

from __future__ import annotations

from dataclasses import replace

from firth.data.examples import DataConfig
from firth.data.windows import ChunksConfig, SegmentPairsConfig, WindowsConfig
from firth.model import presets
from firth.model.config import (
    ModelConfig,
    encoder_config,
)
from firth.objectives.contrastive import Contrastive, InfoNCE
from firth.objectives.masked_lm import MLM, SBO
from firth.objectives.objective import Objective
from firth.objectives.permuted_lm import PLM, MPNet
from firth.objectives.replaced_tokens import RTD
from firth.objectives.sentence_pairs import NSP, SOP
from firth.recipes.common import (
    HIDDEN_SIZE,
    MAX_POSITIONS,
    MLM_PROBABILITY,
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

SAMPLES = ("The <mask> is good.", "I will <mask> you.", "What do you <mask> of it?")
"""Prompts that the report fills before and after training."""


def _narrow_encoder() -> ModelConfig:
    """Return the model of the tiny ELECTRA: three layers of width 128 with heads of 16."""
    return encoder_config(NARROW_VOCAB_SIZE, NARROW_HIDDEN_SIZE, 3, num_heads=NARROW_HEADS, max_positions=MAX_POSITIONS)


def bert(size: str = "tiny") -> Recipe:
    """Return BERT: masked language modeling and next sentence prediction (Devlin 2019).

        firth train bert                 6.30 to 4.29 in 800 steps, 136 s; NSP stays at chance
        firth train bert:published data.path=BOOKS_AND_WIKIPEDIA

    Published (appendix A.2): 256 sequences of 512 tokens, 1 M steps, Adam at 1e-4 after 10,000 warmup steps, linear decay, ten fixed
    maskings of the text. The paper uses sequences of 128 tokens for the first 90% of the steps; here all have 512 (set
    examples.max_length=128 for theirs). "large" is BERT-large.
    """
    paper = Recipe(
        name="bert",
        objective=NSP() + MLM(num_maskings=10),
        examples=SegmentPairsConfig(max_length=512),
        model=presets.PRESETS["bert-base"],
        tokenizer=TokenizerConfig(algorithm="wordpiece", vocab_size=30522),
        batch=BatchConfig(size=256),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.01, beta2=0.999),
        sample_prompts=SAMPLES,
        schedule=Schedule("linear", warmup_ratio=0.01),
        budget=Budget(max_steps=1_000_000),
        evaluation=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )
    body = encoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS).with_fields(
        {"embedding.type_vocab_size": 2}
    )
    return recipe_of_size(
        "bert",
        size,
        {
            "tiny": tiny_recipe(
                "bert",
                NSP() + MLM(mlm_probability=MLM_PROBABILITY, num_maskings=10),
                SegmentPairsConfig(max_length=128),
                body,
                steps=800,
                batch=BatchConfig(size=16),
                samples=SAMPLES,
            ),
            "published": paper,
            "large": replace(paper, model=presets.PRESETS["bert-large"]),
        },
    )


def roberta(size: str = "tiny") -> Recipe:
    """Return RoBERTa: masked language modeling alone, masks drawn anew in every epoch (Liu 2019, section 5 and table 9).

        firth train roberta              6.35 to 4.41 in 800 steps, 125 s
        firth train roberta:small        11 M parameters

    Published (large): 8,192 sequences of 512 tokens, 500,000 steps, Adam at 4e-4 after 30,000 warmup steps, byte-level BPE of 50,265.
    """
    small = Recipe(
        name="roberta",
        objective=MLM(mlm_probability=MLM_PROBABILITY),
        examples=ChunksConfig(max_length=128),
        data=DataConfig(corpus="shakespeare"),
        model=encoder_config(vocab_size=8192, hidden_size=384, num_layers=6, max_positions=512),
        batch=BatchConfig(size=32, pack_to_length=128),
        sample_prompts=SAMPLES,
        schedule=Schedule("wsd"),
        budget=Budget(max_steps=1000),
        evaluation=EvalConfig(every=100, max_examples=256),
        checkpoint=CheckpointConfig(every=200),
    )
    paper = Recipe(
        name="roberta",
        objective=MLM(),
        examples=ChunksConfig(max_length=512),
        model=presets.PRESETS["roberta-large"],
        tokenizer=TokenizerConfig(vocab_size=50265),
        batch=BatchConfig(size=8192, pack_to_length=512),
        sample_prompts=SAMPLES,
        optimizer=OptimizerConfig(name="adamw", lr=4e-4, weight_decay=0.01, beta2=0.98, eps=1e-6, max_grad_norm=0.0),
        schedule=Schedule("linear", warmup_ratio=0.06),
        budget=Budget(max_steps=500_000),
        evaluation=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )
    body = encoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS)
    return recipe_of_size(
        "roberta",
        size,
        {
            "tiny": tiny_recipe(
                "roberta",
                MLM(mlm_probability=MLM_PROBABILITY),
                ChunksConfig(max_length=128),
                body,
                steps=800,
                batch=BatchConfig(size=16, pack_to_length=128),
                samples=SAMPLES,
            ),
            "small": small,
            "published": paper,
        },
    )


def spanbert(size: str = "tiny") -> Recipe:
    """Return SpanBERT: masked spans, each token predicted from its place and from the ends of its span (Joshi 2020, arXiv:1907.10529).

        firth train spanbert             6.48 to 5.35, and to 5.92 from the span's ends, in 500 steps, three minutes

    Published (section 4.2): BERT-large, 2.4 M steps of 256 sequences of up to 512 tokens, Adam at 1e-4 with 10,000 warmup steps, single
    segments and no NSP.
    """
    return recipe_of_size("spanbert", size, {"tiny": _spanbert_tiny(), "published": _spanbert_published()})


def _spanbert_objective(rate: float) -> Objective:
    return MLM(mlm_probability=rate, noise="geometric", whole_span_replacement=True) + SBO()


def _spanbert_tiny() -> Recipe:
    return tiny_recipe(
        "spanbert",
        _spanbert_objective(MLM_PROBABILITY),
        ChunksConfig(max_length=128),
        encoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS),
        steps=500,
        batch=BatchConfig(size=32, pack_to_length=128),
        samples=("The <mask> is good.", "I will <mask> you.", "What do you <mask> of it?"),
    )


def _spanbert_published() -> Recipe:
    config = presets.PRESETS["spanbert"]
    return Recipe(
        name="spanbert",
        objective=_spanbert_objective(0.15),
        examples=ChunksConfig(max_length=512),
        model=config,
        tokenizer=TokenizerConfig(algorithm="wordpiece", vocab_size=config.vocab_size),
        batch=BatchConfig(size=256),
        optimizer=OptimizerConfig(name="adamw", lr=1e-4, weight_decay=0.1, beta2=0.999, eps=1e-8),
        schedule=Schedule("linear", warmup_ratio=10_000 / 2_400_000),
        budget=Budget(max_steps=2_400_000),
        evaluation=EvalConfig(every=10_000),
        checkpoint=CheckpointConfig(every=10_000),
    )


def albert(size: str = "tiny") -> Recipe:
    """Return ALBERT: one layer's weights for all layers, narrow embeddings, sentence order prediction (Lan 2020, arXiv:1909.11942).

        firth train albert               6.56 to 5.15 in 500 steps, 134 s; sentence order stays at chance
        firth train albert:published data.path=FILES

    Published (section 4.1): ALBERT-base, 125,000 steps of 4,096 pairs of 512 tokens, masks of n-grams up to three whole words.
    The paper uses LAMB at 1.76e-3; firth has no LAMB, so AdamW at RoBERTa's rate for large batches replaces it.
    """
    return recipe_of_size("albert", size, {"tiny": _albert_tiny(), "published": _albert_published()})


def _albert_tiny() -> Recipe:
    modern = encoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS)
    config = modern.with_fields(
        {
            "embedding.size": HIDDEN_SIZE // 3,
            "num_layer_groups": 1,
            "norm.first_attention": True,
            "embedding.type_vocab_size": 2,
        }
    )
    return tiny_recipe(
        "albert",
        SOP() + MLM(mlm_probability=MLM_PROBABILITY, noise="ngrams"),
        SegmentPairsConfig(max_length=128),
        config,
        steps=500,
        batch=BatchConfig(size=32, pack_to_length=128),
        samples=("The <mask> is good.", "I will <mask> you.", "What do you <mask> of it?"),
    )


def _albert_published() -> Recipe:
    config = presets.PRESETS["albert-base"]
    return Recipe(
        name="albert",
        objective=SOP() + MLM(noise="ngrams"),
        examples=SegmentPairsConfig(max_length=512),
        model=config,
        tokenizer=TokenizerConfig(algorithm="unigram", vocab_size=config.vocab_size),
        batch=BatchConfig(size=4096, gradient_accumulation_steps=64),
        optimizer=OptimizerConfig(name="adamw", lr=7e-4, weight_decay=0.01, beta2=0.98, eps=1e-6),
        schedule=Schedule("linear", warmup_ratio=3125 / 125_000),
        budget=Budget(max_steps=125_000),
        evaluation=EvalConfig(every=5000),
        checkpoint=CheckpointConfig(every=5000),
    )


def electra(size: str = "tiny") -> Recipe:
    """Return ELECTRA: detect the tokens that a small generator replaced (Clark 2020, arXiv:2003.10555).

        firth train electra              area under the detector's curve 0.74, generator 4.49, in 1,600 steps (Zen 4, shared: 5 minutes)
        firth train electra:base         ELECTRA-base, 110 M parameters
        firth train electra objective.kind=adversarial_rtd

    Published: ELECTRA-small. The last command rewards the generator for deceiving the discriminator (appendix F). The export is an
    ElectraForPreTraining with the generator in the same file.
    """
    small = _electra_published(
        RTD(generator_size=1 / 4), presets.PRESETS["electra-small"], length=128, rows=128, rate=5e-4, steps=1_000_000
    )
    base = _electra_published(
        RTD(generator_size=1 / 3), presets.PRESETS["electra-base"], length=512, rows=256, rate=2e-4, steps=766_000
    )
    return recipe_of_size("electra", size, {"tiny": _electra_tiny(), "published": small, "base": base})


def _electra_tiny() -> Recipe:
    config = _narrow_encoder().with_fields({"embedding.size": NARROW_HIDDEN_SIZE // 2})
    return tiny_recipe(
        "electra",
        RTD(generator_size=1 / 4),
        ChunksConfig(max_length=32),
        config,
        steps=1600,
        batch=BatchConfig(size=64, pack_to_length=64),
    )


def _electra_published(
    objective: RTD, config: ModelConfig, *, length: int, rows: int, rate: float, steps: int
) -> Recipe:
    """Return a published size (table 6): Adam, 10,000 warmup steps, linear decay to zero."""
    return Recipe(
        name="electra",
        objective=objective,
        examples=ChunksConfig(max_length=length),
        model=config,
        tokenizer=TokenizerConfig(algorithm="wordpiece", vocab_size=config.vocab_size),
        batch=BatchConfig(size=rows),
        optimizer=OptimizerConfig(name="adamw", lr=rate, weight_decay=0.01, beta2=0.999, eps=1e-6),
        schedule=Schedule("linear", warmup_ratio=10_000 / steps),
        budget=Budget(max_steps=steps),
        evaluation=EvalConfig(every=10_000),
        checkpoint=CheckpointConfig(every=10_000),
    )


def xlnet(size: str = "tiny") -> Recipe:
    """Return XLNet: permutation language modeling with the tokens before each sequence as memory (Yang 2019).

        firth train xlnet                6.38 to 4.65 in 500 steps, 162 s
        firth train xlnet:published data.path=BOOKS_WIKIPEDIA_AND_WEB

    Published (large, appendix A.4): 8,192 sequences of 512 tokens, 500,000 steps, Adam at 4e-4 after 40,000 warmup steps, a sixth of the
    tokens predicted in spans of 1 to 5, a memory of 384 tokens, SentencePiece of 32,000. The paper's sequences are two segments of 256
    tokens followed by [SEP] and [CLS]; here each is one stretch of text, and the segment vectors are not trained. The tiny size predicts
    a third of the tokens, one by one.
    """
    paper = Recipe(
        name="xlnet",
        objective=PLM(noise="contexts"),
        examples=WindowsConfig(max_length=512),
        model=presets.PRESETS["xlnet-large"],
        tokenizer=TokenizerConfig(algorithm="unigram", vocab_size=32000),
        batch=BatchConfig(size=8192),
        sample_prompts=SAMPLES,
        optimizer=OptimizerConfig(name="adamw", lr=4e-4, weight_decay=0.01, beta2=0.999, eps=1e-6),
        schedule=Schedule("linear", warmup_ratio=0.08),
        budget=Budget(max_steps=500_000),
        evaluation=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )
    body = encoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS).with_fields(
        {"position.type": "xlnet", "embedding.mask": True, "attention.memory_length": 128}
    )
    return recipe_of_size(
        "xlnet",
        size,
        {
            "tiny": tiny_recipe(
                "xlnet",
                PLM(k=3),
                WindowsConfig(max_length=128),
                body,
                steps=500,
                batch=BatchConfig(size=16),
                samples=SAMPLES,
            ),
            "base": replace(paper, model=presets.PRESETS["xlnet-base"]),
            "published": paper,
        },
    )


def mpnet(size: str = "tiny") -> Recipe:
    """Return MPNet: masked and permuted language modeling of whole words (Song 2020).

        firth train mpnet                6.34 to 4.35 in 600 steps, 149 s

    Published (base, section 3.1 and appendix): 8,192 sequences of 512 tokens, 500,000 steps, Adam at 6e-4 after 24,000 warmup steps, linear
    decay, 15% predicted, BERT's vocabulary. The tiny size predicts 30% and has rotary positions: with learned positions a masked model
    does not get past word frequencies in so short a run (docs/decisions/0044-tiny-mpnet-positions.md).
    """
    objective = MPNet(noise="words")
    paper = Recipe(
        name="mpnet",
        objective=objective,
        examples=ChunksConfig(max_length=512),
        model=presets.PRESETS["mpnet-base"],
        tokenizer=TokenizerConfig(algorithm="wordpiece", vocab_size=30527),
        batch=BatchConfig(size=8192),
        sample_prompts=SAMPLES,
        optimizer=OptimizerConfig(name="adamw", lr=6e-4, weight_decay=0.01, beta2=0.98, eps=1e-6, max_grad_norm=0.0),
        schedule=Schedule("linear", warmup_ratio=0.048),
        budget=Budget(max_steps=500_000),
        evaluation=EvalConfig(every=1000),
        checkpoint=CheckpointConfig(every=1000),
    )
    body = encoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS)
    return recipe_of_size(
        "mpnet",
        size,
        {
            "tiny": tiny_recipe(
                "mpnet",
                replace(objective, mlm_probability=0.3),
                ChunksConfig(max_length=128),
                body,
                steps=600,
                batch=BatchConfig(size=16),
                samples=SAMPLES,
            ),
            "published": paper,
        },
    )


def linformer(size: str = "tiny") -> Recipe:
    """Return Linformer: BERT's objective with keys and values projected to k slots, linear in the sequence length (Wang 2020).

        firth train linformer            6.40 to 5.20 in 400 steps, 138 s; sequences of 256 tokens in 64 slots
        firth train linformer:published data.path=FILES

    Published: RoBERTa-base, sequences of 512 tokens, k = 256. Sequences are padded, not packed. Time and memory against full attention:
    docs/results/linformer.md.
    """
    tiny = tiny_recipe(
        "linformer",
        MLM(mlm_probability=MLM_PROBABILITY),
        ChunksConfig(max_length=MAX_POSITIONS),
        encoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS).with_fields(
            {"attention.linformer.k": 64}
        ),
        steps=400,
        batch=BatchConfig(size=16),
        samples=("The <mask> is good.", "I will <mask> you."),
    )
    published = Recipe(
        name="linformer",
        objective=MLM(),
        examples=ChunksConfig(max_length=512),
        tokenizer=TokenizerConfig(vocab_size=50265),
        model=presets.bert(50265, 768, 12, 12, type_vocab_size=0).with_fields({"attention.linformer.k": 256}),
        batch=BatchConfig(size=256),
        # The paper's 250,000 updates on BookCorpus and Wikipedia; rates and the rest are RoBERTa's.
        optimizer=OptimizerConfig(name="adamw", lr=6e-4, weight_decay=0.01, beta2=0.98, eps=1e-6),
        schedule=Schedule("linear", warmup_ratio=0.05),
        budget=Budget(max_steps=250_000),
    )  # fmt: skip
    return recipe_of_size("linformer", size, {"tiny": tiny, "published": published})


def contrastive(size: str = "tiny") -> Recipe:
    """Return a contrastive sentence encoder: a margin loss over neighboring pieces of text, or SimCSE (Gao 2021).

        firth train contrastive          300 steps, 92 s: the neighbor is nearer than a random piece in 70% (64% untrained)
        firth train contrastive:published init_from=BERT_BASE data.path=mine/sentences.txt data.split_by=line

    Published: unsupervised SimCSE on BERT-base, 10^6 sentences once, 64 per step, two dropout views. `init_from` brings its own
    model config.
    """
    tiny = tiny_recipe(
        "contrastive",
        Contrastive(),
        SegmentPairsConfig(max_length=64),
        encoder_config(VOCAB_SIZE, HIDDEN_SIZE, NUM_LAYERS, max_positions=MAX_POSITIONS),
        steps=300,
        batch=BatchConfig(size=32),
        optimizer=OptimizerConfig(lr=1e-3),
    )
    published = Recipe(
        name="contrastive",
        objective=InfoNCE(position="first"),
        examples=ChunksConfig(max_length=32),
        tokenizer=TokenizerConfig(algorithm="wordpiece", vocab_size=30522),
        model=presets.PRESETS["bert-base"],
        batch=BatchConfig(size=64),
        optimizer=OptimizerConfig(name="adamw", lr=3e-5, weight_decay=0.0, beta2=0.999),
        schedule=Schedule("linear"),
        budget=Budget(max_steps=15_625),
    )
    return recipe_of_size("contrastive", size, {"tiny": tiny, "published": published})
