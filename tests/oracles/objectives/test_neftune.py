"""The noise of NEFTune against the hook of transformers' trainer, and its lengths in padded and packed rows."""

import numpy as np
import pytest
import torch

from firth.data.collate import collate, pack
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.objectives.sft import SFT, document_lengths, noisy_embeddings
from firth.training.step import step
from firth.types import Batch, Example
from tests.support.byte_tokenizer import ByteTokenizer

neftune = pytest.importorskip("transformers.integrations.neftune")

V = ByteTokenizer.vocab.size
CONFIG = ModelConfig(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64)


def examples(*lengths: int) -> list[Example]:
    rng = np.random.default_rng(0)
    rows = [{"tokens": rng.integers(7, V, n + 1), "mask": np.arange(n + 1) >= 2} for n in lengths]
    return [SFT().build_example(row, ByteTokenizer.vocab, rng) for row in rows]


def model() -> LM:
    torch.manual_seed(0)
    return LM(CONFIG, SFT().heads(CONFIG))


def embedded(model: LM, batch: Batch, alpha: float) -> torch.Tensor:
    torch.manual_seed(1)
    with noisy_embeddings(model, batch, alpha):
        return model.tokens(batch["tokens"]).detach()


def test_noise_equals_that_of_transformers() -> None:
    """In rows without padding: transformers takes the padded length."""
    ours, batch = model(), collate(examples(12, 12, 12))
    theirs = torch.nn.Embedding(V, 32)
    theirs.weight = ours.tokens.weight
    theirs.neftune_noise_alpha = 5.0
    theirs.register_forward_hook(neftune.neftune_post_forward_hook)
    torch.manual_seed(1)
    expected = theirs(batch["tokens"]).detach()
    found = embedded(ours, batch, 5.0)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(found, ours.tokens(batch["tokens"]), atol=1e-3)


def test_noise_is_that_of_the_length_of_a_document() -> None:
    """Padding and packing do not change the strength: it is alpha / sqrt(L d) at most, and nearly reached."""
    rows, ours = examples(40, 5, 20), model()
    for batch in (collate(rows), pack(rows, 70)):
        lengths = document_lengths(batch)
        noise = (embedded(ours, batch, 5.0) - ours.tokens(batch["tokens"])).abs()
        for n in (40, 5, 20):
            found = noise[lengths == n]
            assert len(found) >= n
            assert 0.9 < float(found.detach().max()) / (5 / (n * 32) ** 0.5) <= 1.0001


def test_noise_is_in_training_only() -> None:
    ours, batch = model(), collate(examples(12, 7), {"labels"})
    noisy, plain = SFT(neftune_noise_alpha=5.0), SFT()
    ours.train()
    first, second = (float(step(ours, noisy, [batch])["tokens"]) for _ in range(2))
    assert first != second
    assert float(step(ours, plain, [batch])["tokens"]) not in (first, second)
    ours.eval()
    assert float(step(ours, noisy, [batch])["tokens"]) == float(step(ours, plain, [batch])["tokens"])
    assert not ours.tokens._forward_hooks
