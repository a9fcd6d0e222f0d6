"""A table of which few rows are read: AdamW on those alone is AdamW on all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from firth import kernels
from firth.data.collate import collate
from firth.model.config import encoder_config, word_vector_config
from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.objectives.masked_lm import MLM
from firth.objectives.word2vec import Word2Vec
from firth.tokenizer.vocab import Vocab
from firth.train.optimizer import Optimizer, OptimizerConfig, untied_embeddings
from firth.train.sparse_adam import KERNEL, SparseAdam, coalesced
from firth.train.step import step
from firth.types import Batch

BETAS, EPS = (0.9, 0.98), 1e-8
VOCAB = Vocab(size=60, roles={"pad": 0, "cls": 1, "sep": 2, "mask": 3}, special=np.arange(60) < 4)
OBJECTIVE = Classification(class_names=("a", "b"))


@pytest.fixture(params=KERNEL.measure())
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels.forced({KERNEL.name: request.param}):
        yield request.param


def test_many_steps_are_those_of_adamw_on_the_whole_table(way: str) -> None:
    """Rows come late, again and again, twice in a step, and not at all; then the whole table has a gradient."""
    torch.manual_seed(0)
    start = torch.randn(50, 32)
    sparse, dense = (
        nn.Embedding(50, 32, sparse=True, _weight=start.clone()),
        nn.Embedding(50, 32, _weight=start.clone()),
    )
    adam = torch.optim.AdamW(dense.parameters(), lr=1.0, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    rows = SparseAdam(sparse.weight, BETAS, EPS)
    rng = np.random.default_rng(0)
    for number in range(40):
        read = torch.from_numpy(rng.integers(0, min(45, 4 + number), 6))
        weights = torch.randn(6, 32)
        for table in (sparse, dense):
            table.zero_grad()
            loss = (table(read) * weights).sum()
            if number == 35:
                loss = loss + table.weight.square().sum()
            loss.backward()
        rate = 0.01 * (1 + number % 3)
        adam.param_groups[0]["lr"] = rate
        adam.step()
        rows.update(rate)
        if number == 34:
            assert len(rows.seen) < 45
            assert torch.equal(sparse.weight[45:], start[45:])
        torch.testing.assert_close(sparse.weight, dense.weight, rtol=1e-6, atol=5e-7 if way == "native" else 1e-7)
    kept = adam.state[dense.weight]
    state = rows.state()
    assert int(state["step"]) == 40
    torch.testing.assert_close(state["mean"], kept["exp_avg"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state["square"], kept["exp_avg_sq"], rtol=5e-6 if way == "native" else 1e-6, atol=1e-7)


def test_rows_read_twice_are_added_up(way: str) -> None:
    torch.manual_seed(0)
    index, values = torch.randint(900, (1, 3000)), torch.randn(3000, 40)
    grad = torch.sparse_coo_tensor(index, values, (1000, 40))
    found, right = coalesced(grad), grad.double().coalesce()
    assert found.is_coalesced() and torch.equal(found.indices(), right.indices())
    torch.testing.assert_close(found.values().double(), right.values(), rtol=1e-5, atol=1e-5)


def batches() -> Iterator[Batch]:
    rng = np.random.default_rng(1)
    while True:
        texts = [{"tokens": rng.integers(4, 40, rng.integers(2, 9)), "label": int(rng.integers(2))} for _ in range(4)]
        yield collate([OBJECTIVE.build_example(text, VOCAB, rng) for text in texts], {"class"})


def model() -> LM:
    torch.manual_seed(0)
    config = encoder_config(vocab_size=60, hidden_size=32, num_layers=1, num_heads=2, max_positions=16)
    return LM(config, OBJECTIVE.heads(config))


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_a_mover_moves_and_clips_alike(clip: float, way: str) -> None:
    plan = OptimizerConfig(name="adamw", lr=1e-2, max_grad_norm=clip)
    one, other = model(), model()
    movers = [Optimizer(plan, one, sparse=True), Optimizer(plan, other)]
    assert list(movers[0].rows) == ["tokens.weight"]
    assert not movers[1].rows
    for _, batch in zip(range(12), batches(), strict=False):
        norms = []
        for mover, net in zip(movers, (one, other), strict=True):
            step(net, OBJECTIVE, [batch, batch])  # micro-batches add up
            norms.append(mover.clip_grad_norm())
            mover.step(0.7)
        torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    assert one.tokens.sparse  # type: ignore[union-attr]
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert {*movers[0].state()} == {*movers[1].state()}


def test_a_resumed_mover_goes_on_bit_for_bit(way: str) -> None:
    """Whichever of the two wrote the state."""
    plan = OptimizerConfig(name="adamw", lr=1e-2)
    going = model()
    mover, stream = Optimizer(plan, going, sparse=True), batches()

    def some(net: LM, by: Optimizer, those: list[Batch]) -> None:
        for batch in those:
            step(net, OBJECTIVE, [batch])
            by.clip_grad_norm()
            by.step(1.0)

    some(going, mover, [next(stream) for _ in range(5)])
    saved = {name: value.clone() for name, value in mover.state().items()}
    resumed = model()
    resumed.load_state_dict(going.state_dict())
    again = Optimizer(plan, resumed, sparse=True)
    again.restore(saved)
    rest = [next(stream) for _ in range(5)]
    some(going, mover, rest)
    some(resumed, again, rest)
    assert all(torch.equal(a, b) for a, b in zip(going.parameters(), resumed.parameters(), strict=True))
    whole = Optimizer(plan, model())
    whole.restore(mover.state())
    told, mine = whole.state(), mover.state()
    assert all(torch.equal(told[name], mine[name]) for name in mine)


def test_a_table_that_a_head_shares_is_left_as_it_is() -> None:
    config = encoder_config(vocab_size=60, hidden_size=32, num_layers=1, num_heads=2, max_positions=16)
    assert config.tie_embeddings
    assert not untied_embeddings(LM(config, MLM().heads(config)))
    assert not untied_embeddings(nn.Linear(2, 2))
    assert len(untied_embeddings(model())) == 1
    words = word_vector_config(60, 8)
    assert len(untied_embeddings(LM(words, Word2Vec().heads(words)))) == 2
