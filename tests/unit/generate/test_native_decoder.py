"""The compiled decoding step equals the model for every supported architecture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from firth import kernel_choice
from firth.generate.decoding_batch import DecodingBatch, ReadPrompts, inference_mode, read_chunk, read_prompts
from firth.generate.native_decoder import NativeDecoder
from firth.generate.native_kernels import few_rows
from firth.generate.quantized import quantize
from firth.model import native
from firth.model.config import ModelConfig, decoder_config, encoder_decoder_config, recurrent_config
from firth.model.config_groups import (
    AttentionConfig,
    EmbeddingConfig,
    EncoderConfig,
    LMHeadConfig,
    NormConfig,
    PositionConfig,
    RopeConfig,
)
from firth.model.kv_cache import KVCache
from firth.model.model import LM
from firth.peft import lora
from tests.support.models import random_model

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason="no C compiler is found")

V = 61
BASE = {"vocab_size": V, "hidden_size": 48, "num_layers": 3, "num_heads": 4, "max_positions": 64}
CONFIGS = {
    "gpt2": ModelConfig(**BASE),
    "bias in attention": ModelConfig(**BASE, bias_location="attention"),
    "nanochat": ModelConfig(
        **BASE,
        norm=NormConfig("rms", weight=False, bias=False, embedding=True),
        attention=AttentionConfig(qk_norm=True),
        activation="relu2",
        position=PositionConfig("rotary", rope=RopeConfig(sign=-1)),
        lm_head=LMHeadConfig(softcap=15),
        tie_embeddings=False,
        bias=False,
    ),
    "llama": ModelConfig(
        **BASE,
        num_kv_heads=2,
        norm=NormConfig("rms", bias=False),
        position=PositionConfig("rotary"),
        activation="swiglu",
        bias=False,
        intermediate_size=100,
    ),
    "qwen3": ModelConfig(
        **BASE,
        num_kv_heads=1,
        norm=NormConfig("rms", bias=False),
        position=PositionConfig("rotary"),
        activation="swiglu",
        bias=False,
        attention=AttentionConfig(qk_norm=True, qk_norm_weight=True),
        head_dim=20,
    ),
    "gelu, head bias": ModelConfig(**BASE, activation="gelu", lm_head=LMHeadConfig(bias=True)),
    "silu, no norm weights": ModelConfig(**BASE, activation="silu", norm=NormConfig(weight=False, bias=False)),
    "post-norm, sinusoidal, grouped": ModelConfig(
        **BASE, num_kv_heads=2, position=PositionConfig("sinusoidal"), norm=NormConfig(placement="post")
    ),
    "shared blocks, narrow table": ModelConfig(
        **BASE, num_layer_groups=1, embedding=EmbeddingConfig(size=16), lm_head=LMHeadConfig("transform")
    ),
    "no position, first norm left out": ModelConfig(
        **BASE, position=PositionConfig("none"), norm=NormConfig(first_attention=False), activation="relu"
    ),
    "wide heads": ModelConfig(**(BASE | {"hidden_size": 256, "num_heads": 2}), position=PositionConfig("rotary")),
    "heads of 32": ModelConfig(**(BASE | {"hidden_size": 64, "num_heads": 2}), position=PositionConfig("rotary")),
    "heads of 64": decoder_config(vocab_size=V, hidden_size=128, num_layers=2, num_heads=2, max_positions=64),
    "t5": encoder_decoder_config(vocab_size=V, hidden_size=48, num_layers=2, num_heads=4, max_positions=64),
    "t5, scaled head": encoder_decoder_config(
        vocab_size=V, hidden_size=48, num_layers=2, num_heads=4, max_positions=64
    ).with_fields({"lm_head.scale": 0.125}),
    "bart": ModelConfig(
        **BASE,
        encoder=EncoderConfig(num_layers=2, decoder_start_token="eos"),
        norm=NormConfig(placement="post", embedding=True),
        activation="gelu",
        lm_head=LMHeadConfig(bias=True),
    ),
    "marian": ModelConfig(
        **BASE,
        encoder=EncoderConfig(num_layers=2),
        norm=NormConfig(placement="post"),
        position=PositionConfig("marian"),
        activation="relu",
        embedding=EmbeddingConfig(scale=48**0.5),
    ),
}


def prompts(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, V, rng.integers(2, 12)) for _ in range(count)]


def logits_of(model: LM, way: str, count: int = 5, steps: int = 8, kept: tuple[int, ...] = ()) -> list[Tensor]:
    """Return the logits of each step for given tokens, (rows, V) float32 each; after half of them, only of the rows `kept`."""
    rng = torch.Generator().manual_seed(3)
    tokens = torch.randint(3, V, (count, steps), generator=rng)
    out = []
    with kernel_choice.forced({"decode": way}), inference_mode(model):
        read = read_prompts(model, prompts(count), 0 if model.config.encoder.num_layers else None)
        rows = decoding(model, read, steps)
        assert (rows.decoder is not None) == (way == "native")
        out.append(rows.head(read.states).float())
        for i in range(steps - 1):
            if kept and i == steps // 2:
                tokens = tokens[rows.remove(set(range(count)) - set(kept))]
            out.append(rows.logits(tokens[:, i].tolist()).float().clone())
    return out


def decoding(model: LM, read: ReadPrompts, steps: int = 4) -> DecodingBatch:
    """Return rows for prompts, each with room for so many tokens."""
    rows = DecodingBatch(model, len(read.rows))
    rows.add(read, max(read.lengths) + steps)
    return rows


def agree(got: list[Tensor], want: list[Tensor], bound: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert (a - b).norm() <= bound * b.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("count", [1, 2, 7])
def test_logits_equal_those_of_the_model(name: str, count: int) -> None:
    model = random_model(CONFIGS[name])
    agree(logits_of(model, "native", count), logits_of(model, "torch", count), 2e-6)


@pytest.mark.parametrize("name", ["nanochat", "llama", "gpt2", "t5"])
def test_rows_can_be_dropped(name: str) -> None:
    model = random_model(CONFIGS[name])
    agree(logits_of(model, "native", 5, kept=(3, 1)), logits_of(model, "torch", 5, kept=(3, 1)), 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tiles", ["vectors", "tiles"])
@pytest.mark.parametrize("name", ["nanochat", "llama", "gpt2", "t5", "heads of 64"])
def test_bf16_weights_are_used_exactly(name: str, tiles: str) -> None:
    """Compared with float32 weights of the same values; only keys, values and the prefill of the prompt are rounded."""
    half = quantize(random_model(CONFIGS[name]), "bf16")
    same = quantize(half, "fp32")
    with kernel_choice.forced({"few-rows": tiles}):
        got = logits_of(half, "native", 6)
    agree(got[1:], logits_of(same, "torch", 6)[1:], 2e-2)
    torch_errors = [
        (a - b).norm() for a, b in zip(logits_of(half, "torch", 6)[1:], logits_of(same, "torch", 6)[1:], strict=True)
    ]
    native_errors = [(a - b).norm() for a, b in zip(got[1:], logits_of(same, "torch", 6)[1:], strict=True)]
    assert sum(native_errors) < sum(torch_errors), "fp32 activations have smaller errors than bf16 ones"


INT8_MODELS = [
    "nanochat",
    "llama",
    "qwen3",
    "gpt2",
    "heads of 64",
    "post-norm, sinusoidal, grouped",
    "shared blocks, narrow table",
]


@pytest.mark.parametrize("name", [*INT8_MODELS, "t5", "t5, scaled head", "bart"])
def test_int8_weights_agree_with_torch(name: str) -> None:
    model = quantize(random_model(CONFIGS[name]), "int8")
    with kernel_choice.forced({"int8": "native"}):
        got = logits_of(model, "native", 6)
    with kernel_choice.forced({"int8": "torch"}):
        agree(got, logits_of(model, "torch", 6), 1e-3)


@pytest.mark.parametrize("name", INT8_MODELS)
def test_int8_prompts_agree_with_torch(name: str) -> None:
    """The compiled step reads prompts of int8 models: states, keys and values are those of torch's operators."""
    model = quantize(random_model(CONFIGS[name]), "int8")
    texts = prompts(5)
    with inference_mode(model), kernel_choice.forced({"decode": "native", "int8": "torch"}):
        reader = DecodingBatch(model, 1).reader
        assert reader is not None
        got, want = read_prompts(model, texts, decoder=reader), read_prompts(model, texts)
        agree([got.states], [want.states], 1e-3)
        for a, b in zip((*got.cache.keys, *got.cache.values), (*want.cache.keys, *want.cache.values), strict=True):
            for row, text in enumerate(texts):
                agree([a[row, :, -len(text) :]], [b[row, :, -len(text) :]], 1e-3)


