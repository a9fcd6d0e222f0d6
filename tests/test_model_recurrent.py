"""Recurrent trunks against torch.nn's own modules; what they read, remember and refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from firth.data.collate import collate, pack
from firth.generate.decoding import rectangle
from firth.model import flops
from firth.model.config import ModelConfig, decoder_config, recurrent_config
from firth.model.head_descriptions import describe_head, rebuild_head
from firth.model.model import LM
from firth.model.recurrent import RecurrentStack
from firth.objectives.causal_lm import CausalLM
from firth.pretrained.load_save import load_model, save_model
from firth.recipes.recurrent import bilm
from firth.tokenizer.vocab import Vocab
from firth.types import UserError

KINDS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
VOCAB = Vocab(size=40, roles={"pad": 0}, special=np.arange(40) < 1)


def shape_of(kind: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(recurrent_config(40, 16, 2, kind), **{"intermediate_size": 0} | changes)  # type: ignore[arg-type]


def with_our_weights(theirs: nn.RNNBase, ours: RecurrentStack) -> nn.RNNBase:
    """A module of torch.nn whose weights are those of our trunk."""
    with torch.no_grad():
        for i, layer in enumerate(ours.stack()):
            for suffix, one in (("", layer.ahead), ("_reverse", layer.back)):
                for name, p in () if one is None else one.named_parameters():
                    getattr(theirs, name.replace("_l0", f"_l{i}") + suffix).copy_(p)
    return theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_the_states_and_gradients_are_those_of_torch(kind: str, causal: bool) -> None:
    torch.manual_seed(0)
    ours = LM(shape_of(kind, causal=causal), {})
    theirs = with_our_weights(
        KINDS[kind](16, 16 if causal else 8, 2, batch_first=True, bidirectional=not causal), ours.stack
    )
    tokens = torch.randint(40, (3, 11))
    want, _ = theirs(ours.tokens(tokens))
    got = ours({"tokens": tokens})
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    weigh = torch.randn_like(want)
    (want * weigh).sum().backward()
    (got * weigh).sum().backward()
    layer = ours.stack.stack()[1]
    torch.testing.assert_close(layer.ahead.weight_hh_l0.grad, theirs.weight_hh_l1.grad, rtol=1e-4, atol=1e-5)
    if layer.back is not None:
        torch.testing.assert_close(layer.back.weight_ih_l0.grad, theirs.weight_ih_l1_reverse.grad, rtol=1e-4, atol=1e-5)


def test_an_lstm_with_a_projection_and_dropout_is_torch_s() -> None:
    torch.manual_seed(0)
    ours = LM(shape_of("lstm", hidden=24, depth=2), {})
    theirs = with_our_weights(nn.LSTM(16, 24, 2, batch_first=True, proj_size=16), ours.stack)
    tokens = torch.randint(40, (2, 9))
    torch.testing.assert_close(ours({"tokens": tokens}), theirs(ours.tokens(tokens))[0], rtol=0, atol=1e-6)
    dropping = LM(shape_of("lstm", dropout=0.5), {})
    batch = {"tokens": tokens}
    torch.manual_seed(1)
    once = dropping(batch)
    assert not torch.equal(once, dropping(batch))
    assert (once == 0).float().mean() > 0.3  # what the last layer hands on is dropped too
    dropping.eval()
    assert torch.equal(dropping(batch), dropping(batch))


ALL = {
    "one direction": shape_of("lstm"),
    "one direction, gru": shape_of("gru"),
    "two directions": shape_of("lstm", causal=False),
    "two directions apart": shape_of("lstm", causal=False, apart=True, skip=True),
    "spelled": dataclasses.replace(bilm(40, 16, 2, characters=8, filters=64), max_positions=64),
}


@pytest.mark.parametrize("name", ALL)
def test_padding_and_packing_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = LM(ALL[name], {})
    model.set_token_characters([f"piece{i}" for i in range(40)])
    rng = np.random.default_rng(0)
    rows = [{"tokens": rng.integers(1, 40, n)} for n in (7, 3, 12, 1, 5)]
    alone = [model({"tokens": torch.from_numpy(r["tokens"])[None]})[0] for r in rows]
    padded = collate(rows)
    found = model(padded)
    for row, state in zip(found, alone, strict=True):
        torch.testing.assert_close(row[: len(state)], state, rtol=0, atol=1e-6)
    packed = pack(rows, 16)
    found = model(packed)
    assert len(found) < len(rows)
    states = [
        found[i][packed["document_ids"][i] == d]
        for i in range(len(found))
        for d in packed["document_ids"][i].unique()
        if d
    ]
    assert sorted(map(len, states)) == [1, 3, 5, 7, 12]
    for state in states:
        like = next(a for a in alone if len(a) == len(state))
        torch.testing.assert_close(state, like, rtol=0, atol=1e-6)
    left = {"tokens": padded["tokens"].flip(1), "key_time": padded["key_time"].flip(1)}  # as prompts are padded
    found = model(left)
    for row, example in zip(found, rows, strict=True):
        state = model({"tokens": torch.from_numpy(example["tokens"][::-1].copy())[None]})[0]
        torch.testing.assert_close(row[-len(state) :], state, rtol=0, atol=1e-6)


def test_one_direction_sees_nothing_behind_and_two_see_all() -> None:
    tokens = torch.randint(40, (1, 10))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 40
    for name, config in ALL.items():
        torch.manual_seed(0)
        model = LM(config, {})
        model.set_token_characters([f"{i} piece" for i in range(40)])
        moved = (model({"tokens": tokens}) - model({"tokens": changed})).abs() > 0  # (1, T, width)
        if config.causal:
            assert not moved[0, :6].any() and moved[0, 6:].any(-1).all(), name
        elif config.separate_directions:
            ahead, back = moved[0].chunk(2, -1)
            assert not ahead[:6].any() and ahead[6:].any(-1).all(), name
            assert not back[7:].any() and back[:7].any(-1).all(), name
        else:
            assert moved[0].any(-1).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_written_step_by_step_it_says_what_it_says_at_once(kind: str) -> None:
    torch.manual_seed(0)
    model = LM(shape_of(kind), {}).eval()
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, 40, n) for n in (6, 2, 9)]
    whole = [np.concatenate((row, rng.integers(1, 40, 4))) for row in rows]
    cache = model.make_cache(3, 13)
    most = max(map(len, rows))
    left = {name: field.flip(1) for name, field in rectangle([row[::-1] for row in rows], torch.device("cpu")).items()}
    states = [model(left, cache)[:, -1]]
    cache.start_decoding()
    for step in range(4):
        tokens = torch.tensor([[text[len(row) + step]] for row, text in zip(rows, whole, strict=True)])
        states.append(model({"tokens": tokens, "positions": torch.tensor([[most + step]])}, cache)[:, -1])
    for i, (row, text) in enumerate(zip(rows, whole, strict=True)):
        want = model({"tokens": torch.from_numpy(text)[None]})[0][len(row) - 1 :]
        torch.testing.assert_close(torch.stack(states)[:, i], want, rtol=0, atol=1e-6)
    cache.select(torch.tensor([2, 2]))
    again = model({"tokens": torch.tensor([[5], [5]])}, cache)
    torch.testing.assert_close(again[0], again[1])
    want = model({"tokens": torch.from_numpy(np.append(whole[2], 5))[None]})[0, -1:]
    torch.testing.assert_close(again[0], want, rtol=0, atol=1e-6)


def test_rows_that_go_on_hold_one_document() -> None:
    model = LM(shape_of("lstm"), {})
    batch = {"tokens": torch.ones(1, 4, dtype=torch.int64), "document_ids": torch.tensor([[1, 1, 2, 2]])}
    with pytest.raises(UserError, match="one document each"):
        model(batch, model.make_cache(1, 8))


COUNTED = {
    **ALL,
    "rnn": shape_of("rnn"),
    "projected": shape_of("lstm", hidden=24),
    "places, segments, untied": shape_of("gru", position="learned", context=9, segments=2, tied=False),
    "spelled attention": dataclasses.replace(decoder_config(40, 64, 1), max_characters=8, char_filters=64),
    "vectors": ModelConfig(
        vocab_size=40, hidden_size=8, num_layers=0, num_heads=1, norm_placement="post", position="none"
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_counted_exactly(name: str) -> None:
    from firth.model.heads import LMHead
    from firth.objectives.bilm import BiLM

    config = COUNTED[name]
    model = LM(config, BiLM().heads(config) if config.separate_directions else {"lm": LMHead(config)})
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())


def test_elmo_as_published_has_93_6_million_parameters() -> None:
    config = bilm(100, 1024, 2, characters=50, filters=2048, hidden=4096)
    head = 100 * (512 + 1)
    assert round((config.num_parameters() - head) / 1e6, 1) == 93.7  # torch has two biases a layer: 65,536 numbers more
    assert round((config.num_parameters() - head - 2 * 2 * 4 * 4096) / 1e6, 1) == 93.6


@pytest.mark.parametrize("name", ["one direction", "two directions", "two directions apart", "projected"])
def test_a_step_costs_what_is_counted(name: str) -> None:
    """The products of one token: torch's counter does not look into its recurrent kernels, so cells are written out."""
    config = COUNTED[name]
    batch = {"tokens": torch.randint(40, (3, 8))}
    counted = 0
    for layer in LM(config, {}).stack.stack():
        for one in (layer.ahead, layer.back):
            weights = [] if one is None else [p for p in one.parameters() if p.ndim == 2]
            for w in weights:
                with FlopCounterMode(display=False) as counter:
                    (torch.ones(24, w.shape[1], requires_grad=True) @ w.t()).sum().backward()
                counted += counter.get_total_flops()
    assert flops.stack_flops(config, flops.work(batch)) == counted


