"""Shared blocks, narrow tables and guests: counted once, moved once, saved once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from firth.model.block import Block
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.heads import LMHead
from firth.model.model import LM, TiedSubmodel
from firth.objectives.replaced_tokens import RTD, generator_config
from firth.pretrained.load_save import init_from, load_model, save_model
from firth.train.optimizer import Optimizer, OptimizerConfig, param_groups
from firth.types import UserError

ALBERT = ModelConfig(
    vocab_size=61, hidden_size=32, num_layers=6, num_heads=4, max_positions=40, embedding_size=12, num_layer_groups=1, causal=False, norm_placement="post", type_vocab_size=2,
    embedding_norm=True, lm_head="transform", lm_head_bias=True,
)  # fmt: skip
ENCODER = replace(encoder_config(61, 64, 3, max_positions=40), zero_init=False)
SHAPES = {
    "albert": ALBERT,
    "two groups": replace(ALBERT, num_layer_groups=2, norm_placement="pre", norm="rms", bias=False),
    "untied": replace(ALBERT, tie_embeddings=False, lm_head="linear"),
    "untied, transformed": replace(ALBERT, tie_embeddings=False),
    "default encoder, shared and narrow": replace(
        ENCODER, num_layer_groups=1, embedding_size=20, first_attention_norm=True
    ),
    "shared decoder": replace(decoder_config(61, 64, 4), num_layer_groups=2, embedding_size=16),
    "encoder-decoder": replace(encoder_decoder_config(61, 64, 4), num_layer_groups=2, embedding_size=16),
}


def built(config: ModelConfig) -> LM:
    torch.manual_seed(0)
    return LM(config, {"lm": LMHead(config)})


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted_exactly(name: str) -> None:
    model = built(SHAPES[name])
    assert SHAPES[name].num_parameters() == sum(p.numel() for p in model.parameters())


def test_a_shared_block_is_the_same_block_again_and_again() -> None:
    """Six layers of one block are an unshared model whose six blocks are copies; its gradient is the sum of theirs."""
    config = SHAPES["two groups"]
    shared, plain = built(config), built(replace(config, num_layer_groups=0))
    state = shared.state_dict()
    for name in plain.state_dict():
        parts = name.split(".")
        if parts[:2] == ["stack", "blocks"]:
            parts[2] = str(int(parts[2]) // 3)
        plain.state_dict()[name].copy_(state[".".join(parts)])
    tokens = torch.randint(0, 61, (3, 17))
    a, b = shared({"tokens": tokens}), plain({"tokens": tokens})
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    a.square().sum().backward()
    b.square().sum().backward()
    for group in (0, 1):
        summed = sum(plain.stack.blocks[3 * group + i].mlp.up.weight.grad for i in range(3))
        torch.testing.assert_close(shared.stack.blocks[group].mlp.up.weight.grad, summed)


@pytest.mark.parametrize("name", ["shared decoder", "encoder-decoder"])
@torch.no_grad()
def test_shared_layers_have_keys_of_their_own_in_a_cache(name: str) -> None:
    config = replace(SHAPES[name], zero_init=False)
    model = built(config).eval()
    tokens, when = torch.randint(0, 61, (2, 9)), torch.arange(9)[None].expand(2, 9)
    batch = {"tokens": tokens, "query_time": when, "key_time": when}
    if config.num_encoder_layers:
        batch["source_tokens"] = torch.randint(0, 61, (2, 7))
    whole, cache = model(batch), model.make_cache(2, 9)
    source = {n: x for n, x in batch.items() if n.startswith("source")}
    pieces = [
        model({n: batch[n][:, i:j] for n in ("tokens", "query_time", "key_time")} | source, cache)
        for i, j in ((0, 4), (4, 9))
    ]
    assert len(cache.keys) == 4
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head": "linear"}, "cannot be tied to tables of model.embedding_size=12"),
        ({"num_layer_groups": 7}, "model.num_layer_groups=7 is more than there are layers"),
        ({"first_attention_norm": False}, "cannot differ in their first norm"),
        ({"embedding_size": -1}, "model.embedding_size=-1 must be at least 0"),
        ({"embedding_size": 13, "position": "sinusoidal"}, "a width of 13 is odd"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        replace(ALBERT, **changes)


def electra(config: ModelConfig = ENCODER) -> LM:
    torch.manual_seed(0)
    return LM(config, RTD().heads(config))


def test_every_parameter_has_one_place() -> None:
    config = replace(ENCODER, embedding_size=24, num_layer_groups=1, first_attention_norm=True)
    model = electra(config)
    placed = param_groups(OptimizerConfig(), model)
    assert len({id(p.parameter) for p in placed}) == len(placed) == len(list(model.parameters()))
    kinds = {p.name: (p.muon, p.weight_decay > 0) for p in placed}
    assert kinds["stack.project.weight"] == kinds["heads.generator.stack.project.weight"] == (True, True)
    assert (
        kinds["stack.blocks.0.mlp.up.weight"] == kinds["heads.generator.stack.blocks.0.mlp.up.weight"] == (True, True)
    )
    assert kinds["tokens.weight"] == (False, False)
    assert kinds["heads.generator.heads.lm.dense.weight"] == kinds["heads.replaced.0.weight"] == (False, True)
    assert not {"heads.generator.tokens.weight", "heads.generator.heads.lm.weight"} & kinds.keys()
    assert not any(name.startswith("stack.blocks.1") for name in kinds)


def test_a_guest_reads_with_its_hosts_tables() -> None:
    for config in (ENCODER, ALBERT):
        model = electra(config)
        guest = model.heads["generator"]
        for name, table in model.embedding_tables().items():
            own = guest.tables()[name]
            assert (own is None) == (table is None)
            assert table is None or own.weight is table.weight
        assert guest.parts["lm"].weight is model.tokens.weight
        apart = LM(guest.shape, {"lm": LMHead(guest.shape)})
        host = LM(config, {"replaced": torch.nn.Identity()})
        head = sum(p.numel() for p in model.heads["replaced"].parameters())
        tables = sum(t.weight.numel() for t in host.embedding_tables().values() if t is not None)
        both = sum(p.numel() for m in (apart, host) for p in m.parameters())
        assert sum(p.numel() for p in model.parameters()) == both - tables + head


def test_a_guest_of_other_tables_is_refused() -> None:
    small = generator_config(ENCODER, 0.25)
    for other, said in (
        (replace(small, vocab_size=60), "tokens"),
        (replace(small, type_vocab_size=2), "token_type_ids"),
    ):
        with pytest.raises(UserError, match=said):
            LM(ENCODER, {"generator": TiedSubmodel(other, {"lm": LMHead(other)})})


@pytest.mark.parametrize(
    "shape", [ENCODER, replace(ALBERT, num_layer_groups=0, activation="gelu")], ids=["modern", "electra"]
)
def test_what_is_shared_is_saved_once_and_comes_back_shared(config: ModelConfig, tmp_path: Path) -> None:
    model = electra(config)
    said = save_model(model, None, tmp_path)
    assert ("ElectraForPreTraining" in said) == (config is not ENCODER)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())
    again = load_model(tmp_path)
    assert again.shared_parameters() == model.shared_parameters() and len(model.shared_parameters()) >= 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    new = electra(config)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.zero_()
    assert init_from(new, tmp_path) == ([], [])
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), model.parameters(), strict=True))
    guest = tmp_path / "generator"
    save_model(model.heads["generator"], None, guest)
    assert torch.equal(load_model(guest).tokens.weight, model.tokens.weight)


def test_what_the_mover_remembers_of_shared_weights_comes_back() -> None:
    config = replace(ALBERT, num_layer_groups=2)
    tokens = torch.randint(0, 61, (2, 9))

    def stepped(model: LM, mover: Optimizer) -> None:
        torch.manual_seed(1)
        model({"tokens": tokens}).square().sum().backward()
        mover.step(1.0)

    whole, part = electra(config), electra(config)
    movers = [Optimizer(OptimizerConfig(), m) for m in (whole, part)]
    stepped(whole, movers[0])
    stepped(part, movers[1])
    resumed = electra(config)
    resumed.load_state_dict(part.state_dict())
    mover = Optimizer(OptimizerConfig(), resumed)
    mover.restore(movers[1].state())
    stepped(whole, movers[0])
    stepped(resumed, mover)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert sum(type(m) is Block for m in whole.stack.modules()) == 2
