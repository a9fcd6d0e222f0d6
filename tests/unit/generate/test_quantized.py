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
from firth.generate.quantized import DIGITS, Int8Linear, Int8LMHead, quantize, quantize_rows
from firth.generate.sampling import Sampling
from firth.model.config import (
    AttentionConfig,
    EmbeddingConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
    decoder_config,
    encoder_config,
    encoder_decoder_config,
    recurrent_config,
)
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
INT8 = list(DIGITS)


def engine(model: LM, weights: str | None) -> Engine:
    return Engine(model, ByteTokenizer(), stops=(), weights=weights)


def rounded(x: Tensor, max_digit: int) -> tuple[Tensor, Tensor]:
    """Round each row to integers of at most `max_digit`; return the values and the steps (..., 1), in float64."""
    step = x.double().abs().amax(-1, keepdim=True) / max_digit
    return torch.where(step > 0, (x.double() / step).round() * step, 0.0), step


@pytest.mark.parametrize("weights", INT8)
@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(32, 48, 1), (33, 7, 2), (512, 128, 16), (96, 300, 70)])
def test_a_layer_is_the_product_of_rounded_numbers(weights: str, inputs: int, outputs: int, rows: int) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(outputs, inputs) * torch.rand(outputs, 1), torch.randn(outputs)
    weight[0] = 0
    x = torch.randn(2, rows, inputs) * torch.rand(2, rows, 1) * 30
    x[0, 0] = 0
    got = Int8Linear.of(*quantize_rows(weight), bias, DIGITS[weights])
    assert got.base == {"int8": 128, "int8-dynamic": 1}[weights]
    rounded_weight, row_steps = rounded(weight, 127)
    middle = (x.amax(-1, keepdim=True) + x.amin(-1, keepdim=True)).double() / 2 * (weights == "int8-dynamic")
    rounded_x, token_steps = rounded(x - middle, 127 * got.base)
    rounded_x += middle
    want = rounded_x @ rounded_weight.T + bias.double()
    # A number within a rounding error of the middle between two integers may round to either.
    assert (got(x) - want).norm() <= 2e-5 * want.norm()
    exact = x.double() @ weight.double().T + bias.double()
    # Half a step of each weight times the inputs, and half a step of each input times the weights.
    bound = x.double().abs().sum(-1, keepdim=True) * row_steps[:, 0] / 2 + token_steps / 2 * rounded_weight.abs().sum(
        -1
    )
    assert ((got(x) - exact).abs() <= bound + 1e-4 * exact.abs() + 1e-5).all()
    assert (got(x) - exact).norm() > 1e-4 * exact.norm(), "nothing was rounded"


def test_the_first_digit_cannot_overflow() -> None:
    """With the largest weights and inputs, sums stay below 2^31 and activations keep fewer than 15 bits."""
    integers, steps = torch.full((2, 4096), 127, dtype=torch.int8), torch.ones(2)
    got = Int8Linear.of(integers, steps, None, 2)
    assert got.base == 32
    x = torch.full((3, 4096), 5.0)
    assert torch.allclose(got(x), torch.full((3, 2), 5.0 * 127 * 4096))
    with pytest.raises(UserError, match="cannot be summed in 32 bits"):
        Int8Linear.of(integers.new_full((1, 140_000), 127), steps[:1], None, 1)


def dequantized(model: LM) -> LM:
    """Return the model with float weights of the values that quantization represents."""
    copied = copy.deepcopy(model)
    layers = {"q", "k", "v", "o", "up", "gate", "down"}
    names = {f"{n}.weight" for n, _ in copied.named_modules() if n.rpartition(".")[2] in layers}
    names |= {"tokens.weight", "heads.lm.weight", "stack.project.weight", "encoder.project.weight"}
    with torch.no_grad():
        for name, p in copied.named_parameters():
            if name in names:
                p.copy_(rounded(p, 127)[0])
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
    one = logits(quantize(model, "int8-dynamic"), batch)[present]
    assert (one - want).norm() > 10 * (got - want).norm(), "the second digit reduces the error"


