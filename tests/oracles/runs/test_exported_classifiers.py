"""A classifier that is fine-tuned with its family's own head loads as the class of transformers, head included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from firth.model.config import ModelConfig, decoder_config, encoder_config, encoder_decoder_config
from firth.model.model import LM
from firth.model.presets import bert
from firth.objectives.classification import Classification
from firth.pretrained.load_save import load_model, save_model
from firth.runs.import_export import export_model
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.train import train
from firth.types import DataStats, UserError

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")

TEXTS = [f"the {word} fox number {i}" for i in range(20) for word in ("good", "bad")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (
            lambda v: bert(hidden_size=32, num_layers=1, num_heads=2, vocab_size=v, max_positions=32),
            "BertForSequenceClassification",
        ),
        (lambda v: encoder_config(v, 32, 1, num_heads=2, max_positions=32), "ModernBertForSequenceClassification"),
    ],
)
def test_finetuned_model_loads_as_transformers_class(make, name: str, tmp_path: Path) -> None:
    tokenizer = train(TEXTS, "wordpiece", 220)
    torch.manual_seed(0)
    config: ModelConfig = make(tokenizer.vocab.size)
    save_model(LM(config, {}), tokenizer, tmp_path / "start")
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"text": t, "label": t.split()[1]}) + "\n" for t in TEXTS), "utf-8"
    )
    settings = [f"init_from={tmp_path / 'start'}", f"data={tmp_path / 'mine.jsonl'}", "objective.head=family",
            "examples.max_length=24", "max_steps=4", "batch.size=8", "evaluation.max_examples=8"]  # fmt: skip
    done = run(load("classification", settings), tmp_path / "run", log=lambda _: None)
    lines: list[str] = []
    export_model(done.directory, tmp_path / "out", form="hf", dtype="", shard="", log=lines.append)
    assert name in lines[0]
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and theirs.config.id2label == {0: "bad", 1: "good"}
    ids = torch.tensor([[tokenizer.vocab.cls, *tokenizer.encode("the good fox").tolist(), tokenizer.vocab.sep]])
    ours = load_model(done.model)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids).logits
        found = ours.heads["classes"](ours({"tokens": ids})[:, 0])
    assert (found - expected).abs().max() < 1e-5


def test_family_with_another_pooling_is_rejected() -> None:
    """A model without a family keeps its linear head."""
    family = Classification(class_names=("a", "b"), head="family")
    decoder = decoder_config(64, 32, 1, num_heads=2)  # NanoChat has no class of texts
    for config in (encoder_decoder_config(64, 32, 1, num_heads=2), decoder):
        with pytest.raises(UserError, match=r"set objective\.head=linear"):
            family.configure(DataStats, config)
    Classification(class_names=("a", "b")).configure(DataStats, decoder)
    with pytest.raises(UserError, match="head"):
        load("classification", ["objective.head=pooled"])
