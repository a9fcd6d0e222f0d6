"""Text VAE: its ELBO, the decoder sees the source through z only, and posterior collapse."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from firth.data.collate import collate, pack
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.generate.scoring import scoring_mode
from firth.model.config import encoder_decoder_config
from firth.model.flops import num_parameters, stack_flops, work
from firth.model.forward_context import ForwardContext
from firth.model.model import LM
from firth.objectives.objective import vocabulary_flops
from firth.objectives.seq2seq import SpanCorruption
from firth.objectives.vae import VAE
from firth.pretrained.load_save import load_model
from firth.runs.compatibility import check_batching, check_pattern
from firth.runs.recipe import load
from firth.runs.run import run
from firth.training.step import step
from firth.types import Example, UserError
from tests.support.byte_tokenizer import ByteTokenizer

VOCAB = ByteTokenizer.vocab
CONFIG = encoder_decoder_config(VOCAB.size, 32, 1, num_heads=2, max_positions=32).with_fields(
    {"encoder.latent_size": 4, "init.zero_output": False}
)
LABEL_FIELDS = {"labels", "text"}


def build_examples(objective: VAE, count: int = 8) -> list[Example]:
    out = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        out.append(
            objective.build_example({"tokens": rng.integers(10, VOCAB.size, int(rng.integers(2, 9)))}, VOCAB, rng)
        )
    return out


def build_model(objective: VAE) -> LM:
    torch.manual_seed(0)
    model = LM(CONFIG, objective.heads(CONFIG))
    torch.nn.init.normal_(model.latent.posterior.weight, std=0.2)
    torch.nn.init.normal_(model.heads["lm"].weight, std=0.2)
    return model


def given(model: LM, latent: torch.Tensor) -> ForwardContext:
    return ForwardContext(encoder_output=model.latent_output(latent))


def test_parameter_count_and_flops_equal_torch() -> None:
    objective = VAE(latent_size=4)
    model = build_model(objective)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(CONFIG)
    batch = collate([row for row in build_examples(objective, 40) if len(row["labels"]) == 6], LABEL_FIELDS)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective.forward(model, batch)["hidden"].sum().backward()
    done = work(batch)
    assert objective.flops(model, batch) == stack_flops(CONFIG, done) + vocabulary_flops(model, batch["labels"])
    # Torch's plain kernel also computes what the causal mask hides.
    assert counter.get_total_flops() == stack_flops(CONFIG, replace(done, pairs=done.source_pairs))


def test_the_elbo_is_the_formula() -> None:
    objective = VAE(latent_size=4, kl_weight=0.3)
    model = build_model(objective).eval()
    rows = build_examples(objective)
    terms = {name: float(value) for name, value in step(model, objective, [collate(rows, LABEL_FIELDS)]).items()}
    nll = kl = 0.0
    with torch.no_grad():
        for row in rows:
            one = {name: torch.tensor(value)[None] for name, value in row.items()}
            mean, log_variance = model.posterior(one)
            q = Normal(mean, (log_variance / 2).exp())
            kl += float(kl_divergence(q, Normal(0.0, 1.0)).sum())
            states = model(one, given(model, mean + q.stddev * one["noise"]))
            nll -= float(
                model.heads["lm"](states)[0].log_softmax(-1)[torch.arange(len(row["labels"])), row["labels"]].sum()
            )
    tokens = sum(len(row["labels"]) for row in rows)
    assert terms["tokens"] == pytest.approx(nll / tokens, abs=1e-4)
    assert terms["divergence"] == pytest.approx(0.3 * kl / tokens, abs=1e-5)
    assert terms["kl"] == pytest.approx(kl / len(rows), abs=1e-4)
    assert terms["elbo"] == pytest.approx(-(nll + kl) / tokens, abs=1e-4)
    free = step(model, VAE(latent_size=4, free_bits=99.0), [collate(rows, LABEL_FIELDS)])
    assert float(free["divergence"]) == pytest.approx(99.0 * len(rows) / tokens)


def test_decoder_sees_the_source_through_z_only() -> None:
    objective = VAE(latent_size=4)
    model = build_model(objective).eval()
    one, two = (collate([row], LABEL_FIELDS) for row in build_examples(objective, 2))
    z = torch.randn(1, 4)
    target = {name: one[name] for name in ("tokens", "query_time", "key_time") if name in one}
    source = [{n: f for n, f in batch.items() if n.startswith("source_")} for batch in (one, two)]
    assert torch.equal(model(target | source[0], given(model, z)), model(target | source[1], given(model, z)))
    assert torch.equal(model(target, given(model, z)), model(target | source[0], given(model, z)))
    assert not torch.allclose(model(target | source[0]), model(target | source[1]), atol=1e-4)
    assert not torch.allclose(model(target, given(model, z)), model(target, given(model, -z)), atol=1e-3)


def test_no_later_token_leaks_into_an_earlier_one() -> None:
    objective = VAE(latent_size=4)
    model = build_model(objective).eval()
    batch = collate(build_examples(objective, 1), LABEL_FIELDS)
    changed = {name: field.clone() for name, field in batch.items()}
    changed["tokens"][0, -1] = 11 if int(batch["tokens"][0, -1]) != 11 else 12
    z = torch.randn(1, 4)
    one, two = model(batch, given(model, z)), model(changed, given(model, z))
    assert torch.equal(one[:, :-1], two[:, :-1]) and not torch.equal(one[:, -1], two[:, -1])


def test_word_dropout_applies_in_training_only() -> None:
    objective = VAE(latent_size=4, word_dropout=1.0)
    rows = build_examples(objective)
    model = build_model(objective)
    batch = collate(rows, LABEL_FIELDS)
    assert all((row["gaps"][1:] == VOCAB.mask).all() and row["gaps"][0] == VOCAB.pad for row in rows)
    inside = batch["tokens"].clone()
    inside[:, 1:] = 11
    trained = objective.forward(model.train(), batch | {"tokens": inside})["hidden"]
    assert torch.equal(trained, objective.forward(model, batch)["hidden"])
    assert not torch.equal(trained, objective.forward(model.eval(), batch)["hidden"])


def test_split_batches_have_the_same_gradient() -> None:
    objective = VAE(latent_size=4, kl_weight=0.5, word_dropout=0.3, free_bits=0.5)
    model, rows = build_model(objective), build_examples(objective)
    found = []
    for batches in ([rows], [rows[:3], rows[3:]]):
        model.zero_grad()
        step(model, objective, [collate(b, LABEL_FIELDS) for b in batches])
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match=r"cannot be packed: set batch\.pack_to_length=0"):
        pack(rows, 64, LABEL_FIELDS)
    with pytest.raises(UserError, match="a variational autoencoder reads one document a row"):
        check_batching(objective, CONFIG, pack=64, accumulate=1)


def test_ten_steps_lower_both_terms() -> None:
    objective = VAE(latent_size=4)
    model, batch = build_model(objective), collate(build_examples(objective), LABEL_FIELDS)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    found = []
    for _ in range(10):
        found.append(step(model, objective, [batch]))
        optimizer.step()
        optimizer.zero_grad()
    assert all(float(found[-1][term]) < float(found[0][term]) for term in objective.labels)


def test_kl_weight_is_a_function_of_the_step() -> None:
    objective = VAE(latent_size=4, word_dropout=0.5, kl_anneal_steps=8)
    rows = [objective.build_example({"tokens": np.arange(20, 30)}, VOCAB, np.random.default_rng(3)) for _ in range(2)]
    assert all(np.array_equal(rows[0][name], rows[1][name]) for name in rows[0])
    steps = [{"step": torch.tensor(step)} for step in (0, 2, 8, 100)]
    assert [objective.kl_weight_of(batch) for batch in (*steps, {})] == [0.0, 0.25, 1.0, 1.0, 1.0]


def test_a_collapse_is_reported() -> None:
    remark = VAE().metrics["kl"].remark
    assert remark is not None
    assert "has collapsed" in remark({"valid/kl": 0.01, "valid/active": 3.0})
    assert "has collapsed" in remark({"valid/kl": 3.0, "valid/active": 0.0})
    text = "The latent carries 3.2 nats per text, in 5 of its 32 units."
    assert remark({"valid/kl": 3.2, "valid/active": 5.0, "kl": 0.0}) == text


def test_texts_are_generated_from_a_latent() -> None:
    model = build_model(VAE(latent_size=4)).eval()
    engine = Engine(model, ByteTokenizer(), stops=[VOCAB.eos])
    ends = [np.append(ByteTokenizer().encode(text), VOCAB.eos) for text in ("one text", "and two")]
    latents = engine.posterior(ends)
    alone = model.posterior({"source_tokens": torch.tensor(ends[1])[None]})[0][0]
    torch.testing.assert_close(latents[1], alone, rtol=0, atol=1e-5)
    sampling = Sampling(temperature=0, max_new_tokens=6)
    decoded, generated = engine.decode(latents, sampling), engine.generate(ends, sampling)
    assert [one.text for one in decoded] == [one.text for one in generated]


def test_a_run_samples_its_prior_and_reports_the_latent(tmp_path: Path) -> None:
    for number in range(24):
        words = [f"word{(number * i) % 17}" for i in range(1, 60)]
        (tmp_path / f"{number}.txt").write_text(" ".join(words))
    small = [
        "hidden_size=32",
        "num_heads=2",
        "num_layers=1",
        "encoder.num_layers=1",
        "head_dim=0",
        "num_kv_heads=0",
        "intermediate_size=48",
    ]
    settings = [
        "tokenizer.vocab_size=400",
        "max_steps=2",
        "batch.size=4",
        "evaluation.every=0",
        "evaluation.max_examples=8",
    ]
    recipe = load("vae", [*(f"model.{one}" for one in small), *settings, f"data.path={tmp_path}"])
    done = run(recipe, tmp_path / "run", log=lambda _: None)
    assert done.metrics["valid/elbo"] == pytest.approx(
        -done.metrics["valid/loss/tokens"] - done.metrics["valid/loss/divergence"], abs=1e-4
    ), "held-out text is scored with the full KL weight, though training has just started to anneal it"
    [note] = json.loads((done.directory / "done.json").read_text())["remarks"]
    assert "latent carries" in note and note in html.unescape((done.directory / "report.html").read_text())
    rows = [json.loads(line) for line in (done.directory / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows if row["step"] == 2] == list(recipe.sample_prompts)
    assert all(row["text"].count("\n") >= 4 for row in rows)
    with pytest.raises(UserError, match="only bounds the likelihood"):
        scoring_mode(load_model(done.model).config)


def test_incompatible_models_and_objectives_are_rejected() -> None:
    with pytest.raises(UserError, match="encodes a text into a latent vector, which an encoder-decoder cannot"):
        check_pattern(VAE(latent_size=4), CONFIG.with_fields({"encoder.latent_size": 0}))
    with pytest.raises(UserError, match="which a variational autoencoder cannot"):
        check_pattern(SpanCorruption(), CONFIG)
    with pytest.raises(UserError, match=r"objective.latent_size=7 and model.encoder.latent_size=4 differ"):
        check_pattern(VAE(latent_size=7), CONFIG)
    with pytest.raises(UserError, match="needs an encoder and a decoder"):
        CONFIG.with_fields({"encoder.num_layers": 0})
    with pytest.raises(UserError, match=r"objective.word_dropout=1.5 should be"):
        VAE(latent_size=4, word_dropout=1.5)
    with pytest.raises(UserError, match="make them equal"):
        load("vae", ["objective.latent_size=8"])
