"""Parity with peft for adapters of task classes, and for families that share another's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from firth.peft import adapter_files
from firth.pretrained.load_save import load_model
from tests.support.peft_models import FAMILIES, class_logits, hf_model, hf_outputs, hidden

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
peft = pytest.importorskip("peft", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")


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
