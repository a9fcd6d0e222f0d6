"""Loss early and late in the context, and copying of a repeated random sequence, against a forward pass written out."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from firth.data.source import Source
from firth.evaluate import in_context
from firth.evaluate.in_context import BAND, copying, in_context_score, in_context_texts
from firth.generate.decoding_batch import rectangle
from firth.generate.scoring import ScoredPair, TokenScores, score_pairs
from firth.model.config import decoder_config
from firth.model.model import LM
from firth.tokenizer.vocab import Vocab
from firth.types import Example, UserError
from tests.support.models import random_model
from tests.support.tiny_corpus import tokenizer

VOCAB = tokenizer().vocab


class Rows(Source):
    """Examples of given tokens, some of which hold two documents."""

    def __init__(self, lengths: list[int], split: int = 0) -> None:
        self.sizes, self.split = lengths, split

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Example:
        tokens = np.random.default_rng(index).integers(20, VOCAB.size, self.sizes[index]).astype(np.int32)
        ids = (np.arange(len(tokens)) >= self.split).astype(np.int32)
        return {"tokens": tokens} | ({"document_ids": ids} if self.split else {})


def model(context: int = 600) -> LM:
    return random_model(decoder_config(VOCAB.size, 32, 2, num_heads=2, max_positions=context))


def losses(lm: LM, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the loss of each token of a row but the first, and whether it is the most likely one."""
    with torch.inference_mode():
        logits = lm.heads["lm"](lm(rectangle([row[:-1]], torch.device("cpu")))[0]).log_softmax(-1)
    labels = torch.from_numpy(row[1:].astype(np.int64))
    return -logits.gather(-1, labels[:, None])[:, 0].double().numpy(), (logits.argmax(-1) == labels).numpy()


def test_the_score_is_the_difference_of_losses_at_two_tokens() -> None:
    """Means of 16 tokens around tokens 50 and 500, over texts."""
    lm, source = model(), Rows([520] * 3)
    texts = in_context_texts(source, lm.context, 8)
    assert (texts.early, texts.late, len(texts.rows)) == (50, 500, 3)
    found = in_context_score(lm, VOCAB, texts)
    each = [losses(lm, row)[0] for row in texts.rows]
    for at in (50, 500):
        expected = np.mean([row[at - BAND // 2 - 1 : at + BAND // 2 - 1] for row in each])
        assert found[f"loss_at_token_{at}"] == pytest.approx(expected, abs=1e-4)
    assert found["in_context_score"] == pytest.approx(found["loss_at_token_500"] - found["loss_at_token_50"])


def test_short_contexts_are_measured_as_far_as_they_reach() -> None:
    """By the context, by the texts, and by the documents in them."""
    texts = in_context_texts(Rows([520] * 40), 256, 20)
    assert (texts.early, texts.late, len(texts.rows)) == (50, 248, 20)
    texts = in_context_texts(Rows([100] * 20 + [400]), 512, 64)
    assert (texts.early, texts.late) == (23, 92)
    texts = in_context_texts(Rows([300] * 20, split=180), 512, 64)
    assert texts.late == 172 and all(len(row) == 180 for row in texts.rows)
    with pytest.raises(UserError, match="needs held-out text of 64 tokens"):
        in_context_texts(Rows([60] * 20), 512, 64)
    with pytest.raises(UserError, match="the model reads 32"):
        in_context_texts(Rows([520] * 20), 32, 64)


def test_copying_scores_the_second_half_without_its_first_token() -> None:
    """The sequences are the same in each call and hold no special token."""
    lm = model(128)
    found = copying(lm, VOCAB, 3)
    plain = np.array([i for i in range(VOCAB.size) if not VOCAB.special[i]])
    rng = np.random.default_rng(0)
    rows = [rng.choice(plain, 64) for _ in range(3)]
    each = [losses(lm, np.concatenate((row, row))) for row in rows]
    assert found["copying_loss"] == pytest.approx(np.mean([one[64:] for one, _ in each]), abs=1e-4)
    assert found["copying_accuracy"] == np.mean([hit[64:] for _, hit in each])
    assert copying(lm, VOCAB, 3) == found


def test_no_special_token_and_no_unused_id_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """All drawn tokens are in the tokenizer's model, and none is one of its control tokens."""
    coder = tokenizer()
    definition = json.loads(coder.definition)
    control = {token["id"] for token in definition["added_tokens"] if token["special"]}
    names = definition["model"]["vocab"]
    known = set(names.values() if isinstance(names, dict) else range(len(names)))
    unused = sorted(known - control)[::3]
    drawn: list[np.ndarray] = []

    def kept(lm: LM, vocab: Vocab, pairs: Sequence[ScoredPair]) -> Iterator[tuple[int, TokenScores]]:
        drawn.extend(pair.continuation for pair in pairs)
        return score_pairs(lm, vocab, pairs)

    monkeypatch.setattr(in_context, "score_pairs", kept)
    copying(model(128), replace(coder.vocab, holes=np.array(unused)), 100)
    found = set(np.concatenate(drawn).tolist())
    assert found <= known - control - set(unused)
    assert len(found) > 0.9 * len(known - control - set(unused))
    assert len(control) > len(set(coder.vocab.roles.values())), "the tokenizer has control tokens without a role"


def test_a_model_that_repeats_copies() -> None:
    """Trained on repeated sequences of a period, it predicts the second half; untrained it does not."""
    lm = random_model(decoder_config(VOCAB.size, 32, 2, num_heads=2, max_positions=16))
    before = copying(lm, VOCAB, 4)
    rng = np.random.default_rng(0)
    plain = np.array([i for i in range(VOCAB.size) if not VOCAB.special[i]])
    rows = [np.tile(rng.choice(plain, 8), 2) for _ in range(4)]
    optimizer = torch.optim.Adam(lm.parameters(), 1e-2)
    for _ in range(60):
        batch = rectangle([row[:-1] for row in rows], torch.device("cpu"))
        logits = lm.heads["lm"](lm(batch))
        labels = torch.from_numpy(np.stack(rows)[:, 1:])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = copying(lm, VOCAB, 4)
    assert before["copying_accuracy"] < 0.2 and after["copying_accuracy"] > 0.9
    assert after["copying_loss"] < 1 < before["copying_loss"]
