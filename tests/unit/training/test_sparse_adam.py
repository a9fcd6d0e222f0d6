"""Sparse AdamW on the used rows of an embedding table equals AdamW on the whole table."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from firth import kernel_choice
from firth.data.collate import collate
from firth.model.config import encoder_config, word_vector_config
from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.objectives.masked_lm import MLM
from firth.objectives.word2vec import Word2Vec
from firth.tokenizer.vocab import Vocab
from firth.training.optimizer import KERNEL, Optimizer, OptimizerConfig, SparseAdam, coalesced, untied_embeddings
from firth.training.step import step
from firth.types import Batch

BETAS, EPS = (0.9, 0.98), 1e-8
VOCAB = Vocab(size=60, roles={"pad": 0, "cls": 1, "sep": 2, "mask": 3}, special=np.arange(60) < 4)
OBJECTIVE = Classification(class_names=("a", "b"))


@pytest.fixture(params=KERNEL.measure())
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernel_choice.forced({KERNEL.name: request.param}):
        yield request.param


def test_many_steps_equal_adamw_on_the_whole_table(way: str) -> None:
    """Rows are used late, repeatedly, twice in a step, and never; then the whole table has a gradient."""
    torch.manual_seed(0)
    initial = torch.randn(50, 32)
    sparse, dense = (
        nn.Embedding(50, 32, sparse=True, _weight=initial.clone()),
        nn.Embedding(50, 32, _weight=initial.clone()),
    )
    adam = torch.optim.AdamW(dense.parameters(), lr=1.0, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    rows = SparseAdam(sparse.weight, BETAS, EPS)
    rng = np.random.default_rng(0)
    for number in range(40):
        index = torch.from_numpy(rng.integers(0, min(45, 4 + number), 6))
        weights = torch.randn(6, 32)
        for table in (sparse, dense):
            table.zero_grad()
            loss = (table(index) * weights).sum()
            if number == 35:
                loss = loss + table.weight.square().sum()
            loss.backward()
        lr = 0.01 * (1 + number % 3)
        adam.param_groups[0]["lr"] = lr
        adam.step()
        rows.update(lr)
        if number == 34:
            assert len(rows.seen) < 45
            assert torch.equal(sparse.weight[45:], initial[45:])
        torch.testing.assert_close(sparse.weight, dense.weight, rtol=1e-6, atol=5e-7 if way == "native" else 1e-7)
    expected = adam.state[dense.weight]
    state = rows.state()
    assert int(state["step"]) == 40
    torch.testing.assert_close(state["mean"], expected["exp_avg"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        state["square"], expected["exp_avg_sq"], rtol=5e-6 if way == "native" else 1e-6, atol=1e-7
    )


def test_duplicate_rows_are_summed(way: str) -> None:
    torch.manual_seed(0)
    index, values = torch.randint(900, (1, 3000)), torch.randn(3000, 40)
    grad = torch.sparse_coo_tensor(index, values, (1000, 40))
    found, expected = coalesced(grad), grad.double().coalesce()
    assert found.is_coalesced() and torch.equal(found.indices(), expected.indices())
    torch.testing.assert_close(found.values().double(), expected.values(), rtol=1e-5, atol=1e-5)


def batches() -> Iterator[Batch]:
    rng = np.random.default_rng(1)
    while True:
        texts = [{"tokens": rng.integers(4, 40, rng.integers(2, 9)), "label": int(rng.integers(2))} for _ in range(4)]
        yield collate([OBJECTIVE.build_example(text, VOCAB, rng) for text in texts], {"class"})


def model() -> LM:
    torch.manual_seed(0)
    config = encoder_config(vocab_size=60, hidden_size=32, num_layers=1, num_heads=2, max_positions=16)
    return LM(config, OBJECTIVE.heads(config))


@pytest.mark.slow
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_sparse_and_dense_optimizers_agree(clip: float, way: str) -> None:
    config = OptimizerConfig(name="adamw", lr=1e-2, max_grad_norm=clip)
    one, other = model(), model()
    optimizers = [Optimizer(config, one, sparse=True), Optimizer(config, other)]
    assert list(optimizers[0].rows) == ["tokens.weight"]
    assert not optimizers[1].rows
    for _, batch in zip(range(12), batches(), strict=False):
        norms = []
        for optimizer, net in zip(optimizers, (one, other), strict=True):
            step(net, OBJECTIVE, [batch, batch])  # micro-batches add up
            norms.append(optimizer.clip_grad_norm())
            optimizer.step(0.7)
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    assert one.tokens.sparse  # type: ignore[union-attr]
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)
    assert {*optimizers[0].state()} == {*optimizers[1].state()}


def test_a_restored_optimizer_continues_bit_for_bit(way: str) -> None:
    """The state is also the same for sparse and dense optimizers."""
    config = OptimizerConfig(name="adamw", lr=1e-2)
    original = model()
    optimizer, stream = Optimizer(config, original, sparse=True), batches()

    def train(net: LM, by: Optimizer, some: list[Batch]) -> None:
        for batch in some:
            step(net, OBJECTIVE, [batch])
            by.clip_grad_norm()
            by.step(1.0)

    train(original, optimizer, [next(stream) for _ in range(5)])
    saved = {name: value.clone() for name, value in optimizer.state().items()}
    resumed = model()
    resumed.load_state_dict(original.state_dict())
    restored = Optimizer(config, resumed, sparse=True)
    restored.restore(saved)
    rest = [next(stream) for _ in range(5)]
    train(original, optimizer, rest)
    train(resumed, restored, rest)
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), resumed.parameters(), strict=True))
    dense = Optimizer(config, model())
    dense.restore(optimizer.state())
    dense_state, sparse_state = dense.state(), optimizer.state()
    assert all(torch.equal(dense_state[name], sparse_state[name]) for name in sparse_state)


def test_tied_embeddings_are_not_sparse() -> None:
    config = encoder_config(vocab_size=60, hidden_size=32, num_layers=1, num_heads=2, max_positions=16)
    assert config.tie_embeddings
    assert not untied_embeddings(LM(config, MLM().heads(config)))
    assert not untied_embeddings(nn.Linear(2, 2))
    assert len(untied_embeddings(model())) == 1
    words = word_vector_config(60, 8)
    assert len(untied_embeddings(LM(words, Word2Vec().heads(words)))) == 2
