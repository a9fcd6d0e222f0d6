"""The engine: cached equals uncached decoding, rows are independent, and text ends where it should."""

import numpy as np
import pytest
import torch

from firth.generate.decoding_batch import DecodingBatch, rectangle
from firth.generate.engine import Engine
from firth.generate.fill import fill_masks, masked
from firth.generate.output import StreamingOutput
from firth.generate.sampling import Sampling
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.config_groups import NormConfig, PositionConfig
from firth.model.model import LM
from firth.tokenizer.train import train
from firth.types import UserError
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.models import random_model, random_prompts

V = ByteTokenizer.vocab.size
CONFIGS = {
    "nanochat": decoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64),
    "gpt2": ModelConfig(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64),
    "sinusoidal, post-norm, grouped": ModelConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_positions=64,
        position=PositionConfig("sinusoidal"),
        norm=NormConfig(placement="post"),
    ),
    "t5": encoder_decoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64),
}
DECODERS = [name for name in CONFIGS if name != "t5"]


def engine(model: LM, stops: tuple[int, ...] = ()) -> Engine:
    return Engine(model, ByteTokenizer(), stops=stops)


@torch.no_grad()
def uncached_logits(model: LM, prompt: np.ndarray, generated: np.ndarray) -> torch.Tensor:
    """Return the logits at every generated position from one uncached pass over the unpadded row: (n, V)."""
    if model.config.encoder.num_layers:
        batch = {"source_tokens": torch.as_tensor(prompt)[None]}
        row, first = np.concatenate(([ByteTokenizer.vocab.pad], generated)), 0
    else:
        batch, row, first = {}, np.concatenate((prompt, generated)), len(prompt) - 1
    hidden = model(batch | rectangle([row[:-1]], torch.device("cpu")))
    return model.heads["lm"](hidden[0, first:])


ROWS = {
    "one": random_prompts(1),
    "gaps": random_prompts(5),
    "no gaps": [np.random.default_rng(i).integers(7, V, 9) for i in range(3)],
    "many, gaps": random_prompts(18),
    "many, no gaps": [np.random.default_rng(i).integers(7, V, 9) for i in range(16)],
}
"""Gaps (padding) are masked; from eight rows on, other kernels are used."""


@pytest.mark.parametrize("name", ROWS)
def test_cached_generation_equals_uncached_generation(model: LM, name: str) -> None:
    rows = ROWS[name]
    for prompt, answer in zip(
        rows, engine(model).generate(rows, Sampling(max_new_tokens=24, temperature=0)), strict=True
    ):
        logits = uncached_logits(model, prompt, answer.tokens)
        assert np.array_equal(logits.argmax(-1).numpy(), answer.tokens)
        expected = logits.log_softmax(-1).gather(-1, torch.as_tensor(answer.tokens, dtype=torch.int64)[:, None])[:, 0]
        assert np.allclose(answer.logprobs, expected.numpy(), atol=1e-4)
        assert answer.finish == "length"


def test_rows_do_not_depend_on_the_batch(model: LM) -> None:
    rows = random_prompts(6)
    sampling = Sampling(max_new_tokens=16, temperature=0.9, top_p=0.95, seed=40)
    batched = engine(model).generate(rows, sampling)
    for i, row in enumerate(rows):
        [alone] = engine(model).generate([row], Sampling(max_new_tokens=16, temperature=0.9, top_p=0.95, seed=40 + i))
        assert np.array_equal(alone.tokens, batched[i].tokens)
    small = Engine(model, ByteTokenizer(), stops=(), batch_size=2).generate(rows, sampling)
    assert [a.tokens.tolist() for a in small] == [a.tokens.tolist() for a in batched]


def test_the_same_prompt_twice_gets_two_answers(model: LM) -> None:
    one, two = engine(model).generate([random_prompts(1)[0]] * 2, Sampling(max_new_tokens=16))
    assert not np.array_equal(one.tokens, two.tokens)


def test_rows_that_finish_early_do_not_change_the_others(model: LM) -> None:
    rows = random_prompts(8)
    whole = engine(model).generate(rows, Sampling(max_new_tokens=20, seed=3))
    stops = (int(whole[0].tokens[2]), int(whole[1].tokens[5]), int(whole[2].tokens[5]), int(whole[3].tokens[9]))
    cut = engine(model, stops).generate(rows, Sampling(max_new_tokens=20, seed=3))
    for a, b in zip(whole, cut, strict=True):
        hits = np.flatnonzero(np.isin(a.tokens, stops))
        n = hits[0] + 1 if len(hits) else len(a.tokens)
        assert np.array_equal(b.tokens, a.tokens[:n]), "the stop token is kept as the last one"
        assert b.finish == ("stop" if len(hits) else "length")
    assert len({len(b.tokens) for b in cut}) > 2