def test_an_int8_prompt_has_the_same_bits_in_any_company() -> None:
    model = quantize(random_model(CONFIGS["llama"]), "int8")
    texts = prompts(5)
    with inference_mode(model), kernel_choice.forced({"decode": "native"}):
        reader = DecodingBatch(model, 1).reader
        together = read_prompts(model, texts, decoder=reader)
        for row, text in enumerate(texts):
            alone = read_prompts(model, [text], decoder=reader)
            chunked = KVCache(1, len(text))
            state = torch.zeros(0)
            for start in range(0, len(text), 3):
                state = read_chunk(model, chunked, text[start : start + 3], start, reader)
            assert torch.equal(alone.states[0], together.states[row])
            assert torch.equal(alone.states, state)
            for a, b, c in zip(alone.cache.keys, together.cache.keys, chunked.keys, strict=True):
                assert torch.equal(a[0], b[row, :, -len(text) :])
                assert torch.equal(a, c)


def test_only_causal_int8_models_have_a_compiled_reader() -> None:
    with kernel_choice.forced({"decode": "native"}):
        assert DecodingBatch(random_model(CONFIGS["llama"]), 1).reader is None
        assert DecodingBatch(quantize(random_model(CONFIGS["t5"]), "int8"), 1).reader is None
        prefix = ModelConfig(**BASE, causal=False, attention=AttentionConfig(prefix_lm=True))
        assert DecodingBatch(quantize(random_model(prefix), "int8"), 1).reader is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 5, 3), (2, 37, 9), (3, 64, 8), (5, 96, 33), (16, 64, 100), (37, 160, 64)]
)
@pytest.mark.parametrize("tiles", [False, True])
def test_products_of_few_rows(rows: int, inputs: int, outputs: int, dtype: torch.dtype, tiles: bool) -> None:
    if tiles and not native.library().has_tiles():
        pytest.skip("this machine has no matrix instructions")
    torch.manual_seed(0)
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs).to(dtype)
    want = x.double() @ weight.double().T
    got = few_rows(x, weight, tiles=tiles)
    assert (got - want).norm() <= (6e-6 if tiles else 4e-7) * want.norm()
    x[-1, -1] = float("nan")
    assert few_rows(x, weight, tiles=tiles).isnan().any(1).tolist() == [False] * (rows - 1) + [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    x, weight = torch.randn(19, 100), (torch.randn(50, 100) * 9).to(dtype)
    whole = few_rows(x, weight)
    for count in (1, 2, 3, 4, 5, 8, 11):
        assert torch.equal(few_rows(x[:count].contiguous(), weight), whole[:count])


def test_results_do_not_depend_on_threads() -> None:
    model, before = random_model(CONFIGS["heads of 64"]), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with inference_mode(model), kernel_choice.forced({"decode": "native"}):
                rows = decoding(model, read_prompts(model, prompts(3)))
                # The prompt is computed by torch, whose sums may depend on the number of threads.
                for cached in (*rows.cache.keys, *rows.cache.values):
                    cached.copy_(torch.linspace(-1, 1, cached.numel()).view(cached.shape))
                found.append(rows.decoder(torch.tensor([[5], [6], [7]])))  # type: ignore[misc]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_in_place_changes_of_weights_take_effect() -> None:
    model = random_model(CONFIGS["llama"])
    first = logits_of(model, "native")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    second = logits_of(model, "native")
    assert not torch.equal(first[-1], second[-1])
    agree(second, logits_of(model, "torch"), 2e-6)


def test_nan_propagates() -> None:
    model = random_model(CONFIGS["llama"])
    with torch.no_grad():
        model.stack.blocks[1].mlp.up.weight[3, 3] = float("nan")  # type: ignore[union-attr, index]
    assert logits_of(model, "native")[-1].isnan().all()


def test_unmerged_adapters_use_torch() -> None:
    model = random_model(CONFIGS["llama"])
    lora.add(model, ["attention.q"], lora.LoraConfig(rank=2))
    with inference_mode(model), kernel_choice.forced({"decode": "native"}):
        assert decoding(model, read_prompts(model, prompts(2))).decoder is None


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(**BASE, position=PositionConfig("xlnet"), embedding=EmbeddingConfig(mask=True)),
        recurrent_config(vocab_size=V, hidden_size=48, num_layers=2),
    ],
)
def test_unsupported_architectures_use_torch(config: ModelConfig) -> None:
    model = random_model(config)
    with inference_mode(model), kernel_choice.forced({"decode": "native"}):
        assert decoding(model, read_prompts(model, prompts(2))).decoder is None


def test_many_rows_of_a_large_model_use_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(CONFIGS["llama"])
    monkeypatch.setattr("firth.generate.native_decoder.MAX_PRODUCT", 1000)
    with inference_mode(model), kernel_choice.forced({"decode": "native", "few-rows": "vectors"}):
        rows = decoding(model, read_prompts(model, prompts(2)))
        assert rows.decoder is not None
        assert rows.decoder.max_rows < 2
        monkeypatch.setattr(NativeDecoder, "__call__", None)
        assert rows.logits([5, 6]).shape == (2, V)
