"""Parity of adapters with peft, in both directions and for several families; errors for invalid files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firth.model.config import ModelConfig
from firth.model.config_groups import (
    AttentionConfig,
    EmbeddingConfig,
    EncoderConfig,
    LMHeadConfig,
    NormConfig,
    PositionConfig,
)
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.peft import adapter_files, lora
from firth.peft.lora import LoraConfig
from firth.pretrained.load_save import load_model, save_model
from firth.runs.peft_options import prefix_of
from firth.types import UserError

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
peft = pytest.importorskip("peft", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_positions": 40,
    "intermediate_size": 48,
}
BERT = ModelConfig(
    **SIZES, causal=False, norm=NormConfig(placement="post", eps=1e-12, embedding=True),
    embedding=EmbeddingConfig(type_vocab_size=2), activation="gelu", lm_head=LMHeadConfig("transform", bias=True),
)  # fmt: skip
LLAMA = ModelConfig(
    **SIZES, num_kv_heads=2, norm=NormConfig("rms", bias=False, eps=1e-6), position=PositionConfig("rotary"),
    activation="swiglu", bias=False, tie_embeddings=False,
)  # fmt: skip
T5 = ModelConfig(
    **SIZES | {"max_positions": 512}, encoder=EncoderConfig(num_layers=2), head_dim=6, norm=NormConfig("rms", bias=False, eps=1e-6),
    position=PositionConfig("t5", relative_max_distance=16, relative_buckets=8), activation="relu", bias=False,
    attention=AttentionConfig(scale_scores=False), lm_head=LMHeadConfig(scale=32**-0.5),
)  # fmt: skip
CONFIGS = {"bert": BERT, "gpt2": ModelConfig(**SIZES), "llama": LLAMA, "t5": T5, "t5-odd": replace(T5, num_layers=3)}
AUTO = {"bert": "AutoModel", "gpt2": "AutoModelForCausalLM", "llama": "AutoModelForCausalLM"}
TASK = {"bert": "FEATURE_EXTRACTION", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM"}
HF_TARGETS = {
    "bert": ["query", "value", "word_embeddings", "position_embeddings"], "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"], "t5": ["q", "v", "wo"], "t5-odd": ["k"],
}  # fmt: skip
TARGETS = {
    "bert": ["q", "mlp.up", "tokens"], "gpt2": ["attention.o", "mlp.*"], "llama": ["blocks.*", "tokens", "heads.lm"],
    "t5": ["cross.q", "mlp.*"], "t5-odd": ["q", "v"],
}  # fmt: skip
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def base(name: str, folder: Path) -> LM:
    """Save a model of random weights in a directory that both libraries load."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = LM(config, {} if name == "bert" else {"lm": LMHead(config)}).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    save_model(model, None, folder / "base")
    return model


def hf_model(name: str, folder: Path) -> Any:
    auto = AUTO.get(name, "AutoModelForSeq2SeqLM")
    return getattr(transformers, auto).from_pretrained(folder / "base", attn_implementation="eager").eval()


@torch.no_grad()
def ours(model: LM) -> Tensor:
    when = torch.arange(9)[None].expand(2, -1) * model.config.causal
    source = {"source_tokens": IDS.flip(1)} if model.config.encoder.num_layers else {}
    hidden = model({"tokens": IDS, "query_time": when, "key_time": when} | source)
    return model.heads["lm"](hidden) if "lm" in model.heads else hidden


@torch.no_grad()
def theirs(model: Any) -> Tensor:
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if model.config.is_encoder_decoder:
        inputs = {"input_ids": IDS.flip(1), "attention_mask": torch.ones_like(IDS), "decoder_input_ids": IDS}
    outputs = model(**inputs)
    out: Tensor = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return out[:, -9:]  # without the outputs at the virtual tokens


