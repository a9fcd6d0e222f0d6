"""Parity with peft for adapters of task classes, and for families that share another's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firth.model.model import LM
from firth.peft import adapter_files
from firth.pretrained.load_save import load_model

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
peft = pytest.importorskip("peft", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TABLE = SIZES | {"max_position_embeddings": 40}
ROBERTA = SIZES | {"max_position_embeddings": 42, "type_vocab_size": 1, "pad_token_id": 1}
GROUPED = TABLE | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "bert": ("Bert", TABLE, ["query", "value"]),
    "roberta": ("Roberta", ROBERTA, ["query", "value", "word_embeddings"]),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
        ["q_lin", "lin1"],
    ),
    "modernbert": (
        "ModernBert", TABLE | {"layer_types": ["full_attention"] * 2, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
        ["Wqkv", "Wi"],
    ),
    "llama": ("Llama", GROUPED, ["q_proj", "up_proj"]),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 10}, ["k_proj", "o_proj"]),
}  # fmt: skip


def hf_model(name: str, suffix: str, **more: Any) -> Any:
    prefix, fields, _ = FAMILIES[name]
    torch.manual_seed(3)
    model = getattr(transformers, prefix + suffix)(getattr(transformers, f"{prefix}Config")(**fields, **more))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model.eval()


@torch.no_grad()
def hidden(model: LM) -> Tensor:
    when = torch.arange(9)[None].expand(2, -1) * model.config.causal
    return model({"tokens": IDS, "query_time": when, "key_time": when})


@torch.no_grad()
def hf_outputs(model: Any) -> Tensor:
    out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    found: Tensor = out["logits"] if "logits" in out else out["last_hidden_state"]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_of_a_classifier_includes_its_head(name: str, tmp_path: Path) -> None:
    """LoRA with a head that was trained in full, from peft to firth and back."""
    base = hf_model(name, "ForSequenceClassification", num_labels=3)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=FAMILIES[name][2], task_type="SEQ_CLS", init_lora_weights=False
    )
    peft_model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for n, p in peft_model.named_parameters():
            if "modules_to_save" in n:
                p.add_(torch.randn_like(p) * 0.3)
    wanted = hf_outputs(peft_model)
    peft_model.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "base")
    before = class_logits(model)
    assert adapter_files.read(model, tmp_path / "theirs") == "lora"
    torch.testing.assert_close(class_logits(model), wanted, atol=1e-5, rtol=1e-5)
    assert (wanted - before).abs().max() > 0.1
    adapter_files.write(model, tmp_path / "ours", tmp_path / "base", ["classes"])
    assert not (tmp_path / "ours" / adapter_files.HEADS_FILE).exists()
    again = hf_model(name, "ForSequenceClassification", num_labels=3)
    again = peft.PeftModel.from_pretrained(again, tmp_path / "ours").eval()
    torch.testing.assert_close(hf_outputs(again), wanted, atol=1e-5, rtol=1e-5)


def class_logits(model: LM) -> Tensor:
    states = hidden(model)
    with torch.no_grad():
        out: Tensor = model.heads["classes"](states[:, -1 if model.config.causal else 0])
    return out


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
@pytest.mark.parametrize("name", ["roberta", "qwen3"])
def test_adapters_of_headless_models(name: str, kind: str, tmp_path: Path) -> None:
    """RoBERTa's positions start at 2; Qwen3 normalizes its keys, but not those of a prefix."""
    base = hf_model(name, "Model")
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    task = {"task_type": "FEATURE_EXTRACTION"}
    configs = {
        "lora": lambda: peft.LoraConfig(r=3, target_modules=FAMILIES[name][2], init_lora_weights=False, **task),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, **task),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, **task),
    }
    peft_model = peft.get_peft_model(base, configs[kind]()).eval()
    wanted = hf_outputs(peft_model)[:, -9:]
    peft_model.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "base")
    assert adapter_files.read(model, tmp_path / "theirs") == kind
    torch.testing.assert_close(hidden(model), wanted, atol=1e-5, rtol=1e-5)
    adapter_files.write(model, tmp_path / "ours", tmp_path / "base")
    again = peft.PeftModel.from_pretrained(hf_model(name, "Model"), tmp_path / "ours").eval()
    torch.testing.assert_close(hf_outputs(again)[:, -9:], wanted, atol=1e-5, rtol=1e-5)
