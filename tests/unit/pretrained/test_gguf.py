"""Models in GGUF files: bit-exact round trips, parity with the gguf package and transformers, and rejected files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from firth.generate.decoding_batch import inference_mode, rectangle
from firth.io import gguf as container
from firth.io.gguf import GGUFTensorSpec
from firth.model.config import decoder_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.presets import bert, gpt2, llama
from firth.pretrained import gguf
from firth.pretrained.gguf_quantize import unpack
from firth.pretrained.load_save import init_from, load_model, save_model
from firth.runs.inference import open_run
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError

TOKENIZER = train(["to be, or not to be: that is the question " * 20], "byte-bpe", 400)
SIZE = TOKENIZER.vocab.size
CONFIGS = {
    "llama": llama(SIZE, 64, 2, 4, 96, max_positions=64),
    "llama, grouped and tied": llama(SIZE, 64, 2, 4, 96, max_positions=64, num_kv_heads=2).with_fields(
        {"tie_embeddings": True, "position.rope.theta": 5e5}
    ),
    "llama, biased, narrow heads": replace(llama(SIZE, 64, 2, 2, 96, max_positions=64), bias=True, head_dim=16),
    "llama, biased in attention alone": replace(
        llama(SIZE, 64, 2, 4, 96, max_positions=64), bias=True, bias_location="attention"
    ),
    "qwen2": replace(llama(SIZE, 64, 2, 4, 96, max_positions=64, num_kv_heads=2), bias=True, bias_location="qkv"),
    "qwen3": llama(SIZE, 64, 2, 4, 96, max_positions=64).with_fields(
        {"attention.qk_norm": True, "attention.qk_norm_weight": True, "head_dim": 32, "tie_embeddings": True}
    ),
    "gpt2": gpt2(SIZE, 64, 2, 4, max_positions=64),
}


def model_of(config):
    torch.manual_seed(0)
    model = LM(config, {"lm": LMHead(config)}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def written(tmp_path, config=CONFIGS["llama"], kind="F32", tokenizer=TOKENIZER):
    file = tmp_path / "model.gguf"
    model = model_of(config)
    gguf.write(model, tokenizer, file, kind)
    return model, file


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trips_are_bit_exact(name, tmp_path):
    model, file = written(tmp_path, CONFIGS[name])
    back = load_model(file)
    assert gguf._comparable(back.config) == gguf._comparable(model.config)
    mine, theirs = model.state_dict(), back.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert container.read(file).metadata["general.architecture"] == name.partition(",")[0]
    again = tmp_path / "again.gguf"
    gguf.write(back, Tokenizer.load(file), again, "F32")
    assert again.read_bytes() == file.read_bytes()


def test_an_encoder_is_written_without_its_head(tmp_path):
    words = tmp_path / "vocab.txt"
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "to", "be", "##ing"]))
    tokenizer = Tokenizer.load(words)
    model, file = written(tmp_path, bert(tokenizer.vocab.size, 64, 2, 4, max_positions=32), tokenizer=tokenizer)
    back = load_model(file)
    assert not back.heads
    with inference_mode(model), inference_mode(back):
        rows = rectangle([np.array([2, 5, 6, 3])], torch.device("cpu"), causal=False)
        assert torch.equal(model(rows), back(rows))


@pytest.mark.parametrize(("kind", "worst"), [("F16", 1e-3), ("BF16", 8e-3), ("Q8_0", 8e-3), ("Q4_0", 0.13)])
def test_matrices_are_quantized_and_vectors_are_not(kind, worst, tmp_path):
    model, file = written(tmp_path, kind=kind)
    back = load_model(file).state_dict()
    for name, mine in model.state_dict().items():
        if mine.ndim == 1:
            assert torch.equal(mine, back[name])
        else:
            assert 0 < (mine - back[name]).abs().max() <= worst * mine.abs().max()
    stored = {name: t.kind for name, t in container.read(file).tensors.items()}
    assert stored.pop("output.weight") == {"Q4_0": "Q8_0"}.get(kind, kind)
    assert set(stored.values()) == {"F32", kind}


@pytest.mark.oracle
@pytest.mark.parametrize("name", CONFIGS)
def test_q4_0_matches_the_gguf_package(name, tmp_path):
    """All matrices but the one that computes the logits are Q4_0; vectors and positions stay float32."""
    theirs = pytest.importorskip("gguf", reason="the gguf package, an oracle, is not installed")
    exact, four = tmp_path / "exact.gguf", tmp_path / "four.gguf"
    model = model_of(CONFIGS[name])
    gguf.write(model, TOKENIZER, exact, "F32")
    summary = gguf.write(model, TOKENIZER, four, "Q4_0")
    whole, found = container.read(exact), container.read(four)
    head = "output.weight" if "output.weight" in whole.tensors else "token_embd.weight"
    assert summary == f"llama.cpp loads it as {name.partition(',')[0]}, Q4_0; {head} in Q8_0"
    assert whole.tensors.keys() == found.tensors.keys()
    for name, stored in whole.tensors.items():
        kind = "Q8_0" if name == head else "Q4_0"
        kind = "F32" if len(stored.shape) == 1 or name == "position_embd.weight" else kind
        numbers = unpack("F32", stored.data).reshape(stored.shape)
        want = theirs.quants.quantize(numbers, theirs.GGMLQuantizationType[kind]).view(np.uint8)
        got = found.tensors[name]
        assert (got.kind, got.shape) == (kind, stored.shape)
        assert np.array_equal(got.data, want.reshape(got.data.shape)), name
    assert found.metadata["general.file_type"] == theirs.LlamaFileType.MOSTLY_Q4_0
    assert found.metadata["general.quantization_version"] == theirs.GGML_QUANT_VERSION
    again = tmp_path / "again.gguf"
    gguf.write(load_model(four), Tokenizer.load(four), again, "Q4_0")
    assert again.read_bytes() == four.read_bytes()  # quantizing 4-bit numbers again changes nothing
    assert four.stat().st_size < exact.stat().st_size / 3


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_rows_without_whole_blocks_are_written_as_f16(kind, tmp_path):
    model, file = written(tmp_path, llama(SIZE, 48, 2, 2, 96))
    summary = gguf.write(model, TOKENIZER, file, kind)
    odd = "blk.*.attn_q.weight, blk.*.attn_k.weight, blk.*.attn_v.weight, blk.*.attn_output.weight"
    assert "blk.*.ffn_down" not in summary and f"{odd}, blk.*.ffn_gate.weight, blk.*.ffn_up.weight" in summary
    assert summary.endswith(" in F16 (rows of 48, no multiple of 32)")
    back = load_model(file).state_dict()
    for name, tensor in container.read(file).tensors.items():
        want = kind if "ffn_down" in name else "F16"
        assert tensor.kind == ("F32" if len(tensor.shape) == 1 else want)
    for name, mine in model.state_dict().items():
        if mine.ndim > 1 and "mlp.down" not in name:
            assert torch.equal(mine.half().float(), back[name])


def test_rows_of_a_head_are_interleaved():
    """llama.cpp rotates the pairs (0, 1), (2, 3), ...; firth and transformers the two halves."""
    kind, config = gguf.LLAMA, {"num_attention_heads": 2, "num_key_value_heads": 1}
    rows = torch.arange(12.0)[:, None]
    q = gguf._reorder(kind, config, "model.layers.0.self_attn.q_proj.weight", rows, back=False)
    assert q.flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(gguf._reorder(kind, config, "model.layers.0.self_attn.q_proj.weight", q, back=True), rows)
    k = gguf._reorder(kind, config, "model.layers.0.self_attn.k_proj.weight", rows, back=False)
    assert k.flatten().tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]


@pytest.mark.oracle
def test_transformers_reads_the_file(tmp_path):
    pytest.importorskip("gguf", reason="the gguf package, by which transformers reads GGUF, is not installed")
    from transformers import AutoModelForCausalLM

    model, file = written(tmp_path, CONFIGS["llama, grouped and tied"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    ids = torch.randint(0, SIZE, (2, 20))
    with inference_mode(model):
        mine = model.heads["lm"](model(rectangle(list(ids.numpy()), torch.device("cpu"))))
        assert (theirs(ids).logits - mine).abs().max() < 1e-4 * mine.abs().max()


def test_a_file_can_be_used_like_a_directory(tmp_path):
    model, file = written(tmp_path)
    opened = open_run(file)
    assert opened.tokenizer.encode("to be").tolist() == TOKENIZER.encode("to be").tolist()
    fresh = LM(model.config, {"lm": LMHead(model.config)})
    assert init_from(fresh, tmp_path) == ([], [])
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))
    save_model(opened.model, opened.tokenizer, tmp_path / "directory")
    again = load_model(tmp_path / "directory").state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())


def test_quantized_blocks_are_read(tmp_path):
    """A file with Q4_1 and Q6_K tensors, as llama.cpp writes them."""
    _, file = written(
        tmp_path, replace(CONFIGS["llama"], hidden_size=256, num_heads=4, head_dim=0, intermediate_size=256)
    )
    found = container.read(file)
    rng = np.random.default_rng(0)
    tensors, want = [], {}
    for i, (name, stored) in enumerate(found.tensors.items()):
        kind = "F32" if len(stored.shape) == 1 else ("Q4_1", "Q6_K")[i % 2]
        per = container.KINDS[kind]
        rows = np.prod(stored.shape[:-1], dtype=int)
        made = rng.integers(0, 30, (rows, stored.shape[-1] // per.block * per.size), dtype=np.uint8)
        made = np.array(stored.data) if kind == "F32" else made
        want[name] = unpack(kind, made)
        tensors.append(GGUFTensorSpec(name, kind, stored.shape, lambda made=made: made))
    container.write(file, found.metadata, tensors)
    back = load_model(file)
    assert torch.equal(back.tokens.weight, torch.from_numpy(want["token_embd.weight"]))
    down = back.state_dict()["stack.blocks.1.mlp.down.weight"]
    assert torch.equal(down, torch.from_numpy(want["blk.1.ffn_down.weight"]))


def test_unsupported_configs_are_rejected(tmp_path):
    for config, why in (
        (decoder_config(SIZE, 64, 2), "norm.weight|embed_norm|activation"),
        (replace(CONFIGS["llama"], activation="geglu"), "activation is 'geglu' where a llama has 'swiglu'"),
        (CONFIGS["llama"].with_fields({"lm_head.softcap": 15.0}), r"softcap is 15\.0 where a llama has 0\.0"),
    ):
        with pytest.raises(UserError, match=f"{why}.*firth train llama") as error:
            gguf.write(model_of(config), TOKENIZER, tmp_path / "a.gguf")
        assert "\n" not in str(error.value)
    narrow = llama(SIZE, 48, 1, 2, 80)
    for kind in ("Q8_0", "Q4_0"):
        with pytest.raises(
            UserError, match=f"{kind} stores the numbers of a row in blocks of 32, and no matrix .*: use F16"
        ):
            gguf.write(model_of(narrow), TOKENIZER, tmp_path / "a.gguf", kind)
    with pytest.raises(UserError, match="firth does not write 'Q4_1'"):
        gguf.write(model_of(CONFIGS["llama"]), TOKENIZER, tmp_path / "a.gguf", "Q4_1")
    with pytest.raises(UserError, match=f"the tokenizer has {SIZE} ids and the model 64"):
        gguf.write(model_of(llama(64, 64, 1, 2, 96)), TOKENIZER, tmp_path / "a.gguf")
    assert not list(tmp_path.glob("*"))


HOSTILE = {
    "general.architecture": ("mamba", "has the architecture 'mamba'; firth reads llama, gpt2, bert"),
    "llama.block_count": (2**31 - 1, "metadata has 2147483647 layers, and it has the tensors of 2"),
    "llama.attention.head_count": (0, "is 0, not a number above 0"),
    "llama.attention.head_count_kv": (np.array([1, 2], "<u4"), "not a number above 0"),
    "llama.embedding_length": (2**19, "do not belong together|not a multiple|expected"),
    "llama.feed_forward_length": (2**19, "do not belong together"),
    "llama.attention.key_length": (2**30, "head_dim is|do not belong"),
    "llama.rope.dimension_count": (8, "head_dim is 16, but"),
    "llama.rope.scaling.type": ("yarn", "has llama.rope.scaling.type = 'yarn'"),
    "split.count": (3, "join them with llama-gguf-split"),
    "llama.expert_count": (8, "has llama.expert_count = 8"),
    "llama.attention.sliding_window": (128, "has llama.attention.sliding_window = 128"),
    "llama.context_length": ("long", "'long', not a number above 0"),
    "llama.rope.freq_base": (float("nan"), "nan, not a number above 0"),
}


@pytest.mark.parametrize("key", HOSTILE)
def test_invalid_metadata_is_rejected(key, tmp_path):
    _, file = written(tmp_path)
    value, why = HOSTILE[key]
    found = container.read(file)
    tensors = [GGUFTensorSpec(n, t.kind, t.shape, lambda t=t: np.array(t.data)) for n, t in found.tensors.items()]
    other = tmp_path / "other.gguf"
    container.write(other, {**found.metadata, key: value}, tensors)
    with pytest.raises(UserError, match=why) as error:
        load_model(other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "new", "why"),
    [
        ("blk.1.attn_k.weight", None, "lacks tensor|lacks the tensor"),
        ("token_embd.weight", None, "lacks the tensor 'token_embd.weight'"),
        ("blk.1.attn_k.weight", "blk.1.attn_z.weight", "has the tensor 'blk.1.attn_z.weight', which firth's llama"),
        ("blk.1.attn_k.weight", "rope_freqs.weight", "has the tensor 'rope_freqs.weight'"),
        ("blk.1.attn_k.weight", "blk.1.attn_k.bias", "blk|attention|k_proj"),
    ],
)
def test_tensors_that_do_not_fit_are_named(name, new, why, tmp_path):
    _, file = written(tmp_path)
    found = container.read(file)
    names = {n: new if n == name else n for n in found.tensors}
    tensors = [
        GGUFTensorSpec(names[n], t.kind, t.shape, lambda t=t: np.array(t.data))
        for n, t in found.tensors.items()
        if names[n]
    ]
    other = tmp_path / "other.gguf"
    container.write(other, found.metadata, tensors)
    with pytest.raises(UserError, match=why) as error:
        load_model(other)
    assert "\n" not in str(error.value)


def test_linear_rope_scaling_is_read(tmp_path):
    _, file = written(tmp_path)
    found = container.read(file)
    tensors = [GGUFTensorSpec(n, t.kind, t.shape, lambda t=t: np.array(t.data)) for n, t in found.tensors.items()]
    more = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    container.write(tmp_path / "other.gguf", {**found.metadata, **more}, tensors)
    config = load_model(tmp_path / "other.gguf").config
    assert (config.position.rope.scaling, config.position.rope.factor) == ("linear", 4.0)
    with pytest.raises(UserError, match=r"position\.rope\.scaling is 'linear' where a llama has 'none'"):
        gguf.write(model_of(config), TOKENIZER, tmp_path / "a.gguf")


def test_a_missing_key_is_named(tmp_path):
    _, file = written(tmp_path)
    found = container.read(file)
    tensors = [GGUFTensorSpec(n, t.kind, t.shape, lambda t=t: np.array(t.data)) for n, t in found.tensors.items()]
    container.write(tmp_path / "other.gguf", {k: v for k, v in found.metadata.items() if "feed" not in k}, tensors)
    with pytest.raises(UserError, match=r"lacks 'llama\.feed_forward_length'"):
        load_model(tmp_path / "other.gguf")