def peft_config(name: str, kind: str) -> Any:
    task = TASK.get(name, "SEQ_2_SEQ_LM")
    if kind == "lora":
        return peft.LoraConfig(
            r=4, lora_alpha=7, use_rslora=True, target_modules=HF_TARGETS[name], task_type=task, init_lora_weights=False,
            fan_in_fan_out=name == "gpt2",
        )  # fmt: skip
    if kind == "prompt":
        return peft.PromptTuningConfig(num_virtual_tokens=3, task_type=task)
    config = peft.PrefixTuningConfig(
        num_virtual_tokens=3, task_type=task, prefix_projection=kind == "mlp", encoder_hidden_size=10
    )
    if name.startswith("t5"):  # head_dim is smaller than hidden_size / num_heads
        config.token_dim, config.num_attention_heads, config.num_layers = 24, 4, CONFIGS[name].num_layers
    return config


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "prefix", "mlp", "prompt"])
@pytest.mark.parametrize("name", CONFIGS)
def test_peft_files_give_the_same_outputs_both_ways(name: str, kind: str, tmp_path: Path) -> None:
    unadapted = ours(base(name, tmp_path))
    torch.manual_seed(1)
    peft_model = peft.get_peft_model(hf_model(name, tmp_path), peft_config(name, kind)).eval()
    wanted = theirs(peft_model)
    peft_model.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "base")
    assert adapter_files.read(model, tmp_path / "theirs") == ("prefix" if kind == "mlp" else kind)
    assert (wanted - unadapted).abs().max() > 0.05
    torch.testing.assert_close(ours(model), wanted, atol=1e-5, rtol=0)
    assert "peft loads it" in adapter_files.write(model, tmp_path / "ours", tmp_path / "base")
    again = peft.PeftModel.from_pretrained(hf_model(name, tmp_path), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(again), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(adapter_files.load(tmp_path / "ours")), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_files_load_in_peft(name: str, tmp_path: Path) -> None:
    """The adapter's file in peft and the merged model in transformers give firth's outputs."""
    model = base(name, tmp_path)
    lora.add(model, TARGETS[name], LoraConfig(rank=3, alpha=5.0))
    for low in lora.lora_layers(model).values():
        low.B.data.normal_(std=0.2)
    adapter_files.write(model, tmp_path / "ours", tmp_path / "base")
    peft_model = peft.PeftModel.from_pretrained(hf_model(name, tmp_path), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(peft_model), ours(model), atol=1e-5, rtol=0)
    count = sum(p.numel() for n, p in peft_model.named_parameters() if "lora_" in n)
    lora.freeze(model)
    assert count == lora.num_trainable_parameters(model)
    wanted = ours(model)
    save_model(lora.merge_and_unload(model), None, tmp_path / "base")
    torch.testing.assert_close(theirs(hf_model(name, tmp_path)), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "t5-odd"])
def test_prefix_files_load_in_peft(name: str, tmp_path: Path) -> None:
    """All layers differ, which peft's layout for T5 can only express with padding."""
    model = base(name, tmp_path)
    model.heads["prefix"] = prefix_of(model, [5, 6, 7, 8])
    adapter_files.write(model, tmp_path / "ours", tmp_path / "base")
    peft_model = peft.PeftModel.from_pretrained(hf_model(name, tmp_path), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(peft_model), ours(model), atol=1e-5, rtol=0)


