"""Sentence embeddings equal those of sentence-transformers for the same model, in any batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from firth.cli import app
from firth.generate.embeddings import embed
from firth.model.config import decoder_config, encoder_decoder_config
from firth.model.model import LM
from firth.model.presets import bert
from firth.pretrained.load_save import load_model, save_model
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
TEXTS = ["A man sings.", "Somebody is singing a long song, and then another one!", "", "x"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["a man is singing a song, and somebody sings another one. " * 4], "wordpiece", 200)


def expected(directory: Path, texts: list[str], length: int, unit: bool) -> np.ndarray:
    """Compute embeddings as sentence-transformers does: mean pooling over the attention mask, then normalization."""
    model, tokenizer = (getattr(transformers, c).from_pretrained(directory) for c in ("AutoModel", "AutoTokenizer"))
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    ids = inputs["input_ids"]
    with torch.no_grad():
        hidden = model.eval()(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    means = (hidden * mask).sum(1) / mask.sum(1)
    assert ids.shape[0] == len(texts)
    return np.asarray((torch.nn.functional.normalize(means, dim=-1) if unit else means).numpy())


@pytest.mark.parametrize("unit", [True, False])
def test_mean_pooling_matches_transformers(tmp_path: Path, tokenizer: Tokenizer, unit: bool) -> None:
    torch.manual_seed(0)
    model = LM(bert(tokenizer.vocab.size, 32, 2, 2, max_positions=64), {}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    save_model(model, tokenizer, tmp_path)
    found, truncated = embed(model, tokenizer, TEXTS, unit=unit)
    other = transformers.AutoModel.from_pretrained(tmp_path).eval()
    for text, vector in zip(TEXTS, found, strict=True):
        ids = torch.as_tensor(tokenizer.vocab.add_special_tokens(tokenizer.encode(text)))[None].long()
        with torch.no_grad():
            mean = other(input_ids=ids).last_hidden_state[0].mean(0)
        mean = torch.nn.functional.normalize(mean, dim=-1) if unit else mean
        np.testing.assert_allclose(vector, mean.numpy(), atol=1e-5)
    assert truncated == []
    assert embed(model, tokenizer, TEXTS, length=5)[1] == [0, 1]


@pytest.mark.slow
def test_minilm_vectors_match_sentence_transformers(minilm: Path) -> None:
    texts = [*TEXTS, "The quick brown fox jumps over the lazy dog. " * 40, "Ünïcode, naïve — 東京"]
    found, truncated = embed(load_model(minilm), Tokenizer.load(minilm), texts, length=256)
    np.testing.assert_allclose(found, expected(minilm, texts, 256, unit=True), atol=1e-5)
    assert truncated == [4]


@pytest.mark.parametrize("make", [decoder_config, encoder_decoder_config])
def test_embeddings_do_not_depend_on_the_batch(make: Any, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = LM(make(vocab_size=tokenizer.vocab.size, hidden_size=64, num_layers=1, max_positions=64), {}).eval()
    batched, _ = embed(model, tokenizer, TEXTS)
    alone = np.concatenate([embed(model, tokenizer, [text])[0] for text in TEXTS])
    np.testing.assert_allclose(batched, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(batched, axis=-1), 1, atol=1e-5)


def test_the_command_writes_numpy_and_json(tmp_path: Path, tokenizer: Tokenizer) -> None:
    save_model(LM(bert(tokenizer.vocab.size, 32, 1, 2, max_positions=64), {}), tokenizer, tmp_path / "model")
    (tmp_path / "a.csv").write_text("title,text\n1,a man\n2,a song\n")
    for out, source in (("a.npy", str(tmp_path / "a.csv")), ("a.jsonl", "-")):
        result = CliRunner().invoke(
            app, ["embed", str(tmp_path), source, "--out", str(tmp_path / out)], input="a man\na song\n"
        )
        assert "2 vectors of 32 numbers" in result.output
    rows = [json.loads(line)["embedding"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), rows, atol=1e-6)


def test_empty_texts_have_finite_vectors_in_order(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """An empty text has a finite vector, and a long text does not change its neighbors (case 30)."""
    save_model(LM(bert(tokenizer.vocab.size, 32, 1, 2, max_positions=64), {}), tokenizer, tmp_path / "model")
    texts = ["a man sings", "", "   ", "a man sings a song. " * 60, "\u200b", "a man sings"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    result = CliRunner().invoke(
        app, ["embed", str(tmp_path), str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "a.npy")]
    )
    assert result.exit_code == 0 and "2 rows of 6 without text; the first is row 2" in result.output
    found = np.load(tmp_path / "a.npy")
    assert found.shape == (6, 32) and np.isfinite(found).all()
    np.testing.assert_allclose(found[0], found[5], atol=1e-4)
    assert not np.allclose(found[0], found[3], atol=1e-3)
