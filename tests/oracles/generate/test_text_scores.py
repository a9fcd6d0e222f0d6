"""Scores of texts without a prompt equal what transformers computes: gaps of T5, masks of BERT, the chain rule of GPT-2."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firth.generate.scoring import ScoredPair, score_gaps, score_pairs
from firth.model.model import LM
from firth.pretrained.load_save import save_model
from firth.tokenizer.vocab import Vocab
from tests.support.hf_families import AUTO_CLASSES, CONFIGS
from tests.support.models import perturbed_model

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")

ROLES = {"pad": 0, "bos": 1, "eos": 2, "cls": 1, "sep": 2, "mask": 3}
VOCAB = Vocab(size=61, roles=ROLES, special=np.arange(61) < 6, sentinels=np.array([4, 5])).with_decoder_start("pad")
NONE = np.zeros(0, np.int64)
TEXTS = [np.random.default_rng(seed).integers(6, 61, length) for seed, length in enumerate((7, 1, 12, 7))]
WORDS = [np.random.default_rng(seed + 9).random(len(text)) < 0.6 for seed, text in enumerate(TEXTS)]


def exported(name: str, tmp_path: Path) -> tuple[LM, Any]:
    """Return a model of firth, and the model that transformers loads from its files."""
    model = perturbed_model(CONFIGS[name])
    save_model(model, None, tmp_path)
    return model, getattr(transformers, AUTO_CLASSES[name.split("-")[0]]).from_pretrained(tmp_path).eval()


def logprobs_of(model: Any, tokens: np.ndarray, labels: np.ndarray, at: slice, **fields: Any) -> np.ndarray:
    """Return log p of labels (n,) at positions of transformers' output."""
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(tokens)[None], **fields).logits[0, at].log_softmax(-1)
    return logits[torch.arange(len(labels)), torch.as_tensor(labels)].double().numpy()


def bounds(starts: np.ndarray | None, length: int) -> list[tuple[int, int]]:
    """Return start and stop of each word, or of each token."""
    edges = [i for i in range(length) if i == 0 or starts is None or starts[i]] + [length]
    return list(itertools.pairwise(edges))


@pytest.mark.parametrize("by_word", [False, True])
@pytest.mark.parametrize("name", ["t5-v1.0", "t5-v1.1"])
def test_t5_fills_each_gap_and_ends_it(name: str, by_word: bool, tmp_path: Path) -> None:
    ours, theirs = exported(name, tmp_path)
    words = WORDS if by_word else [None] * len(TEXTS)
    pairs = [ScoredPair(NONE, text, starts) for text, starts in zip(TEXTS, words, strict=True)]
    found = dict(score_gaps(ours, VOCAB, pairs))
    for i, (text, starts) in enumerate(zip(TEXTS, words, strict=True)):
        expected = np.zeros(len(text))
        for start, stop in bounds(starts, len(text)):
            source = np.concatenate((text[:start], [4], text[stop:], [2]))
            target = np.concatenate(([4], text[start:stop], [5]))
            shown = torch.as_tensor(np.concatenate(([0], target[:-1])))[None]
            some = logprobs_of(theirs, source, target, slice(None), decoder_input_ids=shown)
            expected[start:stop] = some[1:-1]
            expected[stop - 1] += some[-1]
        np.testing.assert_allclose(found[i].logprobs, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("by_word", [False, True])
def test_bert_masks_each_token_and_the_rest_of_its_word(by_word: bool, tmp_path: Path) -> None:
    """Salazar 2020, and Kauf and Ivanova 2023."""
    ours, theirs = exported("bert", tmp_path)
    words = WORDS if by_word else [None] * len(TEXTS)
    pairs = [ScoredPair(NONE, text, starts) for text, starts in zip(TEXTS, words, strict=True)]
    found = dict(score_pairs(ours, VOCAB, pairs))
    for i, (text, starts) in enumerate(zip(TEXTS, words, strict=True)):
        expected = []
        for start, stop in bounds(starts, len(text)):
            for at in range(start, stop):
                row = np.concatenate(([1], text, [2]))
                row[1 + at : 1 + stop] = 3
                expected.append(logprobs_of(theirs, row, text[at : at + 1], slice(1 + at, 2 + at))[0])
        np.testing.assert_allclose(found[i].logprobs, expected, atol=2e-4, rtol=1e-5)


def test_gpt2_multiplies_along_the_text(tmp_path: Path) -> None:
    ours, theirs = exported("gpt2", tmp_path)
    found = dict(score_pairs(ours, VOCAB, [ScoredPair(np.array([1]), text) for text in TEXTS]))
    for i, text in enumerate(TEXTS):
        expected = logprobs_of(theirs, np.concatenate(([1], text[:-1])), text, slice(None))
        np.testing.assert_allclose(found[i].logprobs, expected, atol=2e-4, rtol=1e-5)
