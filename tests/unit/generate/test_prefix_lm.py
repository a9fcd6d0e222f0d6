"""A prefix language model has bidirectional attention over its prompt in inference, as in training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.data.collate import collate
from firth.evaluate.perplexity import TokenizedDocument, score, strided
from firth.generate.decoding_batch import inference_mode, read_prompts, rectangle
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.generate.scoring import scoring_mode
from firth.model.config import ModelConfig, decoder_config, encoder_config
from firth.model.config_groups import AttentionConfig, PositionConfig
from firth.model.model import LM
from firth.objectives.causal_lm import PrefixLM
from firth.pretrained.load_save import load_model, save_model
from firth.runs.inference import evaluate_run, open_engine
from firth.runs.loaded_model import encode_prompt
from firth.runs.recipe import load
from firth.runs.run import run
from firth.types import IGNORE, UserError
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.models import random_prompts
from tests.support.tiny_corpus import TEXTS

V = ByteTokenizer.vocab.size
CONFIGS = {
    "rotary": decoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64).with_fields(
        {"causal": False, "attention.prefix_lm": True}
    ),
    "t5": ModelConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        max_positions=64,
        position=PositionConfig("t5"),
        causal=False,
        attention=AttentionConfig(prefix_lm=True),
    ),
    "an encoder's body": encoder_config(
        vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64
    ).with_fields({"attention.prefix_lm": True}),
}
CPU = torch.device("cpu")


@torch.no_grad()
def training_log_probs(model: LM, prompt: np.ndarray, target: np.ndarray) -> torch.Tensor:
    """Return the log-probabilities at every target position with the layout of the objective: (n, V)."""
    example = PrefixLM()._split(np.concatenate((prompt, target)), len(prompt), ByteTokenizer.vocab)
    batch = collate([example])
    assert (batch["labels"][0] != IGNORE).sum() == len(target)
    return model.heads["lm"](model(batch)[0][batch["labels"][0] != IGNORE]).log_softmax(-1)


@torch.no_grad()
def test_the_prompt_has_bidirectional_attention(model: LM) -> None:
    [prompt] = random_prompts(1, shortest=2)
    with inference_mode(model):
        state = read_prompts(model, [prompt]).states
    bidirectional = model.heads["lm"](state).log_softmax(-1)
    assert torch.allclose(bidirectional, training_log_probs(model, prompt, np.array([9])), atol=1e-5)
    causal = model.heads["lm"](model(rectangle([prompt], CPU))[:, -1]).log_softmax(-1)
    assert not torch.allclose(bidirectional, causal, atol=1e-2)


@pytest.mark.slow
def test_cached_and_batched_equal_uncached_and_single(model: LM) -> None:
    rows = random_prompts(6, shortest=2)
    engine = Engine(model, ByteTokenizer(), stops=())
    for prompt, answer in zip(rows, engine.generate(rows, Sampling(max_new_tokens=20, temperature=0)), strict=True):
        expected = training_log_probs(model, prompt, answer.tokens)
        assert np.array_equal(expected.argmax(-1).numpy(), answer.tokens)
        at = torch.as_tensor(answer.tokens, dtype=torch.int64)[:, None]
        assert np.allclose(answer.logprobs, expected.gather(-1, at)[:, 0].numpy(), atol=1e-4)
        [alone] = engine.generate([prompt], Sampling(max_new_tokens=20, temperature=0))
        assert np.array_equal(alone.tokens, answer.tokens)
        assert "".join(engine.stream(prompt, Sampling(max_new_tokens=20, temperature=0))) == alone.text


def test_scores_and_options_match_training(model: LM) -> None:
    engine, [prompt] = Engine(model, ByteTokenizer(), stops=()), random_prompts(1, shortest=2)
    options = [*random_prompts(4, seed=5, shortest=2), np.array([9])]
    expected = [
        float(training_log_probs(model, prompt, o).gather(-1, torch.as_tensor(o)[:, None]).sum()) for o in options
    ]
    assert np.allclose(engine.score([prompt] * 5, options), expected, atol=1e-3)
    assert np.allclose(engine.options(prompt, options), expected, atol=1e-3)
    assert np.allclose(engine.options(prompt, options[4:]), expected[4:], atol=1e-3)


def test_the_unscored_tokens_of_a_window_are_its_prompt(model: LM) -> None:
    tokens = np.concatenate(random_prompts(6, shortest=2))
    document = TokenizedDocument(tokens, np.ones(len(tokens), np.int64))
    assert scoring_mode(model.config) == "causal"
    nll = 0.0
    for window in strided(document, context=16):
        scored = window["labels"] != IGNORE
        start = int(scored.argmax()) + 1
        row = np.append(window["tokens"], window["labels"][-1])
        found = training_log_probs(model, row[:start], row[start:])
        nll -= float(found.gather(-1, torch.as_tensor(row[start:])[:, None]).sum())
    assert score(model, strided(document, 16, prefix_lm=True)).nll == pytest.approx(nll, rel=1e-5)
    assert abs(score(model, strided(document, 16)).nll - nll) > 0.05  # nats, where equality is to 0.004


def test_a_saved_model_keeps_prefix_lm(model: LM, tmp_path: Path) -> None:
    message = save_model(model, None, tmp_path)
    assert message == "transformers has no family for this model config, so only firth loads it"
    assert load_model(tmp_path).config == model.config


def test_unsupported_model_configs_are_rejected() -> None:
    for wrong in ({"causal": True}, {"encoder.num_layers": 1}, {"attention.linformer.k": 8, "position.type": "none"}):
        with pytest.raises(UserError, match=r"model\.attention\.prefix_lm reads a prompt in both directions"):
            ModelConfig(9, 8, 1, 1).with_fields({"causal": False, "attention.prefix_lm": True} | wrong)


SMALL = [
    "max_steps=2", "batch.size=4", "model.hidden_size=32", "model.num_layers=1", "model.num_heads=1", "model.max_positions=64",
    "examples.max_length=32", "tokenizer.vocab_size=400", "sample_prompts=[Once]",
]  # fmt: skip


@pytest.mark.slow
def test_a_run_is_used_with_the_attention_of_its_objective(tmp_path: Path) -> None:
    """A run sets prefix_lm in the config of the model it exports, and a later causal run resets it."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXTS[:12]), "utf-8")
    overrides = [f"data.path={text}", *SMALL]
    run(load("prefix_lm", overrides), tmp_path / "run", log=lambda _: None)
    loaded = open_engine(tmp_path / "run")
    assert loaded.model.config.attention.prefix_lm
    prompt = encode_prompt(loaded.tokenizer, "Thank you for", loaded.model)
    assert prompt[0] != loaded.tokenizer.vocab.roles["bos"]
    example = PrefixLM()._split(np.append(prompt, 9), len(prompt), loaded.tokenizer.vocab)
    with inference_mode(loaded.model):
        state = read_prompts(loaded.model, [prompt]).states
        assert torch.allclose(state, loaded.model(collate([example]))[:, -1], atol=1e-5)
    found = json.loads(evaluate_run(tmp_path / "run", [str(text)], task=None, limit=400, as_json=True))
    assert found["mode"] == "causal" and not found["bos"]
    of_start = [s for s in overrides if not s.startswith("tokenizer.")]
    again = load("prefix_lm", [*of_start, "objective=causal_lm", f"init_from={tmp_path / 'run'}"])
    run(again, tmp_path / "left", log=lambda _: None)
    assert not open_engine(tmp_path / "left").model.config.attention.prefix_lm
