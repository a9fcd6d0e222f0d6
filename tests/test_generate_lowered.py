"""Lowered weights: what they compute, written out; what they cost in accuracy, bounded; and that all verbs still hold."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from bytecoder import ByteCoder
from torch import Tensor
from typer.testing import CliRunner

from firth import kernels
from firth.cli import app
from firth.evaluate.perplexity import score
from firth.generate.decoding import rectangle
from firth.generate.engine import Engine
from firth.generate.quantized import DIGITS, Int8Linear, Int8LMHead, quantize, quantize_rows
from firth.generate.sampling import Sampling
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config, recurrent_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.pretrained.load_save import save_model
from firth.runs.inference import open_engine
from firth.tokenizer.train import train
from firth.train import precision
from firth.types import UserError

V = ByteCoder.vocab.size
SHAPES = {
    "nanochat": decoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64),
    "gpt2, biases, tied": ModelConfig(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64),
    "llama, gated, grouped": ModelConfig(
        vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=64, norm="rms", norm_bias=False, position="rotary",
        activation="swiglu", bias=False,
    ),
    "qwen2, qwen3": ModelConfig(
        vocab_size=V, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=64, norm="rms", norm_bias=False, position="rotary",
        activation="swiglu", bias_location="qkv", qk_norm=True, qk_norm_weight=True,
    ),
    "albert's sharing": ModelConfig(vocab_size=V, hidden_size=32, num_layers=3, num_heads=2, num_layer_groups=1, embedding_size=16, max_positions=64, tie_embeddings=False),
    "t5": encoder_decoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64),
}  # fmt: skip
INT8 = list(DIGITS)


def random_model(config: ModelConfig, seed: int = 0) -> LM:
    torch.manual_seed(seed)
    model = LM(config, {"lm": LMHead(config)})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=SHAPES)
def model(request: pytest.FixtureRequest) -> LM:
    return random_model(SHAPES[request.param])


def prompts(count: int = 5, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(7, V, rng.integers(1, 20)) for _ in range(count)]


def engine(model: LM, weights: str | None) -> Engine:
    return Engine(model, ByteCoder(), stops=(), weights=weights)


def rounded(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Each row in whole steps, `most` of which are its largest number; and the steps, (..., 1). By hand, in float64."""
    step = x.double().abs().amax(-1, keepdim=True) / most
    return torch.where(step > 0, (x.double() / step).round() * step, 0.0), step


@pytest.mark.parametrize("weights", INT8)
@pytest.mark.parametrize(("inputs", "outputs", "rows"), [(32, 48, 1), (33, 7, 2), (512, 128, 16), (96, 300, 70)])
def test_a_map_is_the_product_of_what_was_rounded(weights: str, inputs: int, outputs: int, rows: int) -> None:
    torch.manual_seed(rows)
    weight, bias = torch.randn(outputs, inputs) * torch.rand(outputs, 1), torch.randn(outputs)
    weight[0] = 0
    x = torch.randn(2, rows, inputs) * torch.rand(2, rows, 1) * 30
    x[0, 0] = 0
    got = Int8Linear.of(*quantize_rows(weight), bias, DIGITS[weights])
    assert got.base == {"int8": 128, "int8-dynamic": 1}[weights]
    whole, by_row = rounded(weight, 127)
    middle = (x.amax(-1, keepdim=True) + x.amin(-1, keepdim=True)).double() / 2 * (weights == "int8-dynamic")
    read, by_token = rounded(x - middle, 127 * got.base)
    read += middle
    want = read @ whole.T + bias.double()
    # A number within a rounding error of the middle between two steps may go to either.
    assert (got(x) - want).norm() <= 2e-5 * want.norm()
    exact = x.double() @ weight.double().T + bias.double()
    # Half a step of each weight times the inputs, and half a step of each input times the weights.
    bound = x.double().abs().sum(-1, keepdim=True) * by_row[:, 0] / 2 + by_token / 2 * whole.abs().sum(-1)
    assert ((got(x) - exact).abs() <= bound + 1e-4 * exact.abs() + 1e-5).all()
    assert (got(x) - exact).norm() > 1e-4 * exact.norm(), "nothing was rounded"


def test_the_first_digit_leaves_room_for_every_sum() -> None:
    """All weights and inputs at their largest: 2^31 is not reached, and 15 bits become fewer."""
    whole, steps = torch.full((2, 4096), 127, dtype=torch.int8), torch.ones(2)
    got = Int8Linear.of(whole, steps, None, 2)
    assert got.base == 32
    x = torch.full((3, 4096), 5.0)
    assert torch.allclose(got(x), torch.full((3, 2), 5.0 * 127 * 4096))
    with pytest.raises(UserError, match="cannot be summed in 32 bits"):
        Int8Linear.of(whole.new_full((1, 140_000), 127), steps[:1], None, 1)