def test_score_is_the_sum_of_the_log_probabilities(model: LM) -> None:
    rows = random_prompts(5)
    answers = engine(model).generate(rows, Sampling(max_new_tokens=12))
    scores = engine(model).score(rows, [a.tokens for a in answers])
    assert np.allclose(scores, [a.logprobs.sum() for a in answers], atol=1e-3)


def test_options_equal_scores(model: LM) -> None:
    for prompt in (random_prompts(1)[0], np.array([9])):
        options = random_prompts(4, seed=5)
        scores = engine(model).score([prompt] * 4, options)
        assert np.allclose(engine(model).options(prompt, options), scores, atol=1e-3)
        assert engine(model).choose(prompt, options) == int(np.argmax(scores))


@pytest.mark.parametrize("name", DECODERS)
def test_an_answer_ends_with_the_context(name: str) -> None:
    model = random_model(CONFIGS[name])
    prompt = np.full(60, 50)
    [answer] = engine(model).generate([prompt], Sampling(max_new_tokens=100, temperature=0))
    assert answer.finish == "context"
    assert len(answer.tokens) == 64 - 60 + 1
    assert np.array_equal(uncached_logits(model, prompt, answer.tokens).argmax(-1).numpy(), answer.tokens)


def test_prompts_that_are_empty_or_too_long_are_rejected(model: LM) -> None:
    for wrong, message in (
        (np.full(65, 50), "65 tokens and this model reads at most 64"),
        (np.zeros(0, int), "empty"),
    ):
        with pytest.raises(UserError, match=message):
            engine(model).generate([wrong], Sampling())
        with pytest.raises(UserError, match=message):
            engine(model).score([wrong], [np.array([9])])


def test_generation_keeps_training_mode_and_gradients() -> None:
    model = random_model(CONFIGS["nanochat"]).train()
    engine(model).generate(random_prompts(2), Sampling(max_new_tokens=4))
    assert model.training
    model({"tokens": torch.tensor([[9, 10]])}).sum().backward()
    assert model.tokens.weight.grad is not None


# ---- text


def answer_of(pieces: list[bytes], **sampling: object) -> tuple[StreamingOutput, list[str]]:
    """Append bytes one by one; return the output and its final text after each."""
    tokenizer = ByteTokenizer()
    output = StreamingOutput(tokenizer, tokenizer.encode("Q: "), Sampling(**sampling), frozenset({3}), room=1000)  # type: ignore[arg-type]
    final_texts = []
    for byte in b"".join(pieces):
        if output.finish is None:
            output.append(byte + 7, 0.0)
            final_texts.append(output.final_text)
    return output, final_texts


def test_incomplete_characters_are_not_shown() -> None:
    output, final_texts = answer_of(["né €".encode()])
    assert final_texts == ["n", "n", "né", "né ", "né ", "né ", "né €"]
    assert output.text == "né €"


def test_a_stop_string_across_tokens_ends_the_answer() -> None:
    output, final_texts = answer_of([b"yes\nUs\nUser: no"], stop_strings=("\nUser:", "###"))
    assert output.finish == "stop"
    assert output.done().text == "yes\nUs"
    assert final_texts[:7] == ["y", "ye", "yes", "yes", "yes", "yes", "yes\nUs"]
    assert len(output.tokens) == len("yes\nUs\nUser:"), "nothing is generated after the stop string"


def test_the_first_character_may_start_in_the_prompt() -> None:
    output = StreamingOutput(ByteTokenizer(), ByteTokenizer().encode("€")[:2], Sampling(), frozenset(), room=10)
    output.append(int(ByteTokenizer().encode("€")[2]), 0.0)
    assert output.text == "€"


def test_streamed_text_equals_generated_text(model: LM) -> None:
    prompt = ByteTokenizer().encode("hello")
    for seed in range(5):
        sampling = Sampling(max_new_tokens=40, seed=seed, stop_strings=("e", "\n"))
        pieces = list(engine(model, (3,)).stream(prompt, sampling))
        [answer] = engine(model, (3,)).generate([prompt], sampling)
        assert "".join(pieces) == answer.text
        assert all(pieces)


def test_default_stops_are_end_of_text_and_end_of_turn() -> None:
    tokenizer = train(["the cat sat"] * 9, "byte-bpe", vocab_size=400)
    ends = {tokenizer.id("</s>"), tokenizer.id("<|im_end|>")}
    assert Engine(random_model(CONFIGS["gpt2"]), tokenizer).stops == ends


# ---- masked models