@pytest.mark.parametrize("weights", INT8)
def test_cached_equals_uncached(model: LM, weights: str) -> None:
    """One pass over a row has the log-probabilities of decoding it token by token.

    The compiled step does not round activations as int8-dynamic does, so that is compared with torch's operators.
    """
    using = engine(model, weights)
    rows = random_prompts(5)
    with kernel_choice.forced({} if weights == "int8" else {"decode": "torch"}):
        answers = using.generate(rows, Sampling(temperature=0, max_new_tokens=20))
    scores = using.score(rows, [a.tokens for a in answers])
    # float32 sums differ in the order of additions; where that moves a number over a rounding boundary, the
    # difference is a whole step: 2^-15 of the largest number of its row, or 2^-8.
    assert np.allclose(scores, [a.logprobs.sum() for a in answers], rtol=1e-4 if weights == "int8" else 2e-3)


@pytest.mark.parametrize("weights", INT8)
def test_rows_do_not_depend_on_the_batch(model: LM, weights: str) -> None:
    """Each token has its own scale: a row with numbers a thousand times as large changes no bit of a layer.

    Whole models agree up to the fp32 sums of attention and norms, whose order may depend on the number of rows: the last bit
    of one can move a number by a whole step. So the log-probabilities of greedy choices agree, and where the tokens do not,
    two tokens were almost equally likely. The bounds are 4 to 10 times the largest effect of relative noise of 2e-7 on the
    output of attention, over 24 models: 5e-4 and 0.024.
    """
    quantized = quantize(model, weights)
    [layer] = [m for n, m in quantized.named_modules() if n == "stack.blocks.0.mlp.down"]
    x = torch.randn(4, layer.weight.shape[1])
    x[2] *= 1000
    assert torch.equal(layer(x)[:2], layer(x[:2]))
    assert torch.equal(layer(x)[:1], layer(x[:1]))
    rows, sampling = random_prompts(5), Sampling(temperature=0, max_new_tokens=20)
    using = engine(model, weights)
    alone = [using.generate([row], sampling)[0] for row in rows]
    for one, many in zip(alone, using.generate(rows, sampling), strict=True):
        differ = np.flatnonzero(one.tokens != many.tokens)
        shared = slice(differ[0] + 1 if len(differ) else None)
        bound = {"int8": 5e-3, "int8-dynamic": 0.1}[weights]
        assert np.abs(one.logprobs[shared] - many.logprobs[shared]).max() < bound


@pytest.mark.parametrize("way", ["int_mm", "qlinear"])
@pytest.mark.parametrize("weights", INT8)
@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(33, 7, 1), (512, 64, 2), (4096, 16, 70)])
def test_products_are_exact_on_every_cpu(weights: str, inputs: int, outputs: int, rows: int, way: str) -> None:
    """A CPU without VNNI or AMX saturates: 40 to 100% of the sums were silently wrong there.

    The digits for such a CPU are tested on every CPU. ONEDNN_MAX_CPU_ISA=AVX2 makes this one behave like one.
    """
    torch.manual_seed(inputs)
    integers = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    integers[0] = 127
    layer = Int8Linear.of(integers, torch.ones(outputs), None, DIGITS[weights])
    largest = 127 * layer.base
    x = torch.randint(-largest, largest + 1, (rows, inputs)).float()
    x[0] = largest
    want = x.long() @ integers.long().T
    with kernel_choice.forced({"int8": way}):
        found = layer._product(x.clone())
    assert (
        found.dtype == torch.int32 or (found - want).abs().max() <= want.abs().max() * 2**-24
    )  # the sum of two digits
    assert found.dtype != torch.int32 or torch.equal(found.long(), want)
    assert torch.equal(layer._narrow_product(x.clone()).long(), want)


@pytest.mark.parametrize("weights", ["fp32", "bf16", *INT8])
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
        assert fp32 == 4 * config.num_parameters()
        assert num_bytes(quantize(model, "fp32")) == fp32
        assert num_bytes(quantize(model, "bf16")) == fp32 // 2
        assert num_bytes(quantize(model, "int8")) < 0.28 * fp32
        assert num_bytes(quantize(model, "int8-dynamic")) < 0.28 * fp32


def test_a_bf16_model_is_quantized_from_its_values() -> None:
    model = random_model(CONFIGS["nanochat"]).to(torch.bfloat16)
    got = logits(quantize(model, "int8"), batch_of(model))
    want = logits(quantize(quantize(model, "fp32"), "int8"), batch_of(model))
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert model.tokens.weight.dtype == torch.bfloat16


def test_unsupported_models_are_rejected() -> None:
    model = random_model(CONFIGS["nanochat"])
    with pytest.raises(UserError, match=r"weights='int4' is not one of fp32, bf16, int8, int8-dynamic$"):
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
    assert open_engine(tmp_path, "int8").engine.model.tokens.weight.dtype == torch.int8
