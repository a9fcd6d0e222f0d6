"""Parity with transformers: each family, both directions, logits and loss, on models of random weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.pretrained.families import FAMILIES, family_of
from firth.pretrained.load_save import init_from, load_model, save_model
from firth.types import NEVER, UserError
from tests.support.tiny_corpus import tokenizer

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_positions": 40,
    "intermediate_size": 48,
}
BERT = ModelConfig(
    **SIZES,
    causal=False,
    norm_placement="post",
    norm_eps=1e-12,
    type_vocab_size=2,
    embedding_norm=True,
    activation="gelu",
    lm_head="transform",
    lm_head_bias=True,
)
LLAMA = ModelConfig(
    **SIZES, num_kv_heads=2, norm="rms", norm_bias=False, norm_eps=1e-6, position="rotary", activation="swiglu", bias=False,
    tie_embeddings=False,
)  # fmt: skip
T5 = ModelConfig(
    **SIZES | {"max_positions": 512}, num_encoder_layers=3, head_dim=6, norm="rms", norm_bias=False, norm_eps=1e-6, position="t5",
    activation="relu", bias=False, scale_attention=False, lm_head_scale=32**-0.5, relative_max_distance=16, relative_buckets=8,
)  # fmt: skip
BART = ModelConfig(
    **SIZES, num_encoder_layers=3, decoder_start_token="eos", norm_placement="post", embedding_norm=True, activation="gelu",
    lm_head_bias=True,
)  # fmt: skip
MARIAN = replace(BART, position="marian", embedding_norm=False, embedding_scale=32**0.5, decoder_start_token="pad")
XLNET = ModelConfig(
    **SIZES, causal=False, norm_placement="post", norm_eps=1e-12, position="xlnet", mask_embedding=True, type_vocab_size=2,
    activation="gelu", lm_head_bias=True,
)  # fmt: skip
MPNET = replace(BERT, type_vocab_size=0, position="mpnet")
SHAPES = {
    "xlnet": XLNET,
    "xlnet-untied": replace(XLNET, tie_embeddings=False, memory_length=7, activation="relu"),
    "mpnet": MPNET,
    "mpnet-untied": replace(MPNET, tie_embeddings=False),
    "bert": BERT,
    "bert-untied": replace(BERT, tie_embeddings=False),
    "albert": replace(BERT, embedding_size=12, num_layer_groups=1, num_layers=3),
    "albert-two-groups": replace(BERT, embedding_size=32, num_layer_groups=2, num_layers=5, activation="gelu_tanh", tie_embeddings=False),
    "electra": replace(BERT, embedding_size=12),
    "bart": BART,
    "marian": MARIAN,
    "marian-swish": replace(MARIAN, embedding_scale=1.0, activation="silu"),
    "gpt2": ModelConfig(**SIZES),
    "llama": LLAMA,
    "llama-tied": replace(LLAMA, tie_embeddings=True, bias=True, head_dim=10, rope_theta=5000.0),
    "t5-v1.0": T5,
    "t5-v1.1": replace(T5, activation="geglu_tanh", lm_head_scale=1.0, tie_embeddings=False),
    "t5-v1.1-tied": replace(T5, activation="geglu_tanh", lm_head_scale=1.0),
    "nanochat": replace(decoder_config(61, 32, 2, num_heads=4, max_positions=40), num_kv_heads=2, zero_init=False),
    "modernbert": replace(encoder_config(61, 32, 2, num_heads=4, max_positions=40), zero_init=False),
    "modernbert-silu": replace(encoder_config(61, 32, 2, num_heads=4, max_positions=40), zero_init=False, activation="swiglu"),
}  # fmt: skip
MARIAN_IDS = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": 2}
AUTO = {
    "xlnet": "AutoModelForCausalLM", "mpnet": "AutoModelForMaskedLM",
    "albert": "AutoModelForMaskedLM", "electra": "AutoModelForMaskedLM",
    "bert": "AutoModelForMaskedLM", "modernbert": "AutoModelForMaskedLM", "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM", "nanochat": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM", "marian": "AutoModelForSeq2SeqLM",
}  # fmt: skip


def built(config: ModelConfig, seed: int = 0) -> LM:
    """A model whose parameters are all random, norms and biases too, so that swapped tensors are detected."""
    torch.manual_seed(seed)
    model = LM(config, {"lm": LMHead(config)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def batches(family: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """The same right-padded rows for firth and for transformers, and the mask of real tokens."""
    torch.manual_seed(1)
    tokens = torch.randint(1, 61, (3, 20))
    real = torch.arange(20) < torch.tensor([20, 13, 7])[:, None]
    steps = torch.arange(20).expand(3, 20)
    ours = {"tokens": tokens}
    theirs = {"input_ids": tokens, "attention_mask": real.long()}
    if family in ("bert", "albert", "electra", "modernbert", "mpnet", "xlnet"):
        ours["key_time"] = torch.where(real, 0, NEVER)
    else:
        ours |= {"query_time": steps, "key_time": torch.where(real, steps, NEVER)}
    if family == "mpnet":
        theirs["position_ids"] = steps + 2
    if family in ("bert", "albert", "electra", "xlnet"):
        ours["token_type_ids"] = theirs["token_type_ids"] = (steps > 4).long()
    if family in ("t5", "bart", "marian"):
        source = torch.randint(1, 61, (3, 26))
        theirs = {"input_ids": source, "decoder_input_ids": tokens}
        keep = torch.arange(26) < torch.tensor([26, 9, 18])[:, None]
        theirs["attention_mask"] = keep.long()
        ours |= {"source_tokens": source, "source_key_time": torch.where(keep, 0, NEVER), "key_time": steps}
    return ours, theirs, real


@torch.no_grad()
def agree(model: LM, theirs: torch.nn.Module, family: str) -> float:
    """Return the largest difference of logits on real positions, in units of their deviation where that is above 1.

    Random weights of a gated T5 give logits of up to 25 (deviation 6.6), which differ by 1.2e-4 with kernels of AVX2. That is
    rounding in fp32, 5e-6 of them: `test_a_gated_t5_is_exact_in_float64`.
    """
    ours_in, theirs_in, real = batches(family)
    hidden = model(ours_in)
    head = model.heads["lm"]
    labels = ours_in["tokens"].roll(-1, 1)
    want = theirs(**theirs_in).logits
    difference = (head(hidden) - want)[real].abs().max().item()
    loss = head.nll(hidden[real], labels[real]) / real.sum()  # type: ignore[operator]
    expected = torch.nn.functional.cross_entropy(want[real].float(), labels[real])
    assert abs(loss.item() - expected.item()) < 1e-5
    assert want[real].std() > 0.05
    return difference / max(1.0, want[real].std().item())


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_loads_saved_models(name: str, tmp_path: Path) -> None:
    config, family = SHAPES[name], name.split("-")[0]
    model = built(config)
    found = family_of(config)
    assert found is not None and found.name == family
    summary = save_model(model, None, tmp_path)
    assert summary.endswith(found.classes[0])
    auto = getattr(transformers, AUTO[family])
    theirs, info = auto.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert agree(model, theirs.eval(), family) < 1e-4
    again = load_model(tmp_path)
    assert again.config == config
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


def random_theirs(name: str) -> torch.nn.Module:
    t = transformers
    torch.manual_seed(3)
    usual = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 50,
    }
    five = {"vocab_size": 61, "d_model": 32, "d_kv": 6, "d_ff": 50, "num_layers": 2, "num_heads": 4}
    two = {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    six = {"vocab_size": 61, "d_model": 32, "max_position_embeddings": 40}
    for side, depth in (("encoder", 2), ("decoder", 3)):
        six |= {f"{side}_layers": depth, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 50}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    full = {"layer_types": ["full_attention"] * 2}
    nine = {"vocab_size": 61, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 50}
    configs = {
        "xlnet": lambda: t.XLNetLMHeadModel(t.XLNetConfig(**nine)),
        "mpnet": lambda: t.MPNetForMaskedLM(t.MPNetConfig(**usual, max_position_embeddings=42)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**usual, max_position_embeddings=40)),
        "albert": lambda: t.AlbertForMaskedLM(t.AlbertConfig(**usual, embedding_size=12, num_hidden_groups=2)),
        "electra": lambda: t.ElectraForMaskedLM(t.ElectraConfig(**usual, embedding_size=12)),
        "electra-wide": lambda: t.ElectraForMaskedLM(t.ElectraConfig(**usual, embedding_size=32)),
        "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**six, **ids)),
        "marian": lambda: t.MarianMTModel(t.MarianConfig(**six, **MARIAN_IDS, scale_embedding=True)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**two)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**usual, num_key_value_heads=2)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**five, num_decoder_layers=3)),
        "t5-gated": lambda: t.T5ForConditionalGeneration(t.T5Config(**five, **gated)),
        "nanochat": lambda: t.NanoChatForCausalLM(t.NanoChatConfig(**usual)),
        "modernbert": lambda: t.ModernBertForMaskedLM(t.ModernBertConfig(**usual, **ids, **full)),
    }
    model = configs[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # Marian's sinusoidal positions do not, and no file has them
                parameter.add_(torch.randn_like(parameter) * 0.15)
        if name in ("bart", "marian"):  # a buffer of zeros: other values show that it is read
            model.final_logits_bias.normal_()
    return model.eval()


@pytest.mark.parametrize(
    "name",
    [
        "bert",
        "bart",
        "marian",
        "albert",
        "electra",
        "electra-wide",
        "gpt2",
        "llama",
        "t5",
        "t5-gated",
        "nanochat",
        "modernbert",
        "xlnet",
        "mpnet",
    ],
)
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_models_saved_by_transformers_load(name: str, shards: str, tmp_path: Path) -> None:
    theirs = random_theirs(name)
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards == "20KB")
    model = load_model(tmp_path)
    assert "lm" in model.heads
    assert agree(model, theirs, name.split("-")[0]) < 1e-4


def test_a_gated_t5_is_exact_in_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The difference in fp32 is rounding alone. T5LayerNorm computes its variance in fp32 for any dtype, so it is patched."""

    def norm(self: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr("transformers.models.t5.modeling_t5.T5LayerNorm.forward", norm)
    theirs = random_theirs("t5-gated")
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path).double()
    ours_in, theirs_in, real = batches("t5")
    with torch.no_grad():
        found = model.heads["lm"](model(ours_in)) - theirs.double()(**theirs_in).logits
    assert found[real].abs().max() < 1e-10


