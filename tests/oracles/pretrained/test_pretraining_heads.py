"""Parity with transformers' pretraining classes: BERT (MLM + NSP), ALBERT (MLM + SOP), ELECTRA (both models)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from firth.data.collate import collate, counted_fields
from firth.model.config import ModelConfig
from firth.model.config_groups import EmbeddingConfig, LMHeadConfig, NormConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.replaced_tokens import RTD
from firth.objectives.sentence_pairs import NSP, SOP
from firth.pretrained.load_save import load_model, save_model
from firth.tokenizer.vocab import Vocab
from firth.training.step import step
from firth.types import IGNORE, NEVER, Batch

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()

VOCAB = Vocab(size=60, roles={"pad": 0, "cls": 2, "sep": 3, "mask": 4}, special=np.arange(60) < 5)
BERT = ModelConfig(
    vocab_size=60, hidden_size=32, num_layers=3, num_heads=4, max_positions=64, intermediate_size=48, causal=False,
    norm=NormConfig(placement="post", eps=1e-12, embedding=True), embedding=EmbeddingConfig(type_vocab_size=2),
    activation="gelu", lm_head=LMHeadConfig("transform", bias=True),
)  # fmt: skip
ALBERT = BERT.with_fields({"embedding.size": 12, "num_layer_groups": 1, "activation": "gelu_tanh"})
ELECTRA = BERT.with_fields({"embedding.size": 12})


def built(objective: Objective, config: ModelConfig) -> LM:
    """A model whose parameters are all random, so that swapped tensors are detected."""
    torch.manual_seed(0)
    model = LM(config, objective.heads(config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


def batch_of(objective: Objective) -> Batch:
    rng, examples = np.random.default_rng(0), []
    for _ in range(6):
        first, second, other = (rng.integers(5, 60, rng.integers(5, 15)) for _ in range(3))
        examples.append(objective.build_example({"first": first, "second": second, "other": other}, VOCAB, rng))
    return collate(examples, {*counted_fields(objective).values()})


def inputs(batch: Batch) -> dict[str, torch.Tensor]:
    real = batch["key_time"] < NEVER
    return {"input_ids": batch["tokens"], "token_type_ids": batch["token_type_ids"], "attention_mask": real.long()}


def loaded(model: LM, directory: Path, kind: str) -> torch.nn.Module:
    """Load a saved model with transformers; only heads of firth's own may be unexpected."""
    assert save_model(model, None, directory) == f"transformers loads it as {kind}"
    assert json.loads((directory / "config.json").read_text())["architectures"] == [kind]
    theirs, info = getattr(transformers, kind).from_pretrained(directory, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    assert all(name.startswith("heads.") for name in info["unexpected_keys"])
    return theirs.eval()


CASES = {
    "bert": (NSP() + MLM(), BERT, "BertForPreTraining", "next", ("next_sentence_label", "seq_relationship_logits")),
    "albert": (SOP() + MLM(), ALBERT, "AlbertForPreTraining", "order", ("sentence_order_label", "sop_logits")),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_mlm_and_pair_losses_match_transformers(name: str, tmp_path: Path) -> None:
    objective, config, kind, term, (label, logits) = CASES[name]
    model, batch = built(objective, config), batch_of(objective)
    theirs = loaded(model, tmp_path, kind)
    hf = theirs(**inputs(batch), labels=batch["labels"], **{label: batch[term][:, 0]})
    hidden, real = model(batch), batch["key_time"] < NEVER
    assert (model.heads["lm"](hidden) - hf.prediction_logits)[real].abs().max() < 1e-4
    assert (model.heads[term](hidden[:, 0]) - hf[logits]).abs().max() < 1e-4
    terms = objective.loss(model, objective.forward(model, batch), batch)
    pairs, tokens = len(batch["tokens"]), int((batch["labels"] != IGNORE).sum())
    assert tokens > 10 and hf.prediction_logits[real].std() > 0.05
    assert abs(terms["tokens"] / tokens + terms[term] / pairs - hf.loss) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_a_training_step_matches_transformers(name: str, tmp_path: Path) -> None:
    """Losses and gradients of a training step."""
    objective, config, kind, term, (label, _) = CASES[name]
    model, batch = built(objective, config), batch_of(objective)
    theirs = loaded(model, tmp_path, kind)
    found = step(model, objective, [batch])
    hf = theirs(**inputs(batch), labels=batch["labels"], **{label: batch[term][:, 0]})
    hf.loss.backward()
    assert abs(found["tokens"] + found[term] - hf.loss) < 1e-5
    body = theirs.base_model
    torch.testing.assert_close(
        model.tokens.weight.grad, body.embeddings.word_embeddings.weight.grad, rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(model.heads[term][0].weight.grad, pooler(body).weight.grad, rtol=1e-3, atol=1e-6)


def pooler(body: torch.nn.Module) -> torch.nn.Module:
    """BERT's is in a module of its own, ALBERT's is not."""
    return next(
        module
        for name, module in body.named_modules()
        if name in ("pooler.dense", "pooler") and len(list(module.children())) == 0
    )


@pytest.mark.parametrize("config", [ELECTRA, BERT], ids=["small embeddings", "full embeddings"])
@torch.no_grad()
def test_both_electra_models_match_transformers(config: ModelConfig, tmp_path: Path) -> None:
    objective = SOP() + RTD(mlm_probability=0.3, generator_size=0.5)
    model, batch = built(objective, config), batch_of(objective)
    outputs = objective.forward(model, batch)
    terms = objective.loss(model, outputs, batch)
    real, labeled = batch["key_time"] < NEVER, batch["labels"] != IGNORE
    replaced = outputs["shown"] != batch["real"]

    discriminator = loaded(model, tmp_path / "discriminator", "ElectraForPreTraining")
    fields = inputs(batch | {"tokens": outputs["shown"]})
    hf = discriminator(**fields, labels=(replaced & real).long())
    assert (model.heads["replaced"](outputs["hidden"])[..., 0] - hf.logits)[real].abs().max() < 1e-4
    assert abs(terms["replaced"] / 50 / real.sum() - hf.loss) < 1e-5
    assert 0.05 < float((replaced & real).sum() / real.sum()) < 0.4 and hf.logits[real].std() > 0.05

    generator = loaded(model.heads["generator"], tmp_path / "generator", "ElectraForMaskedLM")
    hf = generator(**inputs(batch), labels=batch["labels"])
    assert (outputs["logits"] - hf.logits[labeled]).abs().max() < 1e-4
    assert abs(terms["generator"] / labeled.sum() - hf.loss) < 1e-5
    ours, theirs = (m.heads["generator"].tokens.weight for m in (model, load_model(tmp_path / "discriminator")))
    assert torch.equal(ours, theirs)


def theirs(kind: str) -> torch.nn.Module:
    t = transformers
    usual = {
        "vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 50,
        "max_position_embeddings": 64,
    }  # fmt: skip
    configs = {
        "Bert": lambda: t.BertConfig(**usual),
        "Albert": lambda: t.AlbertConfig(**usual, embedding_size=12, num_hidden_groups=2),
        "Electra": lambda: t.ElectraConfig(**usual, embedding_size=12),
    }
    torch.manual_seed(3)
    model = getattr(t, kind)(configs[kind.split("For")[0]]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("BertForPreTraining", {"lm", "next"}),
        ("BertForNextSentencePrediction", {"next"}),
        ("AlbertForPreTraining", {"lm", "order"}),
        ("ElectraForPreTraining", {"replaced"}),
        ("ElectraForMaskedLM", {"lm"}),
        ("AlbertForMaskedLM", {"lm"}),
    ],
)
@torch.no_grad()
def test_pretraining_classes_load_with_their_heads(kind: str, heads: set[str], tmp_path: Path) -> None:
    model = theirs(kind)
    model.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert set(ours.heads) == heads
    batch = batch_of(NSP() + MLM())
    hf, hidden, real = model(**inputs(batch)), ours(batch), batch["key_time"] < NEVER
    outputs = {"lm": ("prediction_logits", "logits"), "next": ("seq_relationship_logits", "logits"),
               "order": ("sop_logits",), "replaced": ("logits",)}  # fmt: skip
    for head in heads:
        wanted = next(hf[name] for name in outputs[head] if name in hf)
        if head in ("next", "order"):
            assert (ours.heads[head](hidden[:, 0]) - wanted).abs().max() < 1e-4
        else:
            assert (ours.heads[head](hidden).squeeze(-1) - wanted)[real].abs().max() < 1e-4


def test_models_with_old_head_names_still_load(tmp_path: Path) -> None:
    model = built(NSP() + MLM(), BERT)
    save_model(model, None, tmp_path)
    old = {"bert.pooler.dense": "heads.next.0", "cls.seq_relationship": "heads.next.2"}
    stored = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        stem, _, last = name.rpartition(".")
        stored[f"{old.get(stem, stem)}.{last}"] = tensor
    save_file(stored, tmp_path / "model.safetensors")
    facts = json.loads((tmp_path / "firth.json").read_text())
    del facts["files"], facts["digest"]  # such a model has no content hashes
    (tmp_path / "firth.json").write_text(json.dumps(facts))
    again = load_model(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_other_heads_are_saved_under_firth_names(tmp_path: Path) -> None:
    model = LM(BERT, {"lm": LMHead(BERT), "next": torch.nn.Linear(32, 2)})
    assert save_model(model, None, tmp_path).endswith("BertForMaskedLM")
    assert set(load_model(tmp_path).heads) == {"lm", "next"}
