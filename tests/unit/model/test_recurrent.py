"""Recurrent stacks against the modules of torch.nn: states, caches, counts and errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from firth.data.collate import collate, pack
from firth.generate.decoding_batch import rectangle
from firth.model import flops
from firth.model.config import ModelConfig, decoder_config, recurrent_config
from firth.model.config_groups import NormConfig, PositionConfig
from firth.model.flops import num_parameters
from firth.model.forward_context import ForwardContext
from firth.model.heads import describe_head, rebuild_head
from firth.model.model import LM
from firth.model.recurrent import RecurrentStack
from firth.objectives.causal_lm import CausalLM
from firth.pretrained.load_save import load_model, save_model
from firth.recipes.recurrent import elmo_config
from firth.tokenizer.vocab import Vocab
from firth.types import UserError

KINDS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
VOCAB = Vocab(size=40, roles={"pad": 0}, special=np.arange(40) < 1)


def config_of(kind: str, **changes: Any) -> ModelConfig:
    return dataclasses.replace(recurrent_config(40, 16, 2, kind), **{"intermediate_size": 0} | changes)  # type: ignore[arg-type]


def with_weights(theirs: nn.RNNBase, ours: RecurrentStack) -> nn.RNNBase:
    """Return a module of torch.nn with the weights of our stack."""
    with torch.no_grad():
        for i, layer in enumerate(ours.stack()):
            for suffix, one in (("", layer.ahead), ("_reverse", layer.back)):
                for name, p in () if one is None else one.named_parameters():
                    getattr(theirs, name.replace("_l0", f"_l{i}") + suffix).copy_(p)
    return theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("causal", [True, False])
def test_states_and_gradients_match_torch(kind: str, causal: bool) -> None:
    torch.manual_seed(0)
    ours = LM(config_of(kind, causal=causal), {})
    theirs = with_weights(
        KINDS[kind](16, 16 if causal else 8, 2, batch_first=True, bidirectional=not causal), ours.stack
    )
    tokens = torch.randint(40, (3, 11))
    want, _ = theirs(ours.tokens(tokens))
    got = ours({"tokens": tokens})
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    grad = torch.randn_like(want)
    (want * grad).sum().backward()
    (got * grad).sum().backward()
    layer = ours.stack.stack()[1]
    torch.testing.assert_close(layer.ahead.weight_hh_l0.grad, theirs.weight_hh_l1.grad, rtol=1e-4, atol=1e-5)
    if layer.back is not None:
        torch.testing.assert_close(layer.back.weight_ih_l0.grad, theirs.weight_ih_l1_reverse.grad, rtol=1e-4, atol=1e-5)


def test_lstm_with_projection_and_dropout_matches_torch() -> None:
    torch.manual_seed(0)
    ours = LM(config_of("lstm", intermediate_size=24, num_layers=2), {})
    theirs = with_weights(nn.LSTM(16, 24, 2, batch_first=True, proj_size=16), ours.stack)
    tokens = torch.randint(40, (2, 9))
    torch.testing.assert_close(ours({"tokens": tokens}), theirs(ours.tokens(tokens))[0], rtol=0, atol=1e-6)
    dropping = LM(config_of("lstm", dropout=0.5), {})
    batch = {"tokens": tokens}
    torch.manual_seed(1)
    once = dropping(batch)
    assert not torch.equal(once, dropping(batch))
    assert (once == 0).float().mean() > 0.3  # dropout applies to the output of the last layer too
    dropping.eval()
    assert torch.equal(dropping(batch), dropping(batch))


CONFIGS = {
    "causal": config_of("lstm"),
    "causal gru": config_of("gru"),
    "bidirectional": config_of("lstm", causal=False),
    "separate directions": config_of("lstm", causal=False).with_fields(
        {"rnn.separate_directions": True, "rnn.residual": True}
    ),
    "character CNN": dataclasses.replace(elmo_config(40, 16, 2, characters=8, filters=64), max_positions=64),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_and_packing_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = LM(CONFIGS[name], {})
    model.set_token_characters([f"piece{i}" for i in range(40)])
    rng = np.random.default_rng(0)
    rows = [{"tokens": rng.integers(1, 40, n)} for n in (7, 3, 12, 1, 5)]
    single = [model({"tokens": torch.from_numpy(r["tokens"])[None]})[0] for r in rows]
    padded = collate(rows)
    found = model(padded)
    for row, state in zip(found, single, strict=True):
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
        like = next(a for a in single if len(a) == len(state))
        torch.testing.assert_close(state, like, rtol=0, atol=1e-6)
    left = {"tokens": padded["tokens"].flip(1), "key_time": padded["key_time"].flip(1)}  # left-padded, like prompts
    found = model(left)
    for row, example in zip(found, rows, strict=True):
        state = model({"tokens": torch.from_numpy(example["tokens"][::-1].copy())[None]})[0]
        torch.testing.assert_close(row[-len(state) :], state, rtol=0, atol=1e-6)


def test_causal_reads_the_past_and_bidirectional_reads_all() -> None:
    tokens = torch.randint(40, (1, 10))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 40
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = LM(config, {})
        model.set_token_characters([f"{i} piece" for i in range(40)])
        changed_states = (model({"tokens": tokens}) - model({"tokens": changed})).abs() > 0  # (1, T, width)
        if config.causal:
            assert not changed_states[0, :6].any() and changed_states[0, 6:].any(-1).all(), name
        elif config.rnn.separate_directions:
            ahead, back = changed_states[0].chunk(2, -1)
            assert not ahead[:6].any() and ahead[6:].any(-1).all(), name
            assert not back[7:].any() and back[:7].any(-1).all(), name
        else:
            assert changed_states[0].any(-1).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_matches_the_forward_pass(kind: str) -> None:
    torch.manual_seed(0)
    model = LM(config_of(kind), {}).eval()
    rng = np.random.default_rng(1)
    rows = [rng.integers(1, 40, n) for n in (6, 2, 9)]
    whole = [np.concatenate((row, rng.integers(1, 40, 4))) for row in rows]
    cache = model.make_cache(3, 13)
    most = max(map(len, rows))
    left = {name: field.flip(1) for name, field in rectangle([row[::-1] for row in rows], torch.device("cpu")).items()}
    states = [model(left, ForwardContext(cache))[:, -1]]
    for step in range(4):
        tokens = torch.tensor([[text[len(row) + step]] for row, text in zip(rows, whole, strict=True)])
        states.append(
            model({"tokens": tokens, "positions": torch.tensor([[most + step]])}, ForwardContext(cache))[:, -1]
        )
    for i, (row, text) in enumerate(zip(rows, whole, strict=True)):
        want = model({"tokens": torch.from_numpy(text)[None]})[0][len(row) - 1 :]
        torch.testing.assert_close(torch.stack(states)[:, i], want, rtol=0, atol=1e-6)
    twice = model.make_decoding_cache(2)
    twice.add(cache, [1, 2, 2], [6, 13, 13], capacity=14)
    twice.remove([0])
    again = model({"tokens": torch.tensor([[5], [5]])}, ForwardContext(twice))
    torch.testing.assert_close(again[0], again[1])
    want = model({"tokens": torch.from_numpy(np.append(whole[2], 5))[None]})[0, -1:]
    torch.testing.assert_close(again[0], want, rtol=0, atol=1e-6)


def test_cache_needs_one_document_per_row() -> None:
    model = LM(config_of("lstm"), {})
    batch = {"tokens": torch.ones(1, 4, dtype=torch.int64), "document_ids": torch.tensor([[1, 1, 2, 2]])}
    with pytest.raises(UserError, match="one document each"):
        model(batch, ForwardContext(model.make_cache(1, 8)))


COUNTED = {
    **CONFIGS,
    "rnn": config_of("rnn"),
    "projected": config_of("lstm", intermediate_size=24),
    "positions, token types, untied": config_of("gru", max_positions=9, tie_embeddings=False).with_fields(
        {"position.type": "learned", "embedding.type_vocab_size": 2}
    ),
    "character CNN and attention": decoder_config(40, 64, 1).with_fields(
        {"embedding.characters.max_length": 8, "embedding.characters.num_filters": 64}
    ),
    "word vectors": ModelConfig(
        vocab_size=40,
        hidden_size=8,
        num_layers=0,
        num_heads=1,
        norm=NormConfig(placement="post"),
        position=PositionConfig("none"),
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_parameters_are_counted_exactly(name: str) -> None:
    from firth.model.heads import LMHead
    from firth.objectives.causal_lm import BiLM

    config = COUNTED[name]
    model = LM(config, BiLM().heads(config) if config.rnn.separate_directions else {"lm": LMHead(config)})
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())


def test_published_elmo_has_93_6_million_parameters() -> None:
    config = elmo_config(100, 1024, 2, characters=50, filters=2048, hidden=4096)
    head = 100 * (512 + 1)
    assert round((num_parameters(config) - head) / 1e6, 1) == 93.7  # torch has two biases a layer: 65,536 numbers more
    assert round((num_parameters(config) - head - 2 * 2 * 4 * 4096) / 1e6, 1) == 93.6


@pytest.mark.parametrize("name", ["causal", "bidirectional", "separate directions", "projected"])
def test_flops_of_a_step(name: str) -> None:
    """The products of one token; torch's counter does not see into its recurrent kernels, so cells are written out."""
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


