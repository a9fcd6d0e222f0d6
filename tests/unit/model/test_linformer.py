"""Linformer: full attention with identity projections, padding, FLOPs, and errors for unsupported inputs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from firth.model.attention import AttentionMask
from firth.model.config import ModelConfig, encoder_config
from firth.model.config_groups import InitConfig
from firth.model.flops import num_parameters, stack_flops, work
from firth.model.heads import describe_head, rebuild_head
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.objectives.masked_lm import MLM
from firth.runs.recipe import load
from firth.types import NEVER, UserError

FULL = ModelConfig(
    vocab_size=60,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    max_positions=12,
    causal=False,
    init=InitConfig(zero_output=False, std=0.3),
)
SHARINGS = ["headwise", "key-value", "layerwise"]


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize(
    "body", [FULL, FULL.with_fields({"position.type": "rotary", "num_kv_heads": 1, "norm.placement": "post"})]
)
def test_identity_projections_are_full_attention(sharing: str, body: ModelConfig) -> None:
    torch.manual_seed(0)
    full = LM(body, {})
    short = LM(body.with_fields({"attention.linformer.k": 12, "attention.linformer.sharing": sharing}), {})
    state = full.state_dict()
    state["stack.linformer.weight"] = torch.eye(12).expand_as(short.stack.linformer.weight)
    short.load_state_dict(state)
    batch = {"tokens": tokens(3, 12)}
    torch.testing.assert_close(short(batch), full(batch), rtol=0, atol=1e-4)
    with torch.no_grad():
        short.stack.linformer.weight.mul_(0.9)
    assert (short(batch) - full(batch)).abs().max() > 1e-2


@pytest.mark.parametrize("sharing", SHARINGS)
def test_initial_slots_are_means_of_neighboring_tokens(sharing: str) -> None:
    short = FULL.with_fields({"attention.linformer.k": 12, "attention.linformer.sharing": sharing})
    assert torch.equal(LM(short, {}).stack.linformer.weight, torch.eye(12).expand(*short.linformer_projections, 12, 12))
    slots = LM(short.with_fields({"attention.linformer.k": 4}), {}).stack.linformer.at(12, AttentionMask()).of(1)
    x = torch.randn(2, 2, 12, 5)
    torch.testing.assert_close(slots.mix(x, 1), x.unflatten(2, (4, 3)).mean(3) * 3**0.5)


def test_slot_variance_does_not_depend_on_row_length() -> None:
    """Over all slots, including empty ones."""
    stack = LM(FULL.with_fields({"max_positions": 4096, "attention.linformer.k": 512}), {}).stack
    x = torch.randn(1, 2, 4096, 8, generator=torch.Generator().manual_seed(0))
    whole, part = (stack.linformer.at(n, AttentionMask()).of(0).mix(x[:, :, :n], 0) for n in (4096, 256))
    assert whole.square().mean().item() == pytest.approx(1, abs=0.1)
    assert part.square().mean().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_parameter_count_and_sharing(sharing: str) -> None:
    config = encoder_config(60, 32, 3, num_heads=2, max_positions=12).with_fields(
        {"attention.linformer.k": 4, "attention.linformer.sharing": sharing}
    )
    model = LM(config, MLM().heads(config))
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config)
    assert (
        model.stack.linformer.weight.shape[:2]
        == {"headwise": (3, 2), "key-value": (3, 1), "layerwise": (1, 1)}[sharing]
    )
    assert describe_head(model) == describe_head(rebuild_head(describe_head(model), "model"))


def test_headwise_has_separate_projections() -> None:
    torch.manual_seed(0)
    model = LM(FULL.with_fields({"attention.linformer.k": 4, "attention.linformer.sharing": "headwise"}), {})
    batch = {"tokens": tokens(2, 9)}
    before = model(batch)
    for layer in range(2):
        for side in range(2):
            kept = model.stack.linformer.weight.detach().clone()
            with torch.no_grad():
                model.stack.linformer.weight[layer, side] *= 3
            assert (model(batch) - before).abs().max() > 1e-3, (layer, side)
            with torch.no_grad():
                model.stack.linformer.weight.copy_(kept)


def test_padding_adds_nothing() -> None:
    torch.manual_seed(0)
    model = LM(FULL.with_fields({"attention.linformer.k": 4}), {})
    own = tokens(2, 7)
    unpadded = model({"tokens": own})
    padded = torch.cat((own, tokens(2, 4, seed=1)), 1)
    key_time = torch.zeros_like(padded).masked_fill(torch.arange(11) >= 7, NEVER)
    torch.testing.assert_close(model({"tokens": padded, "key_time": key_time})[:, :7], unpadded, rtol=0, atol=1e-5)
    assert (model({"tokens": padded})[:, :7] - unpadded).abs().max() > 1e-3


def test_unsupported_inputs_are_rejected() -> None:
    model = LM(FULL.with_fields({"attention.linformer.k": 4}), {})
    when = torch.arange(6)[None]
    for fields in ({"query_time": when, "key_time": when}, {"document_ids": torch.tensor([[1, 1, 1, 2, 2, 2]])}):
        with pytest.raises(UserError, match="every position must attend to the whole row"):
            model({"tokens": tokens(1, 6), **fields})
    with pytest.raises(UserError, match=r"13 tokens is longer than model.max_positions=12"):
        LM(FULL.with_fields({"attention.linformer.k": 4, "position.type": "rotary"}), {})({"tokens": tokens(1, 13)})
    with pytest.raises(UserError, match="cannot write token by token"):
        model.make_cache(1, 8)
    for bad in ({"causal": True}, {"encoder.num_layers": 1}, {"position.type": "t5"}, {"attention.linformer.k": 13}):
        with pytest.raises(UserError, match=r"model\.attention\.linformer\.k=\d+ mixes a whole row"):
            FULL.with_fields({"attention.linformer.k": 4} | bad)


def test_unsupported_recipes_are_rejected_on_load() -> None:
    with pytest.raises(UserError, match="which a Linformer cannot"):
        load("linformer", ["objective=causal_lm"])
    with pytest.raises(UserError, match=r"a Linformer reads one document a row, and batch.pack_to_length=256"):
        load("linformer", ["batch.pack_to_length=256"])


def test_flops_match_torch() -> None:
    config = FULL.with_fields({"attention.linformer.k": 4, "attention.linformer.sharing": "headwise"})
    model = LM(config, {})
    batch = {"tokens": tokens(3, 10)}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(batch).sum().backward()
    assert counter.get_total_flops() == stack_flops(config, work(batch))
    assert CausalLM().attention not in config.supported_patterns
