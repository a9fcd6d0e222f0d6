"""`firth evaluate --task` on an adapter that peft has written: log-probabilities and choices of peft's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from firth.cli import app
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.presets import gpt2, llama
from firth.pretrained.load_save import save_model
from firth.tokenizer.train import train as train_tokenizer

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
peft = pytest.importorskip("peft", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

WORDS = ["the", "otter", "paints", "a", "boat", "while", "every", "heron", "counts", "red", "stones", "near", "their"]


@torch.no_grad()
def log_probability(model: Any, tokenizer: Any, text: str) -> float:
    """Return log p(text) after bos by transformers and peft."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
    logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    return float(logprobs.gather(-1, ids[0, 1:, None]).sum())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_of_peft_is_evaluated_in_prompts(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 7)) for _ in range(24)]
    tokenizer = train_tokenizer(iter(texts), "byte-bpe", 420)
    torch.manual_seed(0)
    size = tokenizer.vocab.size
    config = gpt2(size, 32, 2, 2, max_positions=64) if family == "gpt2" else llama(size, 32, 2, 2, 48, max_positions=64)
    model = LM(config, {"lm": LMHead(config)})
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    save_model(model, tokenizer, tmp_path / "base")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    targets = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[family]
    torch.manual_seed(1)
    lora = peft.LoraConfig(
        r=4, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    adapted = peft.get_peft_model(theirs, lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")

    pairs = [(text, " ".join(text.split()[::-1])) for text in texts]
    rows = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in pairs]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    arguments = [
        "evaluate",
        str(tmp_path / "adapter"),
        "--task",
        "minimal_pairs",
        "--data",
        str(tmp_path / "pairs.jsonl"),
        "--json",
    ]
    result = CliRunner().invoke(app, [*arguments, "--weights", "fp32", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, f"{result.output}\n{result.exception}"

    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    wanted = np.array([[log_probability(adapted, hf_tokenizer, text) for text in pair] for pair in pairs])
    [file] = (tmp_path / "out").rglob("*minimal_pairs*.jsonl")
    found = np.array([json.loads(line)["replies"] for line in file.read_text().splitlines()])
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    with adapted.disable_adapter():
        plain = np.array([[log_probability(adapted, hf_tokenizer, text) for text in pair] for pair in pairs])
    assert np.abs(plain - wanted).max() > 0.5, "the adapter changes the model"
    right = float((wanted[:, 0] > wanted[:, 1]).mean())
    assert json.loads(result.stdout.splitlines()[-1])[0]["results"]["minimal_pairs"]["acc,none"] == pytest.approx(right)
