"""A prefix language model reads its prompt both ways when it is used, as it did when it was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bytecoder import ByteCoder
from data_room import TEXTS

from firth.data.collate import collate
from firth.evaluate.perplexity import TokenizedDocument, score, strided
from firth.evaluate.text_perplexity import reads_of
from firth.generate.decoding import DecodingBatch, attention_pattern_of, rectangle
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.config import ModelConfig, decoder_config, encoder_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.prefix_lm import PrefixLM
from firth.pretrained.load_save import load_model, save_model
from firth.runs.inference import encode_prompt, evaluate_run, open_engine
from firth.runs.recipe import load
from firth.runs.run import run
from firth.types import IGNORE, UserError

V = ByteCoder.vocab.size
SHAPES = {
    "rotary": replace(
        decoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64),
        causal=False,
        prefix_lm=True,
    ),
    "t5": ModelConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        max_positions=64,
        position="t5",
        causal=False,
        prefix_lm=True,
    ),
    "an encoder's body": replace(
        encoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64), prefix_lm=True
    ),
}
CPU = torch.device("cpu")


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> LM:
    torch.manual_seed(0)
    model = LM(SHAPES[request.param], {"lm": LMHead(SHAPES[request.param])})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompts(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(7, V, rng.integers(2, 20)) for _ in range(count)]


@torch.no_grad()
def trained_reading(model: LM, prompt: np.ndarray, written: np.ndarray) -> torch.Tensor:
    """Log-probabilities at every written position as the objective lays the row out: (n, V)."""
    shown = PrefixLM()._show(np.concatenate((prompt, written)), len(prompt), ByteCoder.vocab)
    batch = collate([shown])
    assert (batch["labels"][0] != IGNORE).sum() == len(written)
    return model.heads["lm"](model(batch)[0][batch["labels"][0] != IGNORE]).log_softmax(-1)


@torch.no_grad()
def test_the_prompt_is_read_as_in_training_and_not_from_left_to_right(model: LM) -> None:
    [prompt] = prompts(1)
    with attention_pattern_of(model):
        state = DecodingBatch(model, [prompt], None, Sampling(max_new_tokens=2, temperature=0), [0]).state
    trained = model.heads["lm"](state).log_softmax(-1)
    assert torch.allclose(trained, trained_reading(model, prompt, np.array([9])), atol=1e-5)
    left = model.heads["lm"](model(rectangle([prompt], CPU))[:, -1]).log_softmax(-1)
    assert not torch.allclose(trained, left, atol=1e-2)


def test_cached_is_uncached_and_batched_is_alone(model: LM) -> None:
    rows = prompts(6)
    engine = Engine(model, ByteCoder(), stops=())
    for prompt, answer in zip(rows, engine.generate(rows, Sampling(max_new_tokens=20, temperature=0)), strict=True):
        expected = trained_reading(model, prompt, answer.tokens)
        assert np.array_equal(expected.argmax(-1).numpy(), answer.tokens)
        at = torch.as_tensor(answer.tokens, dtype=torch.int64)[:, None]
        assert np.allclose(answer.logprobs, expected.gather(-1, at)[:, 0].numpy(), atol=1e-4)
        [alone] = engine.generate([prompt], Sampling(max_new_tokens=20, temperature=0))
        assert np.array_equal(alone.tokens, answer.tokens)
        assert "".join(engine.stream(prompt, Sampling(max_new_tokens=20, temperature=0))) == alone.text


def test_scores_and_options_are_the_trained_reading_too(model: LM) -> None:
    engine, [prompt] = Engine(model, ByteCoder(), stops=()), prompts(1)
    options = [*prompts(4, seed=5), np.array([9])]
    expected = [float(trained_reading(model, prompt, o).gather(-1, torch.as_tensor(o)[:, None]).sum()) for o in options]
    assert np.allclose(engine.score([prompt] * 5, options), expected, atol=1e-3)
    assert np.allclose(engine.options(prompt, options), expected, atol=1e-3)
    assert np.allclose(engine.options(prompt, options[4:]), expected[4:], atol=1e-3)


def test_what_stands_before_the_asked_tokens_of_a_window_is_a_prompt(model: LM) -> None:
    document = TokenizedDocument(np.concatenate(prompts(6)), np.ones(sum(map(len, prompts(6))), np.int64))
    assert reads_of(model.config) == "causal"
    nll = 0.0
    for shown in strided(document, context=16):
        asked = shown["labels"] != IGNORE
        cut = int(asked.argmax()) + 1
        row = np.append(shown["tokens"], shown["labels"][-1])
        found = trained_reading(model, row[:cut], row[cut:])
        nll -= float(found.gather(-1, torch.as_tensor(row[cut:])[:, None]).sum())
    assert score(model, strided(document, 16, prefix_lm=True)).nll == pytest.approx(nll, rel=1e-5)
    assert abs(score(model, strided(document, 16)).nll - nll) > 0.05  # nats, where equality is to 0.004


def test_a_saved_model_knows_how_it_was_trained(model: LM, tmp_path: Path) -> None:
    said = save_model(model, None, tmp_path)
    assert said == "no family of transformers expresses this shape, so only firth loads it"
    assert load_model(tmp_path).config == model.config


def test_a_shape_that_cannot_do_it_is_refused() -> None:
    for wrong in ({"causal": True}, {"num_encoder_layers": 1}, {"linformer_k": 8, "position": "none"}):
        with pytest.raises(UserError, match=r"model\.prefix_lm reads a text both ways"):
            ModelConfig(
                **{
                    "vocab_size": 9,
                    "hidden_size": 8,
                    "num_layers": 1,
                    "num_heads": 1,
                    "causal": False,
                    "prefix_lm": True,
                }
                | wrong
            )


SMALL = [
    "max_steps=2", "batch.size=4", "model.hidden_size=32", "model.num_layers=1", "model.num_heads=1", "model.max_positions=64",
    "examples.max_length=32", "tokenizer.vocab_size=400", "sample_prompts=[Once]",
]  # fmt: skip


def test_a_run_is_used_as_its_objective_reads(tmp_path: Path) -> None:
    """From the recipe to the commands: the run says it in the shape of what it exports, and a later run unsays it."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXTS[:12]), "utf-8")
    given = [f"data.path={text}", *SMALL]
    run(load("prefix_lm", given), tmp_path / "run", log=lambda _: None)
    opened = open_engine(tmp_path / "run")
    assert opened.model.config.prefix_lm
    prompt = encode_prompt(opened.tokenizer, "Thank you for", opened.model)
    assert prompt[0] != opened.tokenizer.vocab.roles["bos"]
    shown = PrefixLM()._show(np.append(prompt, 9), len(prompt), opened.tokenizer.vocab)
    with attention_pattern_of(opened.model):
        state = DecodingBatch(opened.model, [prompt], None, Sampling(max_new_tokens=1), [0]).state
        assert torch.allclose(state, opened.model(collate([shown]))[:, -1], atol=1e-5)
    found = json.loads(evaluate_run(tmp_path / "run", [str(text)], task=None, limit=400, as_json=True))
    assert found["reads"] == "causal" and not found["bos"]
    again = load("prefix_lm", [*given, "objective=causal_lm", f"init_from={tmp_path / 'run'}"])
    run(again, tmp_path / "left", log=lambda _: None)
    assert not open_engine(tmp_path / "left").model.config.prefix_lm
