"""Attention weights of a text: what they add up to, what they change, and which models have none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from firth.generate import attention_maps as module
from firth.generate.attention_maps import Text, attention_maps
from firth.model.attention import AttentionMask, attend, attention_weights
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config, recurrent_config
from firth.model.config_groups import EncoderConfig
from firth.model.model import LM
from firth.model.prefix import PrefixEncoder
from firth.runs.loaded_model import MAX_ANSWER_TOKENS, Model
from firth.types import UserError
from tests.support.models import random_model
from tests.support.tiny_corpus import tokenizer

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_positions": 40}


def text(length: int = 9) -> Text:
    return Text(np.arange(3, 3 + length), [f"t{i}" for i in range(length)])


def test_a_causal_model_attends_to_no_later_token() -> None:
    [found] = attention_maps(random_model(ModelConfig(**SIZES)), text())
    assert (found.kind, found.weights.shape, found.weights.dtype) == ("self", (2, 4, 9, 9), np.float32)
    np.testing.assert_allclose(found.weights.sum(-1), 1, atol=1e-6)
    assert not np.triu(found.weights, 1).any() and (np.tril(found.weights[0, 0]) > 0).sum() == 45


def test_a_shared_layer_has_a_map_for_each_use() -> None:
    config = ModelConfig(**SIZES, causal=False).with_fields({"num_layer_groups": 1, "num_layers": 3})
    [found] = attention_maps(random_model(config), text())
    assert found.weights.shape == (3, 4, 9, 9)
    assert np.abs(found.weights[0] - found.weights[1]).max() > 1e-3


def test_the_prompt_of_a_prefix_lm_is_read_both_ways() -> None:
    config = decoder_config(61, 32, 2, num_heads=4, max_positions=40).with_fields(
        {"attention.prefix_lm": True, "causal": False}
    )
    [found] = attention_maps(random_model(config), text())
    assert np.triu(found.weights, 1).any()


def test_keys_of_a_trained_prefix_have_names() -> None:
    config = ModelConfig(**SIZES)
    model = random_model(config)
    plain = attention_maps(model, text())[0].weights
    model.heads["prefix"] = PrefixEncoder(3, 2, 4, 8)
    torch.nn.init.normal_(next(model.heads["prefix"].parameters()))
    [found] = attention_maps(model, text())
    assert list(found.keys[:4]) == ["prefix 1", "prefix 2", "prefix 3", "t0"] and len(found.queries) == 9
    assert found.weights.shape == (2, 4, 9, 12) and found.weights[..., :3].min() > 0
    assert np.abs(found.weights[..., 3:] - plain).max() > 1e-3


def test_a_linformer_attends_to_slots() -> None:
    config = encoder_config(61, 32, 2, num_heads=4, max_positions=40).with_fields({"attention.linformer.k": 5})
    [found] = attention_maps(random_model(config), text())
    assert found.keys == [f"slot {i}" for i in range(1, 6)] and found.weights.shape == (2, 4, 9, 5)


def test_a_latent_is_attended_to() -> None:
    config = ModelConfig(**SIZES, encoder=EncoderConfig(num_layers=1, latent_size=6))
    maps = attention_maps(random_model(config), text(4), text(7))
    assert [(found.kind, found.weights.shape) for found in maps] == [
        ("decoder", (2, 4, 4, 4)), ("encoder", (1, 4, 7, 7)), ("cross", (2, 4, 4, 4)),
    ]  # fmt: skip
    assert maps[2].keys == [f"latent {i}" for i in range(1, 5)]


def test_the_pass_is_left_as_it_was() -> None:
    """The hooks are removed, also if the pass fails."""
    model = random_model(ModelConfig(**SIZES))
    tokens = torch.arange(3, 9)[None]
    before = model({"tokens": tokens})
    attention_maps(model, text())
    with pytest.raises(IndexError):
        attention_maps(model, Text(np.array([60, 61]), ["a", "b"]))
    assert torch.equal(model({"tokens": tokens}), before)
    assert not any(one._forward_pre_hooks for one in model.modules())


def test_models_without_attention_and_long_texts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    recurrent = LM(recurrent_config(61, 32, 1, max_positions=40), {})
    with pytest.raises(UserError, match="this model has no attention"):
        attention_maps(recurrent, text())
    model = random_model(ModelConfig(**SIZES))
    with pytest.raises(UserError, match="41 tokens and this model reads at most 40"):
        attention_maps(model, Text(np.full(41, 5), ["x"] * 41))
    monkeypatch.setattr(module, "MAX_WEIGHTS", 8 * 20**2)
    with pytest.raises(UserError, match="the text has 21 tokens, and at most 20 are shown"):
        attention_maps(model, text(21))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_weights_times_values_are_the_output(kv_heads: int) -> None:
    """For grouped keys, a bias, padding and a row that attends to nothing."""
    torch.manual_seed(0)
    q, bias = torch.randn(2, 4, 7, 8), torch.randn(1, 4, 7, 7)
    k, v = torch.randn(2, kv_heads, 7, 8), torch.randn(2, kv_heads, 7, 8)
    when = torch.arange(7).expand(2, 7)
    keys = when.masked_fill(when > torch.tensor([[6], [3]]), 1 << 30)
    masks = [
        AttentionMask.from_times(when, when),
        AttentionMask.from_times(when, keys),
        AttentionMask.from_times(when - 1, keys),
        AttentionMask.from_times(when, keys, flex=True),
    ]
    assert masks[0].is_causal and masks[2].empty_rows is not None and masks[3].block_mask is not None
    for mask in masks:
        used = None if mask.block_mask is not None else bias
        weights = attention_weights(q, k, mask, 0.3, used)
        expected = attend(q, k, v, mask, 0.3, used)
        out = weights @ v.repeat_interleave(4 // kv_heads, 1)
        torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


def test_a_loaded_model_shows_the_tokens_that_it_reads() -> None:
    """A decoder reads [bos] text, an encoder [CLS] text [SEP], an encoder-decoder text [eos] and an answer after its start token."""
    size, words = tokenizer().vocab.size, tokenizer()
    decoder = Model.of(random_model(decoder_config(size, 32, 2, num_heads=4)), words)
    [found] = decoder.attention("the class of")
    assert found.queries[0] == words.token(words.vocab.bos) and "".join(found.queries[1:]) == "the␣class␣of"
    encoder = Model.of(random_model(encoder_config(size, 32, 2, num_heads=4)), words)
    [found] = encoder.attention("the class of")
    assert found.queries == found.keys and found.queries[-1] == words.token(words.vocab.eos)
    both = Model.of(random_model(encoder_decoder_config(size, 32, 2, num_heads=4, max_positions=90)), words)
    maps = {one.kind: one for one in both.attention("the class of", "a name")}
    assert "".join(maps["encoder"].keys[:-1]) == "the␣class␣of"
    start = words.token(both.engine.vocab.start)
    assert "".join(maps["cross"].queries) == f"{start}a␣name" and maps["cross"].keys == maps["encoder"].keys
    written = both.attention("the class of")[0]
    assert 1 < len(written.queries) <= 1 + MAX_ANSWER_TOKENS and written.queries[0] == start
