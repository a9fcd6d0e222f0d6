"""Parity of Marian with transformers: loss, logits, generation; and unsupported configs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.data.attention_fields import seq2seq
from firth.data.collate import collate
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.flops import num_parameters
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.positions import sinusoidal
from firth.objectives.sft import Seq2SeqSFT
from firth.pretrained.load_save import load_model, save_model
from firth.training.step import step
from firth.types import UserError
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.hf_families import MARIAN, MARIAN_IDS, random_hf_model
from tests.support.models import perturbed_model

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")


def test_the_loss_matches_transformers(tmp_path: Path) -> None:
    """Sources and targets of different lengths; transformers shifts the labels itself."""
    theirs = random_hf_model("marian")
    theirs.save_pretrained(tmp_path)
    model, rng = load_model(tmp_path), np.random.default_rng(0)
    pairs = [(rng.integers(3, 61, n), np.append(rng.integers(3, 61, m), 2)) for n, m in ((9, 12), (15, 4), (3, 8))]
    objective = Seq2SeqSFT()
    examples = [seq2seq(source, target, start=0) for source, target in pairs]
    ours = float(step(model, objective, [collate(examples)])["tokens"])
    width = [max(map(len, side)) for side in zip(*pairs, strict=True)]
    sources, labels = (
        torch.tensor([np.pad(row, (0, n - len(row)), constant_values=fill).tolist() for row in rows])
        for rows, n, fill in zip(zip(*pairs, strict=True), width, (0, -100), strict=True)
    )
    outputs = theirs(input_ids=sources, attention_mask=(sources != 0).long(), labels=labels)
    assert ours == pytest.approx(outputs.loss.item(), abs=1e-5)


def test_logit_bias_and_embedding_scale_are_read(tmp_path: Path) -> None:
    theirs = random_hf_model("marian")
    theirs.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config.embedding.scale == 32**0.5
    assert model.config.position.type == "marian" and model.places is None
    assert model.heads["lm"].weight is model.tokens.weight
    assert torch.equal(model.heads["lm"].bias, theirs.final_logits_bias[0])
    places = theirs.model.encoder.embed_positions.weight
    torch.testing.assert_close(sinusoidal(torch.arange(40), 32, interleaved=False), places, rtol=1e-5, atol=1e-5)


def test_generation_matches_transformers(tmp_path: Path) -> None:
    model = perturbed_model(MARIAN)
    save_model(model, None, tmp_path)
    theirs = transformers.MarianMTModel.from_pretrained(tmp_path).eval()
    source = torch.randint(3, 61, (1, 11), generator=torch.Generator().manual_seed(0))
    out = theirs.generate(
        source, attention_mask=torch.ones_like(source), max_new_tokens=12, do_sample=False, num_beams=1
    )
    [ours] = Engine(model, ByteTokenizer(), stops=()).generate(
        [source[0].numpy()], Sampling(max_new_tokens=12, temperature=0)
    )
    assert out[0, 1:].tolist() == ours.tokens.tolist()


def test_a_headless_model_is_read(tmp_path: Path) -> None:
    theirs = random_hf_model("marian")
    theirs.model.save_pretrained(tmp_path)
    assert not len(load_model(tmp_path).heads)


def test_the_parameter_count_is_exact() -> None:
    model = LM(MARIAN, {"lm": LMHead(MARIAN)})
    assert sum(p.numel() for p in model.parameters()) == num_parameters(MARIAN)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"normalize_before": True}, "normalize_before=True"),
        ({"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings=False"),
        ({"decoder_vocab_size": 70}, "a different vocabulary in its decoder"),
    ],
)
def test_unsupported_marian_configs_are_rejected(field: dict[str, object], message: str, tmp_path: Path) -> None:
    random_hf_model("marian").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert {name: config[name] for name in MARIAN_IDS} == MARIAN_IDS
    (tmp_path / "config.json").write_text(json.dumps(config | field), "utf-8")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)
