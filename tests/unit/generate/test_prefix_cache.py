"""The prefix cache: the longest common beginning is found, and it holds no more bytes than it may."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.generate.scheduler import BLOCK, GenerationRequest, PrefixCache, Scheduler
from firth.model.config import decoder_config
from firth.model.kv_cache import KVCache
from firth.runs.peft_options import prefix_of
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.models import random_model

V = ByteTokenizer.vocab.size
CONFIG = decoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, max_positions=64)
BLOCK_BYTES = 2 * 2 * 4 * BLOCK * 8 * 4
"""Sides, layers, heads, tokens, width, bytes of a number."""


def answer(scheduler: Scheduler, prompt: np.ndarray) -> np.ndarray:
    scheduler.submit(GenerationRequest(prompt, Sampling(temperature=0, max_new_tokens=8), top_logprobs=2))
    while scheduler.busy:
        for update in scheduler.step():
            if update.completion is not None:
                found = update.completion
    [alone] = scheduler.engine.generate([prompt], Sampling(temperature=0, max_new_tokens=8))
    assert found.tokens.tolist() == alone.tokens.tolist()
    assert np.allclose(found.logprobs, alone.logprobs, atol=1e-5)
    return found.tokens


@pytest.mark.parametrize("trained", [False, True])
def test_prompts_with_a_common_beginning_are_read_once(trained: bool) -> None:
    model, rng = random_model(CONFIG), np.random.default_rng(0)
    if trained:
        model.heads["prefix"] = prefix_of(model, [8, 9, 10])
    scheduler = Scheduler(Engine(model, ByteTokenizer(), stops=()), prefill_chunk=32)
    system = rng.integers(7, V, 40)
    prompts = [np.concatenate((system, rng.integers(7, V, n))) for n in (3, 9, 1)] + [system[:33], system[:32]]
    for prompt, known in zip(prompts, (0, 32, 32, 32, 16), strict=True):
        assert scheduler.prefixes.length(prompt) == known
        answer(scheduler, prompt)
    ahead = 3 * trained
    assert (
        scheduler.prefixes.bytes == 3 * BLOCK_BYTES + ahead * BLOCK_BYTES // BLOCK
    )  # 40 + 9 tokens: a block of their own
    assert scheduler.prefixes.find(prompts[0]).shape == (2, 2, 4, ahead + 32, 8)


def test_a_hit_reads_the_rest_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIG)
    scheduler, read, forward = Scheduler(Engine(model, ByteTokenizer(), stops=())), [], model.forward

    def counted(batch: dict[str, torch.Tensor], *rest: object) -> torch.Tensor:
        read.append(batch["tokens"].shape[-1])
        return forward(batch, *rest)

    monkeypatch.setattr(model, "forward", counted)
    prompt = np.random.default_rng(0).integers(7, V, 50)
    for expected in (50, 2):
        read.clear()
        scheduler.submit(GenerationRequest(prompt, Sampling(temperature=0, max_new_tokens=1)))
        scheduler.step()
        assert read == [expected]


def fake(prompt: np.ndarray, trained: int = 0) -> KVCache:
    """Return a cache of two rows, the second of which holds a prompt; its keys are the token ids."""
    cache = KVCache(2, trained + len(prompt) + 2)
    x = torch.zeros(2, 1, trained + len(prompt), 1)
    x[1, 0, trained:, 0] = torch.as_tensor(prompt.astype(np.float32))
    cache.extend(x, -x)
    cache.advance(x.shape[2])
    return cache


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    order=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 70)), min_size=1, max_size=30),
    blocks=st.integers(0, 6),
)
def test_the_longest_prefix_is_found_within_the_bytes(order: list[tuple[int, int, int]], blocks: int) -> None:
    """Prompts share 0, 20, 40 or 60 tokens. Whatever is found is right, and what was stored last is there."""
    base = np.arange(1, 100)
    cache = PrefixCache(blocks * 2 * BLOCK * 4 + 5)
    for kind, shared, length in order:
        prompt = np.concatenate((base[: shared * 20], base[shared * 20 :] + 100 * kind))[:length]
        found = cache.length(prompt)
        assert found < length and found % BLOCK == 0
        if found:
            pairs = cache.find(prompt)
            assert pairs[0, 0, 0, :, 0].tolist() == prompt[:found].tolist()
            assert torch.equal(pairs[1], -pairs[0])
        cache.store(prompt, fake(prompt), 1)
        assert cache.bytes <= cache.max_bytes
        assert cache.bytes == sum(block.pairs.nbytes for block in cache._blocks.values())
        assert cache.length(np.append(prompt, 0)) == BLOCK * min(length // BLOCK, blocks)


def test_the_least_recently_used_prompt_goes_first() -> None:
    cache = PrefixCache(3 * 2 * BLOCK * 4)
    one, two, three = (np.arange(BLOCK + 1) + 100 * i for i in range(3))
    for prompt in (one, two, three):
        cache.store(prompt, fake(prompt), 1)
    assert cache.length(one)
    cache.store(one + 1000, fake(one + 1000), 1)
    assert [cache.length(prompt) for prompt in (one, two, three, one + 1000)] == [BLOCK, 0, BLOCK, BLOCK]
