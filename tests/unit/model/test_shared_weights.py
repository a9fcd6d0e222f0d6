"""Shared blocks, small embeddings and submodels: shared weights are counted, trained and saved once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from firth.model.block import Block
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.config_groups import EmbeddingConfig, LMHeadConfig, NormConfig
from firth.model.flops import num_parameters
from firth.model.forward_context import ForwardContext
from firth.model.heads import LMHead
from firth.model.model import LM, TiedSubmodel
from firth.objectives.replaced_tokens import RTD, generator_config
from firth.pretrained.load_save import init_from, load_model, save_model
from firth.training.optimizer import Optimizer, OptimizerConfig, param_groups
from firth.types import UserError

ALBERT = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=6,
    num_heads=4,
    max_positions=40,
    embedding=EmbeddingConfig(size=12, type_vocab_size=2),
    num_layer_groups=1,
    causal=False,
    norm=NormConfig(placement="post", embedding=True),
    lm_head=LMHeadConfig("transform", bias=True),
)
ENCODER = encoder_config(61, 64, 3, max_positions=40).with_fields({"init.zero_output": False})
CONFIGS = {
    "albert": ALBERT,
    "two groups": ALBERT.with_fields(
        {"num_layer_groups": 2, "norm.placement": "pre", "norm.type": "rms", "bias": False}
    ),
    "untied": ALBERT.with_fields({"tie_embeddings": False, "lm_head.type": "linear"}),
    "untied, transformed": replace(ALBERT, tie_embeddings=False),
    "default encoder, shared and narrow": ENCODER.with_fields(
        {"num_layer_groups": 1, "embedding.size": 20, "norm.first_attention": True}
    ),
    "shared decoder": decoder_config(61, 64, 4).with_fields({"num_layer_groups": 2, "embedding.size": 16}),
    "encoder-decoder": encoder_decoder_config(61, 64, 4).with_fields({"num_layer_groups": 2, "embedding.size": 16}),
}


def build(config: ModelConfig) -> LM:
    torch.manual_seed(0)
    return LM(config, {"lm": LMHead(config)})


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_counted_exactly(name: str) -> None:
    model = build(CONFIGS[name])
    assert num_parameters(CONFIGS[name]) == sum(p.numel() for p in model.parameters())


def test_shared_blocks_match_copies() -> None:
    """Layers that share a block match an unshared model with copies of it; the gradient is the sum of theirs."""
    config = CONFIGS["two groups"]
    shared, plain = build(config), build(replace(config, num_layer_groups=0))
    state = shared.state_dict()
    for name in plain.state_dict():
        names = name.split(".")
        if names[:2] == ["stack", "blocks"]:
            names[2] = str(int(names[2]) // 3)
        plain.state_dict()[name].copy_(state[".".join(names)])
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
def test_shared_layers_have_their_own_keys_in_a_cache(name: str) -> None:
    config = CONFIGS[name].with_fields({"init.zero_output": False})
    model = build(config).eval()
    tokens, when = torch.randint(0, 61, (2, 9)), torch.arange(9)[None].expand(2, 9)
    batch = {"tokens": tokens, "query_time": when, "key_time": when}
    if config.encoder.num_layers:
        batch["source_tokens"] = torch.randint(0, 61, (2, 7))
    whole, cache = model(batch), model.make_cache(2, 9)
    source = {n: x for n, x in batch.items() if n.startswith("source")}
    pieces = [
        model({n: batch[n][:, i:j] for n in ("tokens", "query_time", "key_time")} | source, ForwardContext(cache))
        for i, j in ((0, 4), (4, 9))
    ]
    assert len(cache.keys) == 4
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head.type": "linear"}, "cannot be tied to tables of model.embedding.size=12"),
        ({"num_layer_groups": 7}, "model.num_layer_groups=7 is more than the number of layers"),
        ({"norm.first_attention": False}, "cannot differ in their first norm"),
        ({"embedding.size": -1}, "model.embedding.size=-1 should be greater than or equal to 0"),
        ({"embedding.size": 13, "position.type": "sinusoidal"}, "an embedding width of 13 is odd"),
    ],
)
def test_bad_combinations_are_rejected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ALBERT.with_fields(changes)


def electra(config: ModelConfig = ENCODER) -> LM:
    torch.manual_seed(0)
    return LM(config, RTD().heads(config))


def test_every_parameter_is_in_one_group() -> None:
    config = ENCODER.with_fields({"embedding.size": 24, "num_layer_groups": 1, "norm.first_attention": True})
    model = electra(config)
    groups = param_groups(OptimizerConfig(), model)
    assert len({id(p.parameter) for p in groups}) == len(groups) == len(list(model.parameters()))
    kinds = {p.name: (p.muon, p.weight_decay > 0) for p in groups}
    assert kinds["stack.project.weight"] == kinds["heads.generator.stack.project.weight"] == (True, True)
    assert (
        kinds["stack.blocks.0.mlp.up.weight"] == kinds["heads.generator.stack.blocks.0.mlp.up.weight"] == (True, True)
    )
    assert kinds["tokens.weight"] == (False, False)
    assert kinds["heads.generator.heads.lm.dense.weight"] == kinds["heads.replaced.0.weight"] == (False, True)
    assert not {"heads.generator.tokens.weight", "heads.generator.heads.lm.weight"} & kinds.keys()
    assert not any(name.startswith("stack.blocks.1") for name in kinds)


def test_a_submodel_shares_the_embeddings_of_its_host() -> None:
    for config in (ENCODER, ALBERT):
        model = electra(config)
        submodel = model.heads["generator"]
        for name, table in model.embedding_tables().items():
            own = submodel.embedding_tables()[name]
            assert (own is None) == (table is None)
            assert table is None or own.weight is table.weight
        assert submodel.heads["lm"].weight is model.tokens.weight
        generator = LM(submodel.config, {"lm": LMHead(submodel.config)})
        host = LM(config, {"replaced": torch.nn.Identity()})
        head = sum(p.numel() for p in model.heads["replaced"].parameters())
        tables = sum(t.weight.numel() for t in host.embedding_tables().values() if t is not None)
        both = sum(p.numel() for m in (generator, host) for p in m.parameters())
        assert sum(p.numel() for p in model.parameters()) == both - tables + head


def test_a_submodel_with_other_embeddings_is_rejected() -> None:
    small = generator_config(ENCODER, 0.25)
    for other, message in (
        (replace(small, vocab_size=60), "tokens"),
        (small.with_fields({"embedding.type_vocab_size": 2}), "token_types"),
    ):
        with pytest.raises(UserError, match=message):
            LM(ENCODER, {"generator": TiedSubmodel(other, {"lm": LMHead(other)})})


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [ENCODER, replace(ALBERT, num_layer_groups=0, activation="gelu")], ids=["modern", "electra"]
)
def test_shared_weights_are_saved_once_and_loaded_shared(config: ModelConfig, tmp_path: Path) -> None:
    model = electra(config)
    note = save_model(model, None, tmp_path)
    assert ("ElectraForPreTraining" in note) == (config is not ENCODER)
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
    directory = tmp_path / "generator"
    save_model(model.heads["generator"], None, directory)
    assert torch.equal(load_model(directory).tokens.weight, model.tokens.weight)


def test_optimizer_state_of_shared_weights_is_restored() -> None:
    config = replace(ALBERT, num_layer_groups=2)
    tokens = torch.randint(0, 61, (2, 9))

    def train_step(model: LM, optimizer: Optimizer) -> None:
        torch.manual_seed(1)
        model({"tokens": tokens}).square().sum().backward()
        optimizer.step(1.0)

    whole, part = electra(config), electra(config)
    optimizers = [Optimizer(OptimizerConfig(), m) for m in (whole, part)]
    train_step(whole, optimizers[0])
    train_step(part, optimizers[1])
    resumed = electra(config)
    resumed.load_state_dict(part.state_dict())
    optimizer = Optimizer(OptimizerConfig(), resumed)
    optimizer.restore(optimizers[1].state())
    train_step(whole, optimizers[0])
    train_step(resumed, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert sum(type(m) is Block for m in whole.stack.modules()) == 2