@pytest.mark.parametrize("name", ["one direction", "two directions", "spelled"])
def test_a_saved_model_comes_back(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = LM(ALL[name], {})
    model.set_token_characters([f"piece{i}" for i in range(40)])
    assert "only firth" in save_model(model, None, tmp_path)
    again = load_model(tmp_path)
    tokens = {"tokens": torch.randint(40, (2, 6))}
    assert torch.equal(model.eval()(tokens), again(tokens))
    kept = rebuild_head(describe_head(model), "model")
    assert kept.shape == model.config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qk_norm": True}, "model.qk_norm=True means nothing to recurrent layers"),
        ({"norm_placement": "pre"}, "model.norm_placement='?pre'?"),
        ({"num_encoder_layers": 2}, "model.num_encoder_layers=2"),
        ({"position": "rotary"}, "rotary positions are for attention"),
        ({"separate_directions": True}, "model.causal=false"),
        ({"causal": False, "hidden_size": 17, "head_dim": 17, "intermediate_size": 0}, "make it even"),
        ({"intermediate_size": 12}, "leave model.intermediate_size out"),
        ({"rnn_type": "gru", "intermediate_size": 24}, "only an LSTM"),
        ({"rnn_type": "", "rnn_residual": True}, "recurrent layers"),
        ({"max_characters": 8}, "tied=false"),
        ({"max_characters": 8, "tie_embeddings": False, "char_filters": 100}, "64, 128"),
        ({"rnn_type": "elman"}, "not one of"),
    ],
)
def test_what_recurrent_layers_cannot_do_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dataclasses.replace(recurrent_config(40, 16, 2), **changes)


def test_depth_zero_is_the_embeddings() -> None:
    model = LM(COUNTED["vectors"], {})
    tokens = torch.randint(40, (2, 5))
    assert torch.equal(model({"tokens": tokens}), model.tokens(tokens))
    assert len(model.all_hidden_states({"tokens": tokens})) == 1
    with pytest.raises(UserError, match=r"model\.num_layers=0"):
        dataclasses.replace(COUNTED["vectors"], num_encoder_layers=2)


@pytest.mark.parametrize("shape", [ALL["two directions apart"], ALL["one direction"], ModelConfig(40, 16, 2, 2)])
def test_the_layers_of_a_model_are_shown(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = LM(config, {}).eval()
    batch = CausalLM().build_example({"tokens": np.arange(1, 9)}, VOCAB, np.random.default_rng(0))
    fields = collate([batch] * 2)
    states = model.all_hidden_states(fields)
    assert states.shape == (3, 2, 7, config.hidden_size)
    assert torch.equal(states[-1], model(fields))
    assert not torch.equal(states[0], states[1])
