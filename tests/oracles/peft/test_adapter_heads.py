"""peft adapters with a task head for a base that has none: parity with peft's outputs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firth.evaluate.predict import predict
from firth.peft import adapter_files
from firth.pretrained.load_save import load_model
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError
from tests.support.peft_models import FAMILIES, IDS, class_logits, hf_model, hf_outputs, hidden

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
peft = pytest.importorskip("peft", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

EXTRA_MODULES = {"roberta": [], "distilbert": ["pre_classifier"], "modernbert": ["head"]}
"""Modules of a head that peft saves only with `modules_to_save`, since their names are not `classifier`."""


def trained(base: Path, suffix: str, where: Path, config: Any, **more: Any) -> Any:
    """Add a head and an adapter to a base, change both as training would, and save them with peft."""
    torch.manual_seed(2)
    peft_model = getattr(transformers, f"AutoModelFor{suffix}").from_pretrained(base, **more)
    peft_model = peft.get_peft_model(peft_model, config).eval()
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    peft_model.save_pretrained(where)
    return peft_model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "body"),
    [(name, "Model") for name in FAMILIES] + [(name, "WithLMHead") for name in FAMILIES if name != "bert"],
)
def test_a_classifier_on_a_base_without_its_head(name: str, body: str, tmp_path: Path) -> None:
    """The trained head comes from the adapter; the rest of it (BERT's pooler) from the base."""
    causal = name in ("llama", "qwen3")
    if body == "WithLMHead":  # a BERT has no pooler then: see the next test
        body = "ForCausalLM" if causal else "ForMaskedLM"
    hf_model(name, body).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=FAMILIES[name][2],
        task_type="SEQ_CLS",
        modules_to_save=EXTRA_MODULES.get(name),
    )
    peft_model = trained(tmp_path / "base", "SequenceClassification", tmp_path / "theirs", config, num_labels=3)
    peft_model.config.pad_token_id = None
    wanted = torch.cat([single_row_logits(peft_model, i) for i in range(2)]) if causal else hf_outputs(peft_model)
    model = adapter_files.load(tmp_path / "theirs")
    assert [*model.heads] == ["classes"]
    torch.testing.assert_close(class_logits(model), wanted, atol=1e-5, rtol=1e-5)


def single_row_logits(model: Any, row: int) -> torch.Tensor:
    """Logits of one row: without a padding token transformers takes no batch."""

    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS[row : row + 1])["logits"]
    return found


def test_a_missing_part_of_a_head_is_named(tmp_path: Path) -> None:
    """BERT's pooler was initialized at random and is in no file: peft itself gives other outputs every time."""
    hf_model("bert", "ForMaskedLM").save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS")
    trained(tmp_path / "base", "SequenceClassification", tmp_path / "theirs", config)
    with pytest.raises(
        UserError, match=r"has 'bert.pooler.dense.weight', which was initialized at random and not saved: add it to"
    ):
        adapter_files.load(tmp_path / "theirs")


@pytest.mark.parametrize(("suffix", "task", "head"), [
    ("TokenClassification", "TOKEN_CLS", "tags"), ("QuestionAnswering", "QUESTION_ANS", "span"),
    ("TokenClassification", None, "tags"),
])  # fmt: skip
def test_other_heads(suffix: str, task: str | None, head: str, tmp_path: Path) -> None:
    """The class is found by peft's task type, or by its auto_mapping without one."""
    hf_model("bert", "Model").save_pretrained(tmp_path / "base")
    saved = None if task else ["classifier"]
    config = peft.LoraConfig(r=3, target_modules=["query", "value"], task_type=task, modules_to_save=saved)
    peft_model = trained(tmp_path / "base", suffix, tmp_path / "theirs", config)
    model = adapter_files.load(tmp_path / "theirs")

    with torch.no_grad():
        found, theirs = model.heads[head](hidden(model)), peft_model(input_ids=IDS)
    wanted = theirs["logits"] if head == "tags" else torch.stack((theirs["start_logits"], theirs["end_logits"]), -1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_prefix_includes_its_head(tmp_path: Path) -> None:
    hf_model("bert", "Model").save_pretrained(tmp_path / "base")
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")
    peft_model = trained(tmp_path / "base", "SequenceClassification", tmp_path / "theirs", config, num_labels=3)
    torch.testing.assert_close(
        class_logits(adapter_files.load(tmp_path / "theirs")), hf_outputs(peft_model), atol=1e-5, rtol=1e-5
    )
    config = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")
    trained(tmp_path / "base", "SequenceClassification", tmp_path / "prompt", config, num_labels=3)
    with pytest.raises(UserError, match="peft classifies at the first vector of the prompt"):
        adapter_files.load(tmp_path / "prompt")


def test_a_head_of_another_size_replaces_the_base_head(tmp_path: Path) -> None:
    hf_model("bert", "ForSequenceClassification", num_labels=2).save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS")
    peft_model = trained(
        tmp_path / "base", "SequenceClassification", tmp_path / "theirs", config, num_labels=5,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    torch.testing.assert_close(
        class_logits(adapter_files.load(tmp_path / "theirs")), hf_outputs(peft_model), atol=1e-5, rtol=1e-5
    )
    assert load_model(tmp_path / "base").heads["classes"][2].out_features == 2


@pytest.mark.slow
def test_predict_loads_an_adapter_of_minilm(minilm: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    peft_model = trained(minilm, "SequenceClassification", tmp_path / "theirs", config, num_labels=3)
    texts = ["a fine film, and warm", "dull"]
    rows = list(predict(tmp_path / "theirs", "-", io.BytesIO("\n".join(texts).encode())))
    tokenizer = Tokenizer.load(minilm)
    for text, row in zip(texts, rows, strict=True):
        ids = torch.as_tensor(tokenizer.vocab.add_special_tokens(tokenizer.encode(text)))[None].long()
        with torch.no_grad():
            probabilities = peft_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].softmax(-1).numpy()
        np.testing.assert_allclose([*row["probabilities"].values()], probabilities, atol=1e-5)
        assert [*row["probabilities"]] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
