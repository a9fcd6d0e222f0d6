"""LoRA on a model: targets, zero initial update, merging to 1e-5, exact unmerging, several adapters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from firth.generate.decoding_batch import DecodingBatch, inference_mode, read_prompts
from firth.generate.quantized import quantize
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.fused import SMALL_ROW_COUNTS
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.presets import bert
from firth.objectives.causal_lm import CausalLM
from firth.peft import lora
from firth.peft.lora import LoraConfig
from firth.types import UserError

DECODER = replace(decoder_config(50, 64, 2, num_heads=2, max_positions=40), tie_embeddings=True)
CONFIGS: dict[str, ModelConfig] = {
    "decoder": DECODER,
    "untied": replace(DECODER, tie_embeddings=False),
    "encoder": encoder_config(50, 64, 2, num_heads=2, max_positions=40),
    "encoder-decoder": encoder_decoder_config(50, 64, 2, num_heads=2, max_positions=40),
    "shared": bert(50, 64, 3, 2, max_positions=40).with_fields({"num_layer_groups": 1, "embedding.size": 16}),
}
ALL_TARGETS = ("blocks.*", "heads.lm")


def random_model(config: ModelConfig, seed: int = 0) -> LM:
    torch.manual_seed(seed)
    model = LM(config, {"lm": LMHead(config)}).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def with_random_b(model: LM, name: str = "default", seed: int = 1) -> LM:
    """Set B to random values, as after training."""
    torch.manual_seed(seed)
    for low in lora.lora_layers(model, name).values():
        low.B.data.normal_(std=0.1)
    return model


def batch(config: ModelConfig, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    tokens = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))
    when = torch.arange(length).expand(rows, -1) * config.causal
    return {"tokens": tokens, "query_time": when, "key_time": when} | (
        {"source_tokens": tokens} if config.encoder.num_layers else {}
    )


@torch.no_grad()
def logits(model: LM) -> Tensor:
    out: Tensor = model.heads["lm"](model(batch(model.config)))
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_initial_update_is_zero_and_merging_is_exact(name: str) -> None:
    model = random_model(CONFIGS[name])
    plain, weights = logits(model), {n: p.clone() for n, p in model.state_dict().items()}
    targets = ALL_TARGETS if not CONFIGS[name].tie_embeddings else ("blocks.*",)
    lora.add(model, targets, LoraConfig(rank=4, alpha=6.0))
    assert torch.equal(logits(model), plain)
    with_random_b(model)
    changed = logits(model)
    assert (changed - plain).abs().max() > 0.05
    lora.merge(model)
    torch.testing.assert_close(logits(model), changed, atol=1e-5, rtol=0)
    lora.unmerge(model)
    assert torch.equal(logits(model), changed)
    assert all(torch.equal(model.state_dict()[n], x) for n, x in weights.items())
    merged = lora.merge_and_unload(model)
    assert merged.state_dict().keys() == weights.keys() and not lora.adapted(merged)
    torch.testing.assert_close(logits(merged), changed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", ["tokens", "heads.lm", "attention.q"])
def test_the_update_matches_the_paper(target: str) -> None:
    """h = W x + scale B A x, added to the weights of a plain model; for embeddings and heads too."""
    model, plain = random_model(CONFIGS["untied"]), random_model(CONFIGS["untied"])
    module_names = lora.add(model, [target], LoraConfig(rank=3, alpha=5.0, use_rslora=True))
    with_random_b(model)
    with torch.no_grad():
        for name in module_names:
            low = lora.lora_layers(model)[name]
            plain.get_submodule(name).weight += 5.0 / math.sqrt(3) * low.B @ low.A
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=0)


def test_the_published_parameter_count() -> None:
    """RoBERTa-base, q and v, r = 8: 0.3 M (Hu 2021, table 2), which is 294,912."""
    config = bert(50265, 768, 12, 12, type_vocab_size=1)
    with torch.device("meta"):
        model = LM(config, {})
        lora.add(model, ["attention.q", "attention.v"], LoraConfig(rank=8))
    lora.freeze(model)
    assert lora.num_trainable_parameters(model) == 294_912


def test_only_the_adapter_gets_a_gradient() -> None:
    model = random_model(CONFIGS["untied"]).train()
    lora.add(model, ALL_TARGETS, LoraConfig(rank=4))
    lora.freeze(with_random_b(model))
    rows = batch(model.config) | {"labels": torch.randint(0, 50, (3, 9))}
    CausalLM().loss(model, CausalLM().forward(model, rows), rows)["tokens"].backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert found == {name for name, _ in model.named_parameters() if ".low." in name}
    head = model.heads["lm"]
    states = model(rows).detach().flatten(0, 1)
    straight = torch.nn.functional.cross_entropy(
        head(states).float(), rows["labels"].flatten(), reduction="sum"
    )  # without chunking
    [wanted] = torch.autograd.grad(straight, [head.low["default"].A])
    torch.testing.assert_close(head.low["default"].A.grad, wanted, atol=1e-4, rtol=1e-4)


def test_several_adapters_are_switched_and_added() -> None:
    model, one, two = (random_model(DECODER) for _ in range(3))
    for name, seed, own in (("a", 1, one), ("b", 2, two)):
        torch.manual_seed(seed)
        lora.add(model, ["q", "mlp.*"], LoraConfig(rank=4), name)
        torch.manual_seed(seed)
        lora.add(own, ["q", "mlp.*"], LoraConfig(rank=4), name)
        with_random_b(model, name, seed)
        with_random_b(own, name, seed)
    for name, own in (("a", one), ("b", two)):
        lora.set_adapters(model, {name: 1.0})
        assert torch.equal(logits(model), logits(own))
    lora.set_adapters(model, {})
    assert torch.equal(logits(model), logits(random_model(DECODER)))
    lora.set_adapters(model, {"a": 0.5, "b": 2.0})
    both = logits(model)
    for name, low in lora.lora_layers(one, "a").items():
        other = lora.lora_layers(two, "b")[name]
        with torch.no_grad():
            low.A.data, low.B.data = torch.cat((low.A, other.A)), torch.cat((0.5 * low.B, 2 * other.B), 1)
    torch.testing.assert_close(both, logits(one), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="has no adapter 'c'; its adapters: a, b"):
        lora.set_adapters(model, {"c": 1.0})


def test_dropout_applies_to_the_adapter_alone() -> None:
    model = random_model(DECODER)
    lora.add(model, ["q"], LoraConfig(rank=4, dropout=0.5))
    model.train()
    assert torch.equal(logits(model), logits(random_model(DECODER).train()))
    with_random_b(model)
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))


@pytest.mark.parametrize("rows", [1, SMALL_ROW_COUNTS.start])
def test_cached_generation_uses_the_adapter(rows: int) -> None:
    """One token at a time, where matrix products take another path (`firth.model.fused.project`)."""
    model = with_random_b(_adapted(random_model(CONFIGS["untied"])))
    prompts = [torch.randint(0, 50, (5,), generator=torch.Generator().manual_seed(i)).numpy() for i in range(rows)]

    def generated(of: LM) -> list[list[int]]:
        with inference_mode(of):
            read = read_prompts(of, prompts)
            decoder = DecodingBatch(of, rows)
            decoder.add(read, 5 + 6)
            steps = [decoder.head(read.states).argmax(-1).tolist()]
            while len(steps) < 6:
                steps.append(decoder.logits(steps[-1]).argmax(-1).tolist())
            return steps

    adapted = generated(model)
    assert adapted == generated(lora.merge_and_unload(model)) != generated(random_model(CONFIGS["untied"]))


def test_quantization_needs_merged_weights() -> None:
    model = with_random_b(_adapted(random_model(CONFIGS["untied"])))
    with pytest.raises(UserError, match="merge them first"):
        quantize(model, "int8")
    wanted = logits(model)
    found = logits(quantize(lora.merge_and_unload(model), "int8"))
    assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def _adapted(model: LM) -> LM:
    lora.add(model, ["blocks.*"], LoraConfig(rank=4, alpha=32.0))
    return model


def test_invalid_targets_are_rejected() -> None:
    model = random_model(DECODER)
    with pytest.raises(
        UserError,
        match=r"matches the target 'query'; available targets: tokens, attention.q, attention.k, .*, heads.lm$",
    ):
        lora.add(model, ["query"], LoraConfig())
    with pytest.raises(
        UserError, match=r"rank 65 is too large for stack.blocks.0.attention.q, whose weight is 64 x 64"
    ):
        lora.add(model, ["q"], LoraConfig(rank=65))
    lora.add(model, ["tokens"], LoraConfig())
    with pytest.raises(UserError, match="tokens already has an adapter 'default'"):
        lora.add(model, ["tokens"], LoraConfig())
    with pytest.raises(
        UserError, match=r"tokens shares its weight with heads.lm, .* available targets: attention.q, attention.k, "
    ):
        lora.merge(model)