def test_fill_returns_the_most_likely_tokens_of_each_mask() -> None:
    config = encoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64)
    model = random_model(config)
    text = "the <mask> sat<mask>"
    tokens = masked(ByteTokenizer(), text)
    assert tokens.tolist() == [2, *ByteTokenizer().encode("the"), 4, *ByteTokenizer().encode(" sat"), 4, 3]
    with torch.no_grad():
        p = model.heads["lm"](model({"tokens": torch.as_tensor(tokens)[None]})[0]).softmax(-1)
    answers = fill_masks(model, ByteTokenizer(), text, k=3)
    for at, candidates in zip(np.flatnonzero(tokens == 4), answers, strict=True):
        best = p[at, 7:].topk(3)
        assert [c.token - 7 for c in candidates] == best.indices.tolist()
        assert np.allclose([c.probability for c in candidates], best.values.numpy(), atol=1e-5)
    with pytest.raises(UserError, match="nothing to fill: write <mask>"):
        fill_masks(model, ByteTokenizer(), "the cat")


# ---- real tokenizers


@pytest.mark.parametrize("algorithm", ["bpe", "byte-bpe", "wordpiece", "unigram"])
def test_a_continuation_joins_its_prompt_for_every_tokenizer(algorithm: str) -> None:
    text = "the quick brown fox jumps over the lazy dog and the slow dog sleeps under the old oak tree by the river"
    tokenizer = train([text] * 20, algorithm, vocab_size=400)
    tokens = tokenizer.encode(text)
    whole = tokenizer.decode(tokens)
    assert len(tokens) > 15
    for cut in range(1, len(tokens)):
        output = StreamingOutput(tokenizer, tokens[:cut], Sampling(), frozenset(), room=1000)
        for token in tokens[cut:].tolist():
            output.append(token, 0.0)
        assert whole.endswith(output.text)
        assert tokenizer.decode(tokens[:cut]) + output.text == whole


# ---- prompts admitted to a running batch


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_admitted_prompts_are_answered_as_alone(model: LM, temperature: float) -> None:
    """Answers of very different lengths, three rows at a time: most prompts are admitted while others are being decoded."""
    rows = random_prompts(13)
    # Greedy answers of these models repeat a token, and end where the context does.
    stops = tuple(range(7, 7 + V // 9)) if temperature else ()
    sampling = Sampling(max_new_tokens=20 if temperature else 100, temperature=temperature, seed=3)
    whole = Engine(model, ByteTokenizer(), stops=stops, batch_size=3).generate(rows, sampling)
    assert len({len(answer.tokens) for answer in whole}) > 3 or model.config.encoder.num_layers
    for i, (row, answer) in enumerate(zip(rows, whole, strict=True)):
        [alone] = Engine(model, ByteTokenizer(), stops=stops).generate([row], sampling, seeds=[3 + i])
        assert np.array_equal(answer.tokens, alone.tokens)
        assert np.allclose(answer.logprobs, alone.logprobs, atol=1e-4)
        assert answer.finish == alone.finish


def test_a_repetition_penalty_knows_rows_after_admission(model: LM) -> None:
    rows = random_prompts(9)
    sampling = Sampling(max_new_tokens=12, temperature=1.0, seed=3, repetition_penalty=1.7)
    stops = tuple(range(7, 7 + V // 9))
    whole = Engine(model, ByteTokenizer(), stops=stops, batch_size=4).generate(rows, sampling)
    for i, (row, answer) in enumerate(zip(rows, whole, strict=True)):
        [alone] = Engine(model, ByteTokenizer(), stops=stops).generate([row], sampling, seeds=[3 + i])
        assert np.array_equal(answer.tokens, alone.tokens)


def test_a_prompt_does_not_wait_for_the_longest_answer(model: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four rows at a time, and every fifth answer is long: the steps are those of the tokens, not of the longest in each four."""
    steps, step = [], DecodingBatch.logits

    def counted(self: DecodingBatch, tokens: list[int]) -> torch.Tensor:
        steps.append(len(tokens))
        return step(self, tokens)

    monkeypatch.setattr(DecodingBatch, "logits", counted)
    rows, done = random_prompts(20), []
    sampling = Sampling(max_new_tokens=24, seed=3)
    answers = Engine(model, ByteTokenizer(), stops=tuple(range(7, 7 + V // 6)), batch_size=4).generate(
        rows, sampling, progress=done.append
    )
    lengths = [len(answer.tokens) for answer in answers]
    order = sorted(range(20), key=lambda i: -len(rows[i]))
    waiting = sum(max(lengths[i] for i in order[first : first + 4]) for first in range(0, 20, 4))
    assert len(steps) < waiting
    assert done == sorted(done) and done[-1] == 20