@pytest.mark.parametrize("name", ["causal", "bidirectional", "character CNN"])
def test_a_saved_model_is_loaded_unchanged(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    model = LM(CONFIGS[name], {})
    model.set_token_characters([f"piece{i}" for i in range(40)])
    assert "only firth" in save_model(model, None, tmp_path)
    again = load_model(tmp_path)
    tokens = {"tokens": torch.randint(40, (2, 6))}
    assert torch.equal(model.eval()(tokens), again(tokens))
    rebuilt = rebuild_head(describe_head(model), "model")
    assert rebuilt.config == model.config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention.qk_norm": True}, "model.attention.qk_norm=True has no effect on recurrent layers"),
        ({"norm.placement": "pre"}, "model.norm.placement='?pre'?"),
        ({"encoder.num_layers": 2}, "model.encoder.num_layers=2"),
        ({"position.type": "rotary"}, "model.position=rotary is for attention"),
        ({"rnn.separate_directions": True}, "model.causal=false"),
        ({"causal": False, "hidden_size": 17, "head_dim": 17, "intermediate_size": 0}, "make it even"),
        ({"intermediate_size": 12}, "leave model.intermediate_size out"),
        ({"rnn.type": "gru", "intermediate_size": 24}, "only an LSTM"),
        ({"rnn.type": "", "rnn.residual": True}, "recurrent layers"),
        ({"embedding.characters.max_length": 8}, "tie_embeddings=false"),
        (
            {"embedding.characters.max_length": 8, "tie_embeddings": False, "embedding.characters.num_filters": 100},
            "64, 128",
        ),
        ({"rnn.type": "elman"}, "model.rnn.type='elman' should be '', 'rnn', 'gru' or 'lstm'"),
    ],
)
def test_unsupported_options_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recurrent_config(40, 16, 2).with_fields(changes)


def test_zero_layers_return_the_embeddings() -> None:
    model = LM(COUNTED["word vectors"], {})
    tokens = torch.randint(40, (2, 5))
    assert torch.equal(model({"tokens": tokens}), model.tokens(tokens))
    assert len(model.all_hidden_states({"tokens": tokens})) == 1
    with pytest.raises(UserError, match=r"model\.num_layers=0"):
        COUNTED["word vectors"].with_fields({"encoder.num_layers": 2})


@pytest.mark.parametrize("config", [CONFIGS["separate directions"], CONFIGS["causal"], ModelConfig(40, 16, 2, 2)])
def test_all_hidden_states(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = LM(config, {}).eval()
    batch = CausalLM().build_example({"tokens": np.arange(1, 9)}, VOCAB, np.random.default_rng(0))
    fields = collate([batch] * 2)
    states = model.all_hidden_states(fields)
    assert states.shape == (3, 2, 7, config.hidden_size)
    assert torch.equal(states[-1], model(fields))
    assert not torch.equal(states[0], states[1])
