"""The scheduler: requests join and leave at any time, and each is answered as it would be alone."""

import numpy as np
import pytest
import torch

from firth.generate.engine import Engine
from firth.generate.output import Completion
from firth.generate.sampling import Sampling
from firth.generate.scheduler import GenerationRequest, Scheduler, Update
from firth.model.config import ModelConfig, PositionConfig, decoder_config, encoder_decoder_config, recurrent_config
from firth.model.model import LM
from firth.types import UserError
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.models import random_model, random_prompts

V = ByteTokenizer.vocab.size
SIZES = {"vocab_size": V, "hidden_size": 32, "num_layers": 2, "max_positions": 64}
CONFIGS = {
    "rotary, grouped": decoder_config(**SIZES, num_heads=4).with_fields({"num_kv_heads": 2}),
    "learned positions": ModelConfig(**SIZES, num_heads=2),
    "relative positions": ModelConfig(**SIZES, num_heads=2, position=PositionConfig("t5")),
    "encoder-decoder": encoder_decoder_config(**SIZES, num_heads=2),
    "recurrent": recurrent_config(vocab_size=V, hidden_size=32, num_layers=2),
}
GREEDY = Sampling(temperature=0, max_new_tokens=10)


def engine(model: LM, stops: tuple[int, ...] = ()) -> Engine:
    return Engine(model, ByteTokenizer(), stops=stops)


def finish(scheduler: Scheduler) -> list[Update]:
    """Run a scheduler to its end and return all updates."""
    updates = []
    while scheduler.busy:
        updates += scheduler.step()
    return updates


def completions(updates: list[Update]) -> dict[int, Completion]:
    return {update.id: update.completion for update in updates if update.completion is not None}


def test_late_requests_are_answered_as_alone(model: LM) -> None:
    """A request every other step, more than there are rows, with prompts of several chunks."""
    own, prompts = engine(model), random_prompts(7, shortest=2)
    scheduler, updates = Scheduler(own, max_rows=3, prefill_chunk=6), []
    for prompt in prompts:
        scheduler.submit(GenerationRequest(prompt, GREEDY))
        updates += scheduler.step() + scheduler.step()
    found = completions(updates + finish(scheduler))
    for i, prompt in enumerate(prompts):
        [alone] = own.generate([prompt], GREEDY)
        assert found[i].tokens.tolist() == alone.tokens.tolist()
        assert np.allclose(found[i].logprobs, alone.logprobs, atol=1e-5)


def test_updates_join_to_the_completion(model: LM) -> None:
    own = engine(model)
    scheduler = Scheduler(own)
    prompts = random_prompts(3)
    for prompt in prompts:
        scheduler.submit(GenerationRequest(prompt, Sampling(max_new_tokens=20), seed=4, top_logprobs=3))
    updates = finish(scheduler)
    for i, answer in completions(updates).items():
        mine = [update for update in updates if update.id == i]
        assert [update.token for update in mine] == answer.tokens.tolist()
        assert np.allclose([update.logprob for update in mine], answer.logprobs)
        assert "".join(update.text for update in mine) == answer.text
        for update in mine:
            assert len(update.alternatives) == 3
            values = [value for _, value in update.alternatives]
            assert values == sorted(values, reverse=True)
            assert update.logprob <= values[0]
            if update.token in dict(update.alternatives):
                assert dict(update.alternatives)[update.token] == pytest.approx(update.logprob)
    assert [a.tokens.tolist() for a in completions(updates).values()] == [
        a.tokens.tolist() for a in own.generate(prompts, Sampling(max_new_tokens=20), seeds=[4, 4, 4])
    ]


def test_rows_have_parameters_of_their_own(model: LM) -> None:
    own, prompts = engine(model), random_prompts(5)
    kinds = [
        GREEDY,
        Sampling(max_new_tokens=5, temperature=0.7),
        Sampling(max_new_tokens=12, top_k=4, top_p=0.9),
        Sampling(max_new_tokens=9, min_p=0.1, repetition_penalty=1.5),
        Sampling(max_new_tokens=12, temperature=0.0, repetition_penalty=2.0),
    ]
    scheduler = Scheduler(own)
    for i, (prompt, sampling) in enumerate(zip(prompts, kinds, strict=True)):
        scheduler.submit(GenerationRequest(prompt, sampling, seed=i))
    found = completions(finish(scheduler))
    for i, (prompt, sampling) in enumerate(zip(prompts, kinds, strict=True)):
        [alone] = own.generate([prompt], sampling, seeds=[i])
        assert found[i].tokens.tolist() == alone.tokens.tolist()


