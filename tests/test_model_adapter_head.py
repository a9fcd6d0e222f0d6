"""Adapters of peft's that bring a head for a base that has none, as they are ordinarily made: against peft's own outputs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_model_adapter_tasks import FAMILIES, answers, hidden, said, theirs_of
from text_packages import minilm

from firth.evaluate.predict import predict
from firth.peft import adapter_files
from firth.pretrained.load_save import load_model
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
peft = pytest.importorskip("peft", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")

MORE = {"roberta": [], "distilbert": ["pre_classifier"], "modernbert": ["head"]}
"""Modules of a head that peft keeps only if it is asked to, since their names are not `classifier`."""


def trained(base: Path, suffix: str, where: Path, plan: Any, **more: Any) -> Any:
    """The head that transformers adds to a base, with an adapter, as if trained; saved by peft."""
    torch.manual_seed(2)
    there = getattr(transformers, f"AutoModelFor{suffix}").from_pretrained(base, **more)
    there = peft.get_peft_model(there, plan).eval()
    with torch.no_grad():
        for p in there.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.2)
    there.save_pretrained(where)
    return there


@pytest.mark.parametrize(
    ("name", "body"),
    [(name, "Model") for name in FAMILIES] + [(name, "WithItsVocabulary") for name in FAMILIES if name != "bert"],
)
def test_a_classifier_on_a_bare_base(name: str, body: str, tmp_path: Path) -> None:
    """The head that was trained comes along, and what it was not (BERT's pooler) is the base's."""
    causal = name in ("llama", "qwen3")
    if body == "WithItsVocabulary":  # a BERT has no pooler then: the test below
        body = "ForCausalLM" if causal else "ForMaskedLM"
    theirs_of(name, body).save_pretrained(tmp_path / "base")
    plan = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=FAMILIES[name][2], task_type="SEQ_CLS", modules_to_save=MORE.get(name)
    )
    there = trained(tmp_path / "base", "SequenceClassification", tmp_path / "theirs", plan, num_labels=3)
    there.config.pad_token_id = None
    wanted = torch.cat([alone(there, i) for i in range(2)]) if causal else said(there)
    model = adapter_files.load(tmp_path / "theirs")
    assert [*model.heads] == ["classes"]
    torch.testing.assert_close(answers(model), wanted, atol=1e-5, rtol=1e-5)


def alone(model: Any, row: int) -> torch.Tensor:
    """A decoder's class of one text: without a padding token theirs takes no batch."""
    from test_model_adapter_tasks import IDS

    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS[row : row + 1])["logits"]
    return found


def test_what_neither_has_is_named(tmp_path: Path) -> None:
    """BERT's pooler began at random there, and no file has it: peft itself gives another answer every time."""
    theirs_of("bert", "ForMaskedLM").save_pretrained(tmp_path / "base")
    plan = peft.LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS")
    trained(tmp_path / "base", "SequenceClassification", tmp_path / "theirs", plan)
    with pytest.raises(
        UserError, match=r"has 'bert.pooler.dense.weight': that began at random and is lost; name it in"
    ):
        adapter_files.load(tmp_path / "theirs")


@pytest.mark.parametrize(("suffix", "task", "part"), [
    ("TokenClassification", "TOKEN_CLS", "tags"), ("QuestionAnswering", "QUESTION_ANS", "span"),
    ("TokenClassification", None, "tags"),
])  # fmt: skip
def test_other_heads(suffix: str, task: str | None, part: str, tmp_path: Path) -> None:
    """By peft's word for the task, or by the class that it notes where it was given none."""
    theirs_of("bert", "Model").save_pretrained(tmp_path / "base")
    saved = None if task else ["classifier"]
    plan = peft.LoraConfig(r=3, target_modules=["query", "value"], task_type=task, modules_to_save=saved)
    there = trained(tmp_path / "base", suffix, tmp_path / "theirs", plan)
    model = adapter_files.load(tmp_path / "theirs")
    from test_model_adapter_tasks import IDS

    with torch.no_grad():
        found, theirs = model.heads[part](hidden(model)), there(input_ids=IDS)
    wanted = theirs["logits"] if part == "tags" else torch.stack((theirs["start_logits"], theirs["end_logits"]), -1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_prefix_brings_its_head_too(tmp_path: Path) -> None:
    theirs_of("bert", "Model").save_pretrained(tmp_path / "base")
    plan = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")
    there = trained(tmp_path / "base", "SequenceClassification", tmp_path / "theirs", plan, num_labels=3)
    torch.testing.assert_close(answers(adapter_files.load(tmp_path / "theirs")), said(there), atol=1e-5, rtol=1e-5)
    plan = peft.PromptTuningConfig(num_virtual_tokens=4, task_type="SEQ_CLS")
    trained(tmp_path / "base", "SequenceClassification", tmp_path / "prompt", plan, num_labels=3)
    with pytest.raises(UserError, match="peft reads the class of a text at the first vector of its prompt"):
        adapter_files.load(tmp_path / "prompt")


def test_a_head_of_another_size_takes_the_place_of_the_base_s(tmp_path: Path) -> None:
    theirs_of("bert", "ForSequenceClassification", num_labels=2).save_pretrained(tmp_path / "base")
    plan = peft.LoraConfig(r=3, target_modules=["query"], task_type="SEQ_CLS")
    there = trained(
        tmp_path / "base", "SequenceClassification", tmp_path / "theirs", plan, num_labels=5,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    torch.testing.assert_close(answers(adapter_files.load(tmp_path / "theirs")), said(there), atol=1e-5, rtol=1e-5)
    assert load_model(tmp_path / "base").heads["classes"][2].out_features == 2


def test_predict_takes_such_an_adapter_of_minilm(tmp_path: Path) -> None:
    base = minilm()
    plan = peft.LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    there = trained(base, "SequenceClassification", tmp_path / "theirs", plan, num_labels=3)
    texts = ["a fine film, and warm", "dull"]
    rows = list(predict(tmp_path / "theirs", "-", io.BytesIO("\n".join(texts).encode())))
    tokenizer = Tokenizer.load(base)
    for text, row in zip(texts, rows, strict=True):
        ids = torch.as_tensor(tokenizer.vocab.add_special_tokens(tokenizer.encode(text)))[None].long()
        with torch.no_grad():
            shares = there(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].softmax(-1).numpy()
        np.testing.assert_allclose([*row["probabilities"].values()], shares, atol=1e-5)
        assert [*row["probabilities"]] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