def dequantised(model: LM) -> LM:
    """The model with every matrix that is lowered replaced by what its whole numbers stand for: float weights."""
    twin = copy.deepcopy(model)
    maps = {"q", "k", "v", "o", "up", "gate", "down"}
    names = {f"{n}.weight" for n, _ in twin.named_modules() if n.rpartition(".")[2] in maps}
    names |= {"tokens.weight", "heads.lm.weight", "stack.project.weight", "encoder.project.weight"}
    with torch.no_grad():
        for name, p in twin.named_parameters():
            if name in names:
                p.copy_(rounded(p, 127)[0])
    return twin


def logits(model: LM, batch: dict[str, Tensor]) -> Tensor:
    with torch.inference_mode():
        return model.heads["lm"](model(batch))


def batch_of(model: LM) -> dict[str, Tensor]:
    batch = rectangle(prompts(), torch.device("cpu"), causal=model.config.causal)
    if model.config.num_encoder_layers:
        batch |= {f"source_{n}": f for n, f in rectangle(prompts(5, 1), torch.device("cpu"), causal=False).items()}
    return batch


def test_logits_are_those_of_the_rounded_weights(model: LM) -> None:
    """int8 keeps 15 bits of what the weights are multiplied with: an error of 2^-15 of the largest a map, no more."""
    batch = batch_of(model)
    there = batch["query_time"] >= 0
    got, want = (logits(m, batch)[there] for m in (quantize(model, "int8"), dequantised(model)))
    plain = logits(model, batch)[there]
    assert (got - want).norm() <= 3e-4 * want.norm()
    assert (got - want).norm() < 0.02 * (plain - want).norm(), "the weights' rounding is nearly all of the difference"
    one = logits(quantize(model, "int8-dynamic"), batch)[there]
    assert (one - want).norm() > 10 * (got - want).norm(), "a second digit is worth something"


@pytest.mark.parametrize("weights", INT8)
def test_cached_is_uncached(model: LM, weights: str) -> None:
    """One pass over the whole row gives the log-probabilities of writing it token by token.

    The compiled step does not round what int8-dynamic rounds, so that one is compared with torch's operators.
    """
    using = engine(model, weights)
    rows = prompts()
    with kernels.forced({} if weights == "int8" else {"decode": "torch"}):
        answers = using.generate(rows, Sampling(temperature=0, max_new_tokens=20))
    scores = using.score(rows, [a.tokens for a in answers])
    # float32 sums differ in the order of additions; where that moves a number over the middle between two steps, a
    # whole step comes of it: 2^-15 of the largest number of its row, or 2^-8.
    assert np.allclose(scores, [a.logprobs.sum() for a in answers], rtol=1e-4 if weights == "int8" else 2e-3)


@pytest.mark.parametrize("weights", INT8)
def test_a_row_does_not_feel_its_neighbours(model: LM, weights: str) -> None:
    """A token's step is its own: a neighbor with numbers a thousand times as large changes no bit of a map.

    Whole models agree up to the fp32 sums of attention and norms, whose order may depend on the number of rows: a last bit
    of one can move a number by a whole step. So the log-probabilities of greedy choices agree, and where the tokens do not,
    two tokens were as good as equally likely. The bounds are 4 to 10 times what relative noise of 2e-7 on the output of
    attention changed at most, over 24 models: 5e-4 and 0.024.
    """
    twin = quantize(model, weights)
    [layer] = [m for n, m in twin.named_modules() if n == "stack.blocks.0.mlp.down"]
    x = torch.randn(4, layer.weight.shape[1])
    x[2] *= 1000
    assert torch.equal(layer(x)[:2], layer(x[:2]))
    assert torch.equal(layer(x)[:1], layer(x[:1]))
    rows, sampling = prompts(), Sampling(temperature=0, max_new_tokens=20)
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
    """A CPU without VNNI or AMX saturates: 40 to 100% of the sums were wrong there, with no word about it.

    The digits that such a CPU gets are tried on every CPU. Under ONEDNN_MAX_CPU_ISA=AVX2 this one is such a CPU.
    """
    torch.manual_seed(inputs)
    whole = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    whole[0] = 127
    layer = Int8Linear.of(whole, torch.ones(outputs), None, DIGITS[weights])
    most = 127 * layer.base
    x = torch.randint(-most, most + 1, (rows, inputs)).float()
    x[0] = most
    want = x.long() @ whole.long().T
    with kernels.forced({"int8": way}):
        found = layer._product(x.clone())
    assert (
        found.dtype == torch.int32 or (found - want).abs().max() <= want.abs().max() * 2**-24
    )  # the sum of two digits
    assert found.dtype != torch.int32 or torch.equal(found.long(), want)
    assert torch.equal(layer._narrow_product(x.clone()).long(), want)


