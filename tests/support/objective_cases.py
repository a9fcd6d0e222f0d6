"""Every objective of pretraining and classification, with a source of random examples for it."""

from __future__ import annotations

from typing import get_args

import numpy as np
import torch

from firth.data.collate import counted_fields
from firth.data.noise import Damage
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM, PrefixLM
from firth.objectives.classification import Classification, Regression
from firth.objectives.masked_lm import MLM, SBO
from firth.objectives.objective import Objective
from firth.objectives.permuted_lm import PLM, MPNet
from firth.objectives.replaced_tokens import RTD, AdversarialRTD
from firth.objectives.semi_supervised import Consistency, PseudoLabels, WeightPenalty
from firth.objectives.sentence_pairs import NSP, SOP
from firth.objectives.seq2seq import Denoising, SpanCorruption
from firth.objectives.token_tasks import QuestionAnswering, TokenClassification
from firth.tokenizer.vocab import Vocab
from firth.training.step import step
from firth.types import IGNORE, Example

SENTINELS = 20


def spelling_of(i: int) -> bytes:
    """Spelling of a token that starts a word, ends a sentence, has a capital or a digit, by its id."""
    if i < 5 + SENTINELS:
        return b"\n"
    blank, capital, digit = " " * (i % 3 == 0), "C" * (i % 15 == 0), "5" * (i % 18 == 3)
    return f"{blank}{capital}{digit}a{'!' * (i % 10 == 1)}".encode()


VOCAB = Vocab(
    size=100,
    roles={"pad": 0, "unk": 1, "cls": 2, "bos": 2, "sep": 3, "eos": 3, "mask": 4},
    special=np.arange(100) < 5 + SENTINELS,
    sentinels=np.arange(5, 5 + SENTINELS),
    spelling=tuple(map(spelling_of, range(100))),
)


def some_text(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(25, 100, n).astype(np.int32)


def special_tokens_text(rng: np.random.Generator) -> Example:
    return {"tokens": VOCAB.add_special_tokens(some_text(rng, int(rng.integers(5, 40))))}


def plain_text(rng: np.random.Generator) -> Example:
    return {"tokens": some_text(rng, int(rng.integers(5, 40)))}


def pairs(rng: np.random.Generator) -> Example:
    n = int(rng.integers(2, 15))
    return {"first": some_text(rng, 9), "second": some_text(rng, n), "other": some_text(rng, n)}


def labeled(rng: np.random.Generator) -> Example:
    return special_tokens_text(rng) | {"label": int(rng.integers(3))}


def partially_labeled(rng: np.random.Generator) -> Example:
    label = int(rng.integers(3)) if rng.random() < 0.5 else IGNORE
    return special_tokens_text(rng) | {"label": label, "taught": np.eye(3)[rng.integers(3)]}


def scored(rng: np.random.Generator) -> Example:
    return special_tokens_text(rng) | {"score": float(rng.normal())}


def tagged(rng: np.random.Generator) -> Example:
    example = special_tokens_text(rng)
    return example | {"tags": np.where(rng.random(len(example["tokens"])) < 0.5, rng.integers(3), IGNORE)}


def spanned(rng: np.random.Generator) -> Example:
    example = special_tokens_text(rng)
    start = int(rng.integers(len(example["tokens"]) - 1))
    answerable = rng.random() < 0.8
    return example | {
        "start": start if answerable else -1,
        "end": start + 1 if answerable else -1,
        "token_type_ids": example["tokens"] % 2,
    }


CASES = {
    "causal": (CausalLM(), plain_text),
    "mlm": (MLM(), special_tokens_text),
    "mlm by words": (MLM(noise="words"), special_tokens_text),
    "mlm in spans, whole replacement": (MLM(noise="geometric", whole_span_replacement=True), special_tokens_text),
    "mlm, static": (MLM(num_maskings=10), special_tokens_text),
    "plm": (PLM(), special_tokens_text),
    "plm in spans": (PLM(noise="contexts", k=3), special_tokens_text),
    "mpnet": (MPNet(), special_tokens_text),
    "nsp + mlm": (NSP() + MLM(), pairs),
    "sop + mlm": (SOP() + MLM(noise="ngrams"), pairs),
    "mlm + sbo": (MLM(noise="geometric", whole_span_replacement=True) + SBO(), special_tokens_text),
    "mlm + sbo, plain": (MLM(noise="spans") + SBO(max_span_length=2), plain_text),
    "rtd": (RTD(), special_tokens_text),
    "rtd of pairs": (SOP() + RTD(generator_size=0.5), pairs),
    "adversarial rtd": (AdversarialRTD(), special_tokens_text),
    "span corruption": (SpanCorruption(), plain_text),
    "span corruption in one row": (SpanCorruption(layout="prefix"), plain_text),
    "mlm + penalty": (MLM() + WeightPenalty(), special_tokens_text),
    "pseudo labels": (PseudoLabels(class_names=("a", "b", "c")), partially_labeled),
    "consistency": (Consistency(class_names=("a", "b", "c")), partially_labeled),
    "prefix lm": (PrefixLM(), plain_text),
    "prefix lm, encoder and decoder": (PrefixLM(layout="seq2seq"), plain_text),
    "denoising": (Denoising(), plain_text),
    "denoising in one row": (Denoising(layout="prefix"), plain_text),
    **{f"denoising by {name}": (Denoising(noises=(name,)), plain_text) for name in get_args(Damage)},
    "mlm, salient": (MLM(noise="salient"), special_tokens_text),
    "span corruption, salient": (SpanCorruption(noise="salient"), plain_text),
    "classification": (Classification(class_names=("a", "b", "c")), labeled),
    "classification by a decoder": (Classification(class_names=("a", "b", "c"), position="last"), labeled),
    "classification by an encoder-decoder": (Classification(class_names=("a", "b", "c"), position="answer"), labeled),
    "classification, smoothed and weighted": (
        Classification(class_names=("a", "b", "c"), label_smoothing=0.1, class_weights=(1.0, 2.0, 0.5)),
        labeled,
    ),
    "tagging": (TokenClassification(class_names=("a", "b", "c")), tagged),
    "tagging by a decoder": (TokenClassification(class_names=("a", "b", "c"), causal=True), tagged),
    "regression": (Regression(mean=1.0, std=2.0), scored),
    "regression by a decoder": (Regression(position="last"), scored),
    "regression by an encoder-decoder": (Regression(position="answer"), scored),
    "spans": (QuestionAnswering(), spanned),
    "spans by a decoder": (QuestionAnswering(position="last"), spanned),
}


def label_fields(objective: Objective) -> set[str]:
    """Return the fields of an example that hold its labels."""
    return {*counted_fields(objective).values()}


def gradient(model: LM, objective: Objective, batches: list) -> torch.Tensor:
    """Return the gradient of a step as one vector."""
    model.zero_grad()
    step(model, objective, batches)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
