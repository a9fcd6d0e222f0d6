"""Computations in slices: what they return is that of the whole computation, and no forward pass is longer than allowed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from firth.evaluate.task import EvaluatedModel
from firth.evaluate.tasks.preferences import dialogue_rewards
from firth.generate import fill
from firth.generate.embeddings import embed_slices
from firth.generate.fill import fill_masks, mask_slices
from firth.generate.scoring import ScoredPair, gap_slices, score_gaps, score_pairs, score_slices
from firth.generate.slices import Slices, finish
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config, recurrent_config
from firth.model.model import LM
from firth.objectives.reward_model import reward_head
from firth.runs.loaded_model import Model
from firth.tokenizer.train import train
from firth.tokenizer.vocab import Vocab
from tests.support.models import random_model
from tests.support.tiny_corpus import TEXTS, tokenizer

ROLES = {"pad": 0, "cls": 1, "sep": 2, "mask": 3, "bos": 1, "eos": 2}
VOCAB = Vocab(50, roles=ROLES, special=np.arange(50) < 4, sentinels=np.array([48, 49])).with_decoder_start("pad")
DECODER = decoder_config(50, 64, 2)
CONFIGS: dict[str, tuple[ModelConfig, int]] = {
    "rotary": (DECODER, 16),
    "learned": (DECODER.with_fields({"position.type": "learned"}), 16),
    "t5": (DECODER.with_fields({"position.type": "t5"}), 16),
    "lstm": (recurrent_config(50, 32, 2), 16),
    "prefix": (DECODER.with_fields({"attention.prefix_lm": True, "causal": False}), 70),
    "encoder": (encoder_config(50, 64, 2), 62),
    "halves": (encoder_decoder_config(50, 64, 2), 40),
}
"""Model -> its config, and the most tokens of a pass where 16 are allowed: a row that cannot be cut is longer."""


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the padded tokens of each forward pass."""
    found: list[int] = []
    forward = LM.forward

    def counting(self: LM, batch: Any, *context: Any) -> torch.Tensor:
        found.append(max(batch[name].numel() for name in ("tokens", "source_tokens") if name in batch))
        return forward(self, batch, *context)

    monkeypatch.setattr(LM, "forward", counting)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_in_slices_are_those_of_the_whole(name: str, passes: list[int]) -> None:
    """A text of 60 tokens, and three that are read together, one of which shares its prompt."""
    config, most = CONFIGS[name]
    model, rng = random_model(config), np.random.default_rng(0)
    pairs = [ScoredPair(rng.integers(4, 48, 20), rng.integers(4, 48, 40))]
    pairs += [ScoredPair(rng.integers(4, 48, 9), rng.integers(4, 48, n)) for n in (3, 6)]
    pairs.append(ScoredPair(pairs[0].prompt, rng.integers(4, 48, 5)))
    wanted = dict(score_pairs(model, VOCAB, pairs, 2))
    assert max(passes) > 16
    passes.clear()
    slices = list(score_slices(model, VOCAB, pairs, 2, max_tokens=16))
    assert max(passes) <= most and len(slices) >= 4
    found = dict(one for some in slices for one in some)
    assert found.keys() == wanted.keys()
    for i, scores in found.items():
        np.testing.assert_allclose(scores.logprobs, wanted[i].logprobs, atol=3e-5)
        np.testing.assert_array_equal(scores.top_ids, wanted[i].top_ids)


def test_gaps_in_slices_are_those_of_the_whole() -> None:
    model, rng = random_model(encoder_decoder_config(50, 32, 1)), np.random.default_rng(1)
    pairs = [ScoredPair(np.zeros(0, np.int64), rng.integers(4, 48, n)) for n in (30, 8)]
    wanted = dict(score_gaps(model, VOCAB, pairs))
    slices = list(gap_slices(model, VOCAB, pairs, max_tokens=64))
    assert len(slices) >= 15, "a slice has the gaps of two rows of 31 tokens"
    for i, scores in (one for some in slices for one in some):
        np.testing.assert_allclose(scores.logprobs, wanted[i].logprobs, atol=3e-5)