@pytest.mark.parametrize("weights", ["fp32", "bf16", *INT8])
def test_all_verbs_and_an_untouched_model(model: LM, weights: str) -> None:
    before = {n: p.clone() for n, p in model.state_dict().items()}
    using = engine(model, weights)
    rows = prompts()
    drawn = using.generate(rows, Sampling(max_new_tokens=12, seed=3, top_p=0.9, repetition_penalty=1.1))
    again = using.generate(rows, Sampling(max_new_tokens=12, seed=3, top_p=0.9, repetition_penalty=1.1))
    assert [a.tokens.tolist() for a in drawn] == [a.tokens.tolist() for a in again]
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
    model = quantize(random_model(SHAPES["nanochat"]), "int8")
    row = np.random.default_rng(0).integers(7, V, 40)
    when = np.arange(39)
    example = {
        "tokens": row[:-1],
        "labels": row[1:],
        "query_time": when,
        "key_time": when,
        "sizes": np.ones(39, np.int64),
    }
    said = logits(model, rectangle([row[:-1]], torch.device("cpu")))[0].log_softmax(-1)
    want = -said.gather(1, torch.from_numpy(row[1:])[:, None]).sum()
    assert score(model, [example]).nll == pytest.approx(float(want), rel=1e-5)


def test_a_masked_model_fills_with_int8() -> None:
    config = encoder_config(vocab_size=V, hidden_size=32, num_layers=2, num_heads=2, max_positions=64)
    model = random_model(config)
    text = f"ab{ByteCoder().token(ByteCoder.vocab.mask)}cd"
    [plain], [int8] = (engine(model, w).fill(text, 5) for w in ("fp32", "int8"))
    assert plain[0].token == int8[0].token
    assert plain[0].probability == pytest.approx(int8[0].probability, abs=0.2)


def bytes_of(model: LM) -> int:
    """Memory of all tensors, views of the same memory once."""
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
            position="rotary",
            tie_embeddings=tied,
        )
        model = random_model(config)
        whole = bytes_of(model)
        assert whole == 4 * config.num_parameters()
        assert bytes_of(quantize(model, "fp32")) == whole
        assert bytes_of(quantize(model, "bf16")) == whole // 2
        assert bytes_of(quantize(model, "int8")) < 0.28 * whole
        assert bytes_of(quantize(model, "int8-dynamic")) < 0.28 * whole


def test_a_model_stored_in_bf16_is_lowered_from_what_it_stores() -> None:
    model = random_model(SHAPES["nanochat"]).to(torch.bfloat16)
    got = logits(quantize(model, "int8"), batch_of(model))
    want = logits(quantize(quantize(model, "fp32"), "int8"), batch_of(model))
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
    assert model.tokens.weight.dtype == torch.bfloat16


def test_refusals() -> None:
    model = random_model(SHAPES["nanochat"])
    with pytest.raises(UserError, match=r"weights='int4' is not one of fp32, bf16, int8, int8-dynamic$"):
        quantize(model, "int4")
    with pytest.raises(UserError, match="needs attention layers, and this model is a left-to-right LSTM: use bf16"):
        quantize(LM(recurrent_config(V, 32, 1), {}), "int8")
    with pytest.raises(UserError, match="needs a CPU"):
        quantize(LM(SHAPES["nanochat"], {}).to("meta"), "int8")
    with pytest.raises(UserError, match="int8 already"):
        quantize(quantize(model, "int8"), "bf16")


def test_a_head_has_no_matrix_of_its_own_left() -> None:
    head = quantize(random_model(SHAPES["gpt2, biases, tied"]), "int8").heads["lm"]
    assert type(head) is Int8LMHead
    assert not list(head.head.parameters())


@pytest.mark.parametrize("quick", ["fp32", "bf16"])
def test_the_command_line_lowers_and_refuses(quick: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default in what this machine is quickest at, which is printed where it is not what is stored."""
    monkeypatch.setattr(precision, "choose", lambda wanted, device: quick)
    tokenizer = train(["to be, or not to be, that is the question"], "byte-bpe", 400)
    config = decoder_config(
        vocab_size=tokenizer.vocab.size, hidden_size=32, num_layers=1, num_heads=2, max_positions=64
    )
    save_model(random_model(config), tokenizer, tmp_path)
    words = ["to be", "--temperature", "0", "-n", "8"]
    usual, same, int8, refused = (
        CliRunner().invoke(app, ["generate", str(tmp_path), *words, *given])
        for given in ([], ["--weights", quick], ["--weights", "int8"], ["--weights", "int4"])
    )
    assert usual.exit_code == same.exit_code == int8.exit_code == 0
    assert usual.stdout == same.stdout
    assert ("weights are held in bf16" in usual.stderr) is (quick == "bf16")
    assert not same.stderr
    assert isinstance(refused.exception, UserError)
    assert (
        open_engine(tmp_path, "auto").model.tokens.weight.dtype
        == {"fp32": torch.float32, "bf16": torch.bfloat16}[quick]
    )
    assert open_engine(tmp_path).model.tokens.weight.dtype == torch.float32
    assert open_engine(tmp_path, "int8").engine.model.tokens.weight.dtype == torch.int8