def test_a_headless_model_has_no_head(tmp_path: Path) -> None:
    theirs = random_theirs("bert")
    theirs.bert.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert not len(model.heads)
    ours_in, theirs_in, real = batches("bert")
    with torch.no_grad():
        assert (model(ours_in) - theirs.bert(**theirs_in).last_hidden_state)[real].abs().max() < 1e-4


def test_config_suits_both_transformers_versions(tmp_path: Path) -> None:
    save_model(built(SHAPES["llama-tied"]), None, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in set(file.keys())


def test_all_heads_are_saved(tmp_path: Path) -> None:
    config = SHAPES["bert"]
    inner = replace(config, num_layers=1)
    torch.manual_seed(0)
    heads = {
        "lm": LMHead(config),
        "classes": torch.nn.Linear(32, 3),
        "pair": torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2)),
        "generator": LM(inner, {"lm": LMHead(inner)}),
    }
    model = LM(config, heads).eval()
    save_model(model, None, tmp_path, {"steps": 7})
    again = load_model(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert again.heads["lm"].weight is again.tokens.weight
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert agree(again, theirs.eval(), "bert") < 1e-4


def test_init_from_is_strict_on_the_stack(tmp_path: Path) -> None:
    config = SHAPES["bert"]
    old = built(config)
    save_model(old, None, tmp_path)
    torch.manual_seed(9)
    new = LM(config, {"classes": torch.nn.Linear(32, 3)})
    assert init_from(new, tmp_path) == (["lm"], ["classes"])
    assert torch.equal(new.stack.blocks[1].mlp.up.weight, old.stack.blocks[1].mlp.up.weight)
    with pytest.raises(UserError, match=r"model\.intermediate_size is 48, not 64"):
        init_from(LM(replace(config, intermediate_size=64), {}), tmp_path)


def test_a_config_without_a_family_is_saved(tmp_path: Path) -> None:
    config = ModelConfig(**SIZES, position="sinusoidal", activation="relu2")
    assert family_of(config) is None
    model = built(config)
    assert "only firth" in save_model(model, None, tmp_path)
    again = load_model(tmp_path)
    assert all(torch.equal(t, again.state_dict()[k]) for k, t in model.state_dict().items())


def test_invalid_directories_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no model"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 5}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickled"):
        load_model(tmp_path)
    save_model(built(SHAPES["gpt2"]), None, tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not as it was written"):
        load_model(tmp_path)
    (tmp_path / "firth.json").unlink()  # and with it the content hashes
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    save = tmp_path / "model.safetensors"
    save.unlink()
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, save)
    with pytest.raises(UserError, match="model_type 'rwkv'"):
        load_model(tmp_path)