def count(job: Slices[Any]) -> tuple[int, Any]:
    """Run a computation; return the number of slices and its result."""
    slices = 1
    while True:
        try:
            next(job)
        except StopIteration as end:
            return slices, end.value
        slices += 1


@pytest.mark.parametrize("make", [decoder_config, encoder_config, encoder_decoder_config])
def test_embeddings_in_slices(make: Callable[..., ModelConfig], passes: list[int]) -> None:
    words = tokenizer()
    model = random_model(make(words.vocab.size, 32, 1, num_heads=2))
    texts = [TEXTS[0][:400], TEXTS[1][:30], TEXTS[2][:30]]
    whole = finish(embed_slices(model, words, texts))[0]
    passes.clear()
    slices, (found, _) = count(embed_slices(model, words, texts, max_tokens=64))
    np.testing.assert_allclose(found, whole, atol=1e-5)
    assert slices >= 3
    if make is decoder_config:  # an encoder reads its longest text at once
        assert max(passes) <= 64


def test_rewards_in_slices(passes: list[int]) -> None:
    chatty = train(TEXTS[:4], "byte-bpe", 300, num_sentinels=0)
    model = random_model(decoder_config(chatty.vocab.size, 32, 1, 2), reward=reward_head(32))
    evaluated = Model.of(model, chatty).evaluated
    dialogues = [
        [{"role": "user", "content": TEXTS[i][:n]}, {"role": "assistant", "content": TEXTS[i][n : 2 * n]}]
        for i, n in enumerate((150, 12, 20))
    ]
    wanted = finish(dialogue_rewards(evaluated, dialogues))
    passes.clear()
    slices, found = count(dialogue_rewards(evaluated, dialogues, 48))
    assert found == pytest.approx(wanted, abs=1e-5) and slices >= 4 and max(passes) <= 48


def test_masks_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    words = train(TEXTS[:4], "wordpiece", 300)
    model = random_model(encoder_config(words.vocab.size, 32, 1, num_heads=2))
    text = "The <mask> of <mask> is <mask> and <mask>".replace("<mask>", words.token(words.vocab.mask))
    wanted = fill_masks(model, words, text, 3)
    monkeypatch.setattr(fill, "MAX_LOGIT_ROWS", 1)
    slices, found = count(mask_slices(model, words, text, 3))
    assert slices == 5 and [[one.token for one in gap] for gap in found] == [
        [one.token for one in gap] for gap in wanted
    ]


@pytest.mark.parametrize("sentinels", [0, 8], ids=["whole text", "spans"])
def test_generated_fillings_in_slices(sentinels: int) -> None:
    """A slice is one step of decoding."""
    words = tokenizer() if sentinels else train(TEXTS[:4], "bpe", 300)
    config = encoder_decoder_config(words.vocab.size, 32, 1, num_heads=2)
    config = replace(config, max_positions=64) if not sentinels else config
    model = Model.of(random_model(config), words)
    if not model.can_fill:
        pytest.fail("the model cannot fill")
    slices, found = count(model.candidate_slices("The <mask> of it", 3))
    assert slices > 10 and found == model.candidates("The <mask> of it", 3)


def test_written_answers_in_slices() -> None:
    words = tokenizer()
    model = Model.of(random_model(encoder_decoder_config(words.vocab.size, 32, 1, num_heads=2)), words)
    slices, found = count(model.attention_slices("The name of it"))
    assert slices > 10
    for one, other in zip(found, model.attention("The name of it"), strict=True):
        np.testing.assert_array_equal(one.weights, other.weights)


def test_an_evaluated_model_is_as_it_was(passes: list[int]) -> None:
    """A computation that is given up half-way leaves the model in the mode that it had."""
    words = tokenizer()
    model = random_model(decoder_config(words.vocab.size, 32, 1, num_heads=2)).train()
    job = embed_slices(model, words, [TEXTS[0][:400]], max_tokens=32)
    next(job)
    job.close()
    assert model.training and len(passes) == 1 and isinstance(Model.of(model, words).evaluated, EvaluatedModel)
