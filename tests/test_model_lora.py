"""LoRA on the model: where it lies, that it begins as nothing, merging to 1e-5 and back to the bit, several at once."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from firth.generate.decoding import DecodingBatch, attention_pattern_of
from firth.generate.quantized import quantize
from firth.generate.sampling import Sampling
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.fused import FEW
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.presets import bert
from firth.objectives.causal_lm import CausalLM
from firth.peft import lora
from firth.peft.lora import LoraConfig
from firth.types import UserError

DECODER = replace(decoder_config(50, 64, 2, num_heads=2, max_positions=40), tie_embeddings=True)
SHAPES: dict[str, ModelConfig] = {
    "decoder": DECODER,
    "untied": replace(DECODER, tie_embeddings=False),
    "encoder": encoder_config(50, 64, 2, num_heads=2, max_positions=40),
    "encoder-decoder": encoder_decoder_config(50, 64, 2, num_heads=2, max_positions=40),
    "shared": replace(bert(50, 64, 3, 2, max_positions=40), num_layer_groups=1, embedding_size=16),
}
EVERYWHERE = ("blocks.*", "heads.lm")


def made(config: ModelConfig, seed: int = 0) -> LM:
    torch.manual_seed(seed)
    model = LM(config, {"lm": LMHead(config)}).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def stirred(model: LM, name: str = "default", seed: int = 1) -> LM:
    """What B is after some training, for want of it."""
    torch.manual_seed(seed)
    for low in lora.lora_layers(model, name).values():
        low.B.data.normal_(std=0.1)
    return model


def batch(config: ModelConfig, rows: int = 3, length: int = 9) -> dict[str, Tensor]:
    tokens = torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))
    when = torch.arange(length).expand(rows, -1) * config.causal
    return {"tokens": tokens, "query_time": when, "key_time": when} | (
        {"source_tokens": tokens} if config.num_encoder_layers else {}
    )


@torch.no_grad()
def logits(model: LM) -> Tensor:
    out: Tensor = model.heads["lm"](model(batch(model.config)))
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_an_adapter_begins_as_nothing_and_merged_equals_unmerged(name: str) -> None:
    model = made(SHAPES[name])
    plain, weights = logits(model), {n: p.clone() for n, p in model.state_dict().items()}
    targets = EVERYWHERE if not SHAPES[name].tie_embeddings else ("blocks.*",)
    lora.add(model, targets, LoraConfig(rank=4, alpha=6.0))
    assert torch.equal(logits(model), plain)
    stirred(model)
    moved = logits(model)
    assert (moved - plain).abs().max() > 0.05
    lora.merge(model)
    torch.testing.assert_close(logits(model), moved, atol=1e-5, rtol=0)
    lora.unmerge(model)
    assert torch.equal(logits(model), moved)
    assert all(torch.equal(model.state_dict()[n], x) for n, x in weights.items())
    folded = lora.merge_and_unload(model)
    assert folded.state_dict().keys() == weights.keys() and not lora.adapted(folded)
    torch.testing.assert_close(logits(folded), moved, atol=1e-5, rtol=0)


@pytest.mark.parametrize("target", ["tokens", "heads.lm", "attention.q"])
def test_the_product_is_what_the_paper_says(target: str) -> None:
    """h = W x + scale B A x, written out on the weights of a plain model; on tables and heads too."""
    model, plain = made(SHAPES["untied"]), made(SHAPES["untied"])
    places = lora.add(model, [target], LoraConfig(rank=3, alpha=5.0, use_rslora=True))
    stirred(model)
    with torch.no_grad():
        for place in places:
            low = lora.lora_layers(model)[place]
            plain.get_submodule(place).weight += 5.0 / math.sqrt(3) * low.B @ low.A
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=0)


def test_the_published_number_of_parameters() -> None:
    """RoBERTa-base, q and v, r = 8: 0.3 M (Hu 2021, table 2), which is 294,912."""
    config = bert(50265, 768, 12, 12, type_vocab_size=1)
    with torch.device("meta"):
        model = LM(config, {})
        lora.add(model, ["attention.q", "attention.v"], LoraConfig(rank=8))
    lora.freeze(model)
    assert lora.num_trainable_parameters(model) == 294_912


def test_only_the_adapter_gets_a_gradient_and_the_head_gives_a_whole_one() -> None:
    model = made(SHAPES["untied"]).train()
    lora.add(model, EVERYWHERE, LoraConfig(rank=4))
    lora.freeze(stirred(model))
    rows = batch(model.config) | {"labels": torch.randint(0, 50, (3, 9))}
    CausalLM().loss(model, CausalLM().forward(model, rows), rows)["tokens"].backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    assert found == {name for name, _ in model.named_parameters() if ".low." in name}
    head = model.heads["lm"]
    states = model(rows).detach().flatten(0, 1)
    straight = torch.nn.functional.cross_entropy(
        head(states).float(), rows["labels"].flatten(), reduction="sum"
    )  # through the plain product, and not in pieces
    [wanted] = torch.autograd.grad(straight, [head.low["default"].A])
    torch.testing.assert_close(head.low["default"].A.grad, wanted, atol=1e-4, rtol=1e-4)


def test_several_adapters_are_switched_and_added() -> None:
    model, one, two = (made(DECODER) for _ in range(3))
    for name, seed, own in (("a", 1, one), ("b", 2, two)):
        torch.manual_seed(seed)
        lora.add(model, ["q", "mlp.*"], LoraConfig(rank=4), name)
        torch.manual_seed(seed)
        lora.add(own, ["q", "mlp.*"], LoraConfig(rank=4), name)
        stirred(model, name, seed)
        stirred(own, name, seed)
    for name, own in (("a", one), ("b", two)):
        lora.set_adapters(model, {name: 1.0})
        assert torch.equal(logits(model), logits(own))
    lora.set_adapters(model, {})
    assert torch.equal(logits(model), logits(made(DECODER)))
    lora.set_adapters(model, {"a": 0.5, "b": 2.0})
    both = logits(model)
    for place, low in lora.lora_layers(one, "a").items():
        other = lora.lora_layers(two, "b")[place]
        with torch.no_grad():
            low.A.data, low.B.data = torch.cat((low.A, other.A)), torch.cat((0.5 * low.B, 2 * other.B), 1)
    torch.testing.assert_close(both, logits(one), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="no adapter 'c' on this model; there is a, b"):
        lora.set_adapters(model, {"c": 1.0})


def test_dropout_falls_on_the_adapter_alone() -> None:
    model = made(DECODER)
    lora.add(model, ["q"], LoraConfig(rank=4, dropout=0.5))
    model.train()
    assert torch.equal(logits(model), logits(made(DECODER).train()))
    stirred(model)
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(logits(model.eval()), logits(model))


@pytest.mark.parametrize("rows", [1, FEW.start])
def test_cached_writing_feels_it(rows: int) -> None:
    """A token at a time, where products go another way (`firth.model.fused.project`)."""
    model = stirred(_adapted(made(SHAPES["untied"])))
    prompts = [torch.randint(0, 50, (5,), generator=torch.Generator().manual_seed(i)).numpy() for i in range(rows)]

    def written(of: LM) -> list[list[int]]:
        with attention_pattern_of(of):
            writing = DecodingBatch(of, prompts, None, Sampling(temperature=0, max_new_tokens=6), [0] * rows)
            return [writing.step()[0] for _ in range(6)]

    adapted = written(model)
    assert adapted == written(lora.merge_and_unload(model)) != written(made(SHAPES["untied"]))


def test_small_weights_are_made_of_folded_ones() -> None:
    model = stirred(_adapted(made(SHAPES["untied"])))
    with pytest.raises(UserError, match="fold its adapters into them first"):
        quantize(model, "int8")
    wanted = logits(model)
    found = logits(quantize(lora.merge_and_unload(model), "int8"))
    assert (found - wanted).abs().mean() < 0.02 * wanted.abs().mean()


def _adapted(model: LM) -> LM:
    lora.add(model, ["blocks.*"], LoraConfig(rank=4, alpha=32.0))
    return model


def test_what_is_refused() -> None:
    model = made(DECODER)
    with pytest.raises(UserError, match=r"is called 'query'; there is tokens, attention.q, attention.k, .*, heads.lm$"):
        lora.add(model, ["query"], LoraConfig())
    with pytest.raises(
        UserError, match=r"rank 65 is larger than the matrix stack.blocks.0.attention.q, which is 64 x 64"
    ):
        lora.add(model, ["q"], LoraConfig(rank=65))
    lora.add(model, ["tokens"], LoraConfig())
    with pytest.raises(UserError, match="an adapter 'default' on tokens"):
        lora.add(model, ["tokens"], LoraConfig())
    with pytest.raises(
        UserError, match=r"tokens shares its matrix with heads.lm, .* there is attention.q, attention.k, "
    ):
        lora.merge(model)