def test_every_default_config_has_a_family() -> None:
    assert {n.split("-")[0] for n in SHAPES} <= set(FAMILIES)  # the others: test_model_family_heads
    for config in (decoder_config(61, 64, 2), encoder_config(61, 64, 2), encoder_decoder_config(61, 64, 2)):
        assert family_of(config) is not None


@pytest.mark.parametrize("end", ["</s>", "<|im_end|>"])
def test_generation_ends_where_transformers_does(end: str, tmp_path: Path) -> None:
    """Generation ends at the end of a text and of a turn: the model is changed to emit it first as its n-th token."""
    tok = tokenizer()
    model = built(replace(decoder_config(tok.vocab.size, 32, 2, num_heads=4, max_positions=64), zero_init=False))
    prompt, greedy = tok.encode("What is a module?"), Sampling(max_new_tokens=12, temperature=0)
    [unending] = Engine(model, tok, stops=()).generate([prompt], greedy)
    tokens = unending.tokens.tolist()
    n = max(i for i in range(12) if tokens[i] not in tokens[:i])
    assert n > 1
    head = model.heads["lm"].weight.data
    swap = [tokens[n], tok.id(end)]
    head[swap] = head[swap[::-1]].clone()
    save_model(model, tok, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.generation_config.eos_token_id == [tok.id("</s>"), tok.id("<|im_end|>")]
    ids = torch.as_tensor(prompt, dtype=torch.int64)[None]
    out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    [ours] = Engine(model, tok).generate([prompt], greedy)
    assert out[0, len(prompt) :].tolist() == ours.tokens.tolist() == [*tokens[:n], tok.id(end)]