def test_a_canceled_request_frees_its_row(model: LM) -> None:
    own, prompts = engine(model), random_prompts(4, shortest=3)
    scheduler = Scheduler(own, max_rows=2, prefill_chunk=16)
    ids = [scheduler.submit(GenerationRequest(prompt, GREEDY)) for prompt in prompts]
    first = {update.id for update in scheduler.step() + scheduler.step()}
    assert first < set(ids)
    scheduler.cancel(min(first))
    scheduler.cancel(ids[-1])
    scheduler.cancel(ids[-1])
    after = scheduler.step()
    assert min(first) not in {update.id for update in after}
    found = completions(finish(scheduler))
    assert set(found) == set(ids) - {min(first), ids[-1]}
    for i in found:
        assert found[i].tokens.tolist() == own.generate([prompts[i]], GREEDY)[0].tokens.tolist()


class Digits:
    """Allows the digits, and after three of them nothing."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def mask(self, tokens: list[int]) -> np.ndarray:
        assert tokens == self.accepted
        allowed = np.zeros(V, bool)
        if len(tokens) < 3:
            allowed[ByteTokenizer().encode("0123456789")] = True
        return allowed

    def accept(self, token: int) -> None:
        self.accepted.append(token)


def test_a_constraint_restricts_one_row(model: LM) -> None:
    own, [prompt] = engine(model, (3,)), random_prompts(1)
    scheduler = Scheduler(own)
    scheduler.submit(GenerationRequest(prompt, Sampling(max_new_tokens=10), seed=1, constraint=Digits()))
    scheduler.submit(GenerationRequest(prompt, GREEDY))
    found = completions(finish(scheduler))
    text = ByteTokenizer().decode(found[0].tokens)
    assert text.isdigit() and len(text) == 3
    assert found[0].finish == "stop"
    scores = own.score([prompt], [found[0].tokens])
    assert scores[0] == pytest.approx(found[0].logprobs.sum(), abs=1e-4), "logprobs are the model's"
    assert found[1].tokens.tolist() == own.generate([prompt], GREEDY)[0].tokens.tolist()


def test_requests_that_cannot_be_answered_are_rejected(model: LM) -> None:
    scheduler = Scheduler(engine(model))
    with pytest.raises(UserError, match="empty prompt"):
        scheduler.submit(GenerationRequest(np.zeros(0, int), GREEDY))
    with pytest.raises(UserError, match=r"the prompt has \d+ tokens"):
        scheduler.submit(GenerationRequest(np.full(model.context + 1, 9), GREEDY))
    assert not scheduler.busy


def test_prompts_with_a_common_beginning_are_read_once() -> None:
    model = random_model(CONFIGS["rotary, grouped"])
    own, rng = engine(model), np.random.default_rng(0)
    system = rng.integers(7, V, 40)
    prompts = [np.concatenate((system, rng.integers(7, V, n))) for n in (3, 9, 1)] + [system[:33], system[:32]]
    scheduler = Scheduler(own)
    block = 2 * 2 * 2 * 16 * 8 * 4  # sides, layers, heads, tokens, width, bytes
    for i, (prompt, known) in enumerate(zip(prompts, (0, 32, 32, 32, 16), strict=True)):
        found = scheduler.prefixes.find(prompt)
        assert (0 if found is None else found.shape[3]) == known
        scheduler.submit(GenerationRequest(prompt, GREEDY))
        answer = completions(finish(scheduler))[i]
        [alone] = own.generate([prompt], GREEDY)
        assert answer.tokens.tolist() == alone.tokens.tolist()
        assert np.allclose(answer.logprobs, alone.logprobs, atol=1e-5)
    assert scheduler.prefixes.bytes == (2 + 1) * block
    torch.testing.assert_close(found, scheduler.prefixes.find(prompts[0])[..., :16, :])