def test_generation_with_a_prefix_matches_peft(tmp_path: Path) -> None:
    model = base("llama", tmp_path)
    model.heads["prefix"] = prefix_of(model, [5, 6, 7, 8])
    adapter_files.write(model, tmp_path / "ours", tmp_path / "base")
    peft_model = peft.PeftModel.from_pretrained(hf_model("llama", tmp_path), tmp_path / "ours").eval()
    tokens = IDS[:1, :4]
    with torch.no_grad():
        for _ in range(5):
            when = torch.arange(tokens.shape[1])[None]
            logits = model.heads["lm"](model({"tokens": tokens, "query_time": when, "key_time": when}))
            tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
        inputs = {"input_ids": IDS[:1, :4], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
        generated = peft_model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated.tolist() == tokens.tolist()


@pytest.mark.parametrize("targets", [["attention.q", "attention.v"], ["attention.k", "mlp.up"], ["q", "k", "v", "o"]])
def test_separate_adapters_are_stacked_in_one_matrix(targets: list[str], tmp_path: Path) -> None:
    """GPT-2's queries, keys and values are one matrix in peft and have separate ranks and scales here."""
    model = base("gpt2", tmp_path)
    for i, target in enumerate(targets):
        lora.add(model, [target], LoraConfig(rank=2 + i, alpha=3.0 + i))
    for low in lora.lora_layers(model).values():
        low.B.data.normal_(std=0.2)
    adapter_files.write(model, tmp_path / "ours", tmp_path / "base")
    peft_model = peft.PeftModel.from_pretrained(hf_model("gpt2", tmp_path), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(peft_model), ours(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(adapter_files.load(tmp_path / "ours")), ours(model), atol=1e-5, rtol=0)


def test_a_module_unknown_to_transformers_keeps_its_name(tmp_path: Path) -> None:
    model = base("gpt2", tmp_path)  # its LM head is tied to the embeddings
    lora.add(model, ["heads.lm", "q"], LoraConfig(rank=2))
    for low in lora.lora_layers(model).values():
        low.B.data.normal_(std=0.2)
    assert "only firth" in adapter_files.write(model, tmp_path / "ours", tmp_path / "base")
    again = load_model(tmp_path / "base")
    adapter_files.read(again, tmp_path / "ours")
    torch.testing.assert_close(ours(again), ours(model), atol=1e-5, rtol=0)


def test_an_adapter_of_an_unsupported_base_is_for_firth(tmp_path: Path) -> None:
    config = LLAMA.with_fields({"position.type": "sinusoidal"})
    model = LM(config, {"lm": LMHead(config)}).eval()
    save_model(model, None, tmp_path / "base")
    lora.add(model, ["blocks.*"], LoraConfig(rank=2))
    for low in lora.lora_layers(model).values():
        low.B.data.normal_(std=0.2)
    assert "only firth" in adapter_files.write(model, tmp_path / "ours", tmp_path / "base")
    torch.testing.assert_close(ours(adapter_files.load(tmp_path / "ours")), ours(model), atol=1e-5, rtol=0)


def written(tmp_path: Path, **changes: Any) -> Path:
    model = base("llama", tmp_path)
    lora.add(model, ["q"], LoraConfig(rank=2))
    adapter_files.write(model, tmp_path / "ours", tmp_path / "base")
    file = tmp_path / "ours" / adapter_files.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    (tmp_path / "ours" / adapter_files.FIRTH_FILE).unlink()  # peft's own has none, and its content hashes would differ
    return tmp_path / "ours"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"base_model_name_or_path": "meta-llama/Llama"},
            "names the base 'meta-llama/Llama', which is no directory here",
        ),
        ({"peft_type": "IA3"}, "has peft_type 'IA3'; firth reads LORA, PREFIX_TUNING, PROMPT_TUNING"),
        ({"use_dora": True}, "uses DoRA"),
        ({"bias": "all"}, "has trained biases"),
        ({"r": None}, "lacks the number 'r'"),
        ({"lora_alpha": "big"}, "lacks the number 'lora_alpha'"),
        ({"alpha_pattern": {"(": 2}}, "invalid regular expression"),
        ({"peft_type": "PREFIX_TUNING"}, "lacks the matrix 'prompt_embeddings'"),
    ],
)
def test_unsupported_files_are_rejected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapter_files.load(written(tmp_path, **changes))


def test_a_trained_head_is_saved_with_the_adapter(tmp_path: Path) -> None:
    model = base("bert", tmp_path)
    model.heads["classes"] = torch.nn.Linear(32, 3)
    lora.add(model, ["q"], LoraConfig(rank=2))
    summary = adapter_files.write(
        model, tmp_path / "ours", tmp_path / "base", ["classes"], facts={"classes": ["a", "b", "c"]}
    )
    again = adapter_files.load(tmp_path / "ours")
    assert torch.equal(again.heads["classes"].weight, model.heads["classes"].weight) and "firth's own" in summary
    peft_model = peft.PeftModel.from_pretrained(hf_model("bert", tmp_path), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(peft_model), ours(model), atol=1e-5, rtol=0)
    (tmp_path / "ours" / adapter_files.FIRTH_FILE).write_text(  # as an older version would have, without content hashes
        '{"heads": {"classes": {"kind": "linear", "in": 32, "out": 4, "bias": true}}}'
    )
    with pytest.raises(UserError, match="does not have the head 'classes'"):
        adapter_files.load(tmp_path / "ours")


def test_an_adapter_cannot_be_loaded_as_a_model(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"contains an adapter and no model: set init_from to its base, and peft.init_from="
    ):
        load_model(written(tmp_path))


def test_an_adapter_of_another_model_is_rejected(tmp_path: Path) -> None:
    directory = written(tmp_path)
    for config, message in (
        (CONFIGS["gpt2"], "which is no module of the base"),
        (replace(LLAMA, hidden_size=64), "does not fit the weight of"),
    ):
        with pytest.raises(UserError, match=message):
            adapter_files.read(LM(config, {}), directory)
    (directory / adapter_files.WEIGHTS_FILE).write_bytes(b"not tensors")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        adapter_files.load(directory)
    (directory / adapter_files.WEIGHTS_FILE).unlink()
    with pytest.raises(UserError, match=r"holds no adapter_model\.safetensors"):
        adapter_files.load(directory)
