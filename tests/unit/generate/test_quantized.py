"""Quantized weights: their exact results, bounds of their error, and all methods of the engine with them."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from firth import kernel_choice
from firth.cli import app
from firth.evaluate.perplexity import score
from firth.generate.decoding_batch import rectangle
from firth.generate.engine import Engine
from firth.generate.fill import fill_masks
from firth.generate.quantized import (
    MAX_ACTIVATION,
    Int8LMHead,
    dequantize,
    quantize,
    quantize_groups,
    round_activations,
)
from firth.generate.sampling import Sampling
from firth.generate.scheduler import Scheduler
from firth.model import native
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config, recurrent_config
from firth.model.config_groups import AttentionConfig, EmbeddingConfig, NormConfig, PositionConfig
from firth.model.flops import num_parameters
from firth.model.model import LM
from firth.pretrained.load_save import save_model
from firth.runs import loaded_model
from firth.runs.inference import open_engine
from firth.tokenizer.train import train
from firth.types import UserError
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.models import random_model, random_prompts

V = ByteTokenizer.vocab.size
CONFIGS = {
    "nanochat": decoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64),
    "gpt2, biases, tied": ModelConfig(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64),
    "llama, gated, grouped": ModelConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_positions=64,
        norm=NormConfig("rms", bias=False),
        position=PositionConfig("rotary"),
        activation="swiglu",
        bias=False,
    ),
    "qwen2, qwen3": ModelConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        max_positions=64,
        norm=NormConfig("rms", bias=False),
        position=PositionConfig("rotary"),
        activation="swiglu",
        bias_location="qkv",
        attention=AttentionConfig(qk_norm=True, qk_norm_weight=True),
    ),
    "albert's sharing": ModelConfig(
        vocab_size=V,
        hidden_size=32,
        num_layers=3,
        num_heads=2,
        num_layer_groups=1,
        embedding=EmbeddingConfig(size=16),
        max_positions=64,
        tie_embeddings=False,
    ),
    "t5": encoder_decoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64),
}


def engine(model: LM, weights: str | None) -> Engine:
    return Engine(model, ByteTokenizer(), stops=(), weights=weights)


def dequantized(model: LM) -> LM:
    """Return the model with float weights of the values that quantization represents."""
    copied = copy.deepcopy(model)
    layers = {"q", "k", "v", "o", "up", "gate", "down"}
    names = {f"{n}.weight" for n, _ in copied.named_modules() if n.rpartition(".")[2] in layers}
    names |= {"tokens.weight", "heads.lm.weight", "stack.project.weight", "encoder.project.weight"}
    with torch.no_grad():
        for name, p in copied.named_parameters():
            if name in names:
                p.copy_(dequantize(*quantize_groups(p), *p.shape))
    return copied


def logits(model: LM, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model.heads["lm"](model(batch))


def batch_of(model: LM) -> dict[str, Tensor]:
    batch = rectangle(random_prompts(5), torch.device("cpu"), causal=model.config.causal)
    if model.config.encoder.num_layers:
        batch |= {
            f"source_{n}": f for n, f in rectangle(random_prompts(5, 1), torch.device("cpu"), causal=False).items()
        }
    return batch


def test_logits_equal_those_of_the_rounded_weights(model: LM) -> None:
    """int8 keeps 15 bits of activations: the error of a layer is at most 2^-15 of its largest input."""
    batch = batch_of(model)
    present = batch["query_time"] >= 0
    got, want = (logits(m, batch)[present] for m in (quantize(model, "int8"), dequantized(model)))
    plain = logits(model, batch)[present]
    assert (got - want).norm() <= 3e-4 * want.norm()
    assert (got - want).norm() < 0.02 * (plain - want).norm(), (
        "the rounding of the weights is nearly all of the difference"
    )


@pytest.mark.parametrize("largest", [0.0, 1e-3, 3e4])
def test_activations_are_integers_times_a_scale_per_group(largest: float) -> None:
    x = torch.rand(3, 130).sub(0.5) * 2 * largest
    x[:, 64] = largest
    steps = x[:, 64:128].abs().amax(-1, keepdim=True) / MAX_ACTIVATION
    rounded = round_activations(x)
    integers = rounded[:, 64:128] / steps.clamp(min=1e-30)
    assert (integers - integers.round()).abs().max() < 2e-3
    assert integers.abs().max() <= MAX_ACTIVATION + 2e-3
    assert ((rounded - x)[:, 64:128].abs() <= 0.501 * steps).all()


def test_cached_equals_uncached(model: LM) -> None:
    """One pass over a row has the log-probabilities of decoding it token by token."""
    using = engine(model, "int8")
    rows = random_prompts(5)
    answers = using.generate(rows, Sampling(temperature=0, max_new_tokens=20))
    scores = using.score(rows, [a.tokens for a in answers])
    # float32 sums differ in the order of additions; where that moves a number over a rounding boundary, the
    # difference is a whole step: 2^-15 of the largest number of its row.
    assert np.allclose(scores, [a.logprobs.sum() for a in answers], rtol=1e-4)


@pytest.mark.parametrize("way", ["native", "torch"])
def test_rows_do_not_depend_on_the_batch(model: LM, way: str) -> None:
    """Greedy answers of a batch are those of each prompt alone.

    The compiled step adds in one order, so that states agree in every bit where it computes all of them. With torch's operators
    (also in the norm of nanochat's embeddings) the order of fp32 sums may depend on the number of rows. So the log-probabilities
    of greedy choices agree, and where the tokens do not, two tokens were almost equally likely.
    """
    if way == "native" and native.why_not():
        pytest.skip("no C compiler is found")
    rows, sampling = random_prompts(5), Sampling(temperature=0, max_new_tokens=20)
    with kernel_choice.forced({"decode": way, "int8": way}):
        using = engine(model, "int8")
        reads = Scheduler(using).batch.reader is not None
        assert reads == (way == "native" and model.config.causal and not model.config.encoder.num_layers)
        alone = [using.generate([row], sampling)[0] for row in rows]
        together = using.generate(rows, sampling)
    for one, many in zip(alone, together, strict=True):
        if reads and not model.config.norm.embedding:
            assert one.tokens.tolist() == many.tokens.tolist()
            assert np.allclose(one.logprobs, many.logprobs, atol=1e-5)  # torch's log-sum may depend on the rows
        differ = np.flatnonzero(one.tokens != many.tokens)
        shared = slice(differ[0] + 1 if len(differ) else None)
        assert np.abs(one.logprobs[shared] - many.logprobs[shared]).max() < 5e-3


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_all_methods_work_and_the_model_is_unchanged(model: LM, weights: str) -> None:
    before = {n: p.clone() for n, p in model.state_dict().items()}
    using = engine(model, weights)
    rows = random_prompts(5)
    first = using.generate(rows, Sampling(max_new_tokens=12, seed=3, top_p=0.9, repetition_penalty=1.1))
    again = using.generate(rows, Sampling(max_new_tokens=12, seed=3, top_p=0.9, repetition_penalty=1.1))
    assert [a.tokens.tolist() for a in first] == [a.tokens.tolist() for a in again]
    assert (
        "".join(using.stream(rows[0], Sampling(max_new_tokens=12, seed=3)))
        == using.generate([rows[0]], Sampling(max_new_tokens=12, seed=3))[0].text
    )
    options = [np.array([50, 60]), np.array([70]), np.array([90, 91, 92])]
    assert np.allclose(using.options(rows[1], options), using.score([rows[1]] * 3, options), rtol=5e-2)
    assert using.choose(rows[1], options) == int(np.argmax(using.options(rows[1], options)))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], p) and after[n].dtype == p.dtype for n, p in before.items())
    assert all(p.requires_grad for p in model.parameters())


def test_scoring_a_text_agrees_with_the_logits() -> None:
    model = quantize(random_model(CONFIGS["nanochat"]), "int8")
    row = np.random.default_rng(0).integers(7, V, 40)
    times = np.arange(39)
    example = {
        "tokens": row[:-1],
        "labels": row[1:],
        "query_time": times,
        "key_time": times,
        "sizes": np.ones(39, np.int64),
    }
    log_probs = logits(model, rectangle([row[:-1]], torch.device("cpu")))[0].log_softmax(-1)
    want = -log_probs.gather(1, torch.from_numpy(row[1:])[:, None]).sum()
    assert score(model, [example]).nll == pytest.approx(float(want), rel=1e-5)


def test_a_masked_model_fills_with_int8() -> None:
    config = encoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64)
    model = random_model(config)
    text = f"ab{ByteTokenizer().token(ByteTokenizer.vocab.mask)}cd"
    [plain], [int8] = (fill_masks(engine(model, w).model, ByteTokenizer(), text, 5) for w in ("fp32", "int8"))
    assert plain[0].token == int8[0].token
    assert plain[0].probability == pytest.approx(int8[0].probability, abs=0.2)


def num_bytes(model: LM) -> int:
    """Return the memory of all tensors, shared memory once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(
        t.untyped_storage().nbytes() for t in {t.untyped_storage().data_ptr(): t for t in tensors.values()}.values()
    )


def test_memory_is_a_quarter() -> None:
    for tied in (True, False):
        config = ModelConfig(
            vocab_size=V,
            hidden_size=128,
            num_layers=2,
            num_heads=2,
            max_positions=64,
            position=PositionConfig("rotary"),
            tie_embeddings=tied,
        )
        model = random_model(config)
        fp32 = num_bytes(model)
        assert fp32 == 4 * num_parameters(config)
        assert num_bytes(quantize(model, "fp32")) == fp32
        assert num_bytes(quantize(model, "bf16")) == fp32 // 2
        assert num_bytes(quantize(model, "int8")) < 0.28 * fp32


def test_a_bf16_model_is_quantized_from_its_values() -> None:
    model = random_model(CONFIGS["nanochat"]).to(torch.bfloat16)
    got = logits(quantize(model, "int8"), batch_of(model))
    want = logits(quantize(quantize(model, "fp32"), "int8"), batch_of(model))
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert model.tokens.weight.dtype == torch.bfloat16


def test_unsupported_models_are_rejected() -> None:
    model = random_model(CONFIGS["nanochat"])
    with pytest.raises(UserError, match=r"weights='int4' is not one of fp32, bf16, int8$"):
        quantize(model, "int4")
    with pytest.raises(UserError, match="needs attention layers, and this model is a left-to-right LSTM: use bf16"):
        quantize(LM(recurrent_config(V, 32, 1), {}), "int8")
    with pytest.raises(UserError, match="needs a CPU"):
        quantize(LM(CONFIGS["nanochat"], {}).to("meta"), "int8")
    with pytest.raises(UserError, match="int8 already"):
        quantize(quantize(model, "int8"), "bf16")


def test_a_quantized_head_keeps_no_float_matrix() -> None:
    head = quantize(random_model(CONFIGS["gpt2, biases, tied"]), "int8").heads["lm"]
    assert type(head) is Int8LMHead
    assert not list(head.head.parameters())


@pytest.mark.parametrize("fastest", ["fp32", "bf16"])
def test_the_command_line_quantizes(fastest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is the fastest format of this machine, which is printed if it is not the stored one."""
    monkeypatch.setattr(loaded_model, "choose_precision", lambda wanted, device: fastest)
    tokenizer = train(["to be, or not to be, that is the question"], "byte-bpe", 400)
    config = decoder_config(
        vocab_size=tokenizer.vocab.size, hidden_size=32, num_layers=1, num_heads=2, max_positions=64
    )
    save_model(random_model(config), tokenizer, tmp_path)
    words = ["to be", "--temperature", "0", "-n", "8"]
    default, same, int8, rejected = (
        CliRunner().invoke(app, ["generate", str(tmp_path), *words, *options])
        for options in ([], ["--weights", fastest], ["--weights", "int8"], ["--weights", "int4"])
    )
    assert default.exit_code == same.exit_code == int8.exit_code == 0
    assert default.stdout == same.stdout
    assert ("weights are held in bf16" in default.stderr) is (fastest == "bf16")
    assert not same.stderr
    assert isinstance(rejected.exception, UserError)
    assert (
        open_engine(tmp_path, "auto").model.tokens.weight.dtype
        == {"fp32": torch.float32, "bf16": torch.bfloat16}[fastest]
    )
    assert open_engine(tmp_path).model.tokens.weight.dtype == torch.float32
    assert open_engine(tmp_path, "int8").engine.model.tokens.weight.dtype == torch.uint8
