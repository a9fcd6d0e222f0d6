"""The text VAE: its ELBO written out, all that the decoder knows is z, and what happens when that is nothing."""

from __future__ import annotations

import html
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bytecoder import ByteCoder
from torch.distributions import Normal, kl_divergence
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from firth.data.collate import collate, pack
from firth.evaluate.text_perplexity import scoring_mode
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.config import encoder_decoder_config
from firth.model.flops import stack_flops, work
from firth.model.model import LM
from firth.objectives.span_corruption import SpanCorruption
from firth.objectives.vae import VAE
from firth.pretrained.load_save import load_model
from firth.runs.compatibility import check_batching, check_pattern
from firth.runs.recipe import load
from firth.runs.run import run
from firth.train.step import step
from firth.types import Example, UserError

VOCAB = ByteCoder.vocab
SHAPE = replace(
    encoder_decoder_config(VOCAB.size, 32, 1, num_heads=2, max_positions=32), latent_size=4, zero_init=False
)
ASKED = {"labels", "text"}


def shown(objective: VAE, count: int = 8) -> list[Example]:
    out = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        out.append(
            objective.build_example({"tokens": rng.integers(10, VOCAB.size, int(rng.integers(2, 9)))}, VOCAB, rng)
        )
    return out


def built(objective: VAE) -> LM:
    torch.manual_seed(0)
    model = LM(SHAPE, objective.heads(SHAPE))
    torch.nn.init.normal_(model.latent.posterior.weight, std=0.2)
    torch.nn.init.normal_(model.heads["lm"].weight, std=0.2)
    return model


def test_parameters_are_exact_and_flops_those_of_torch() -> None:
    objective = VAE(latent_size=4)
    model = built(objective)
    assert sum(p.numel() for p in model.parameters()) == SHAPE.num_parameters()
    batch = collate([row for row in shown(objective, 40) if len(row["labels"]) == 6], ASKED)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective.forward(model, batch)["hidden"].sum().backward()
    done = work(batch)
    assert objective.forward_flops(model, batch) == stack_flops(SHAPE, done)
    # Torch's plain kernel computes what a causal row hides, too.
    assert counter.get_total_flops() == stack_flops(SHAPE, replace(done, pairs=done.source_pairs))


def test_the_elbo_is_the_formula() -> None:
    objective = VAE(latent_size=4, kl_weight=0.3)
    model = built(objective).eval()
    rows = shown(objective)
    terms = {name: float(value) for name, value in step(model, objective, [collate(rows, ASKED)]).items()}
    nll = kl = 0.0
    with torch.no_grad():
        for row in rows:
            one = {name: torch.tensor(value)[None] for name, value in row.items()}
            mean, log_variance = model.posterior(one)
            q = Normal(mean, (log_variance / 2).exp())
            kl += float(kl_divergence(q, Normal(0.0, 1.0)).sum())
            states = model(one, latent=mean + q.stddev * one["noise"])
            nll -= float(
                model.heads["lm"](states)[0].log_softmax(-1)[torch.arange(len(row["labels"])), row["labels"]].sum()
            )
    tokens = sum(len(row["labels"]) for row in rows)
    assert terms["tokens"] == pytest.approx(nll / tokens, abs=1e-4)
    assert terms["divergence"] == pytest.approx(0.3 * kl / tokens, abs=1e-5)
    assert terms["kl"] == pytest.approx(kl / len(rows), abs=1e-4)
    assert terms["elbo"] == pytest.approx(-(nll + kl) / tokens, abs=1e-4)
    free = step(model, VAE(latent_size=4, free_bits=99.0), [collate(rows, ASKED)])
    assert float(free["divergence"]) == pytest.approx(99.0 * len(rows) / tokens)


def test_the_decoder_knows_the_source_through_z_alone() -> None:
    objective = VAE(latent_size=4)
    model = built(objective).eval()
    one, two = (collate([row], ASKED) for row in shown(objective, 2))
    z = torch.randn(1, 4)
    target = {name: one[name] for name in ("tokens", "query_time", "key_time") if name in one}
    source = [{n: f for n, f in batch.items() if n.startswith("source_")} for batch in (one, two)]
    assert torch.equal(model(target | source[0], latent=z), model(target | source[1], latent=z))
    assert torch.equal(model(target, latent=z), model(target | source[0], latent=z))
    assert not torch.allclose(model(target | source[0]), model(target | source[1]), atol=1e-4)
    assert not torch.allclose(model(target, latent=z), model(target, latent=-z), atol=1e-3)


def test_no_later_token_leaks_into_an_earlier_one() -> None:
    objective = VAE(latent_size=4)
    model = built(objective).eval()
    batch = collate(shown(objective, 1), ASKED)
    changed = {name: field.clone() for name, field in batch.items()}
    changed["tokens"][0, -1] = 11 if int(batch["tokens"][0, -1]) != 11 else 12
    z = torch.randn(1, 4)
    one, two = model(batch, latent=z), model(changed, latent=z)
    assert torch.equal(one[:, :-1], two[:, :-1]) and not torch.equal(one[:, -1], two[:, -1])


def test_hidden_words_are_hidden_in_training_alone() -> None:
    objective = VAE(latent_size=4, word_dropout=1.0)
    rows = shown(objective)
    model = built(objective)
    batch = collate(rows, ASKED)
    assert all((row["gaps"][1:] == VOCAB.mask).all() and row["gaps"][0] == VOCAB.pad for row in rows)
    inside = batch["tokens"].clone()
    inside[:, 1:] = 11
    trained = objective.forward(model.train(), batch | {"tokens": inside})["hidden"]
    assert torch.equal(trained, objective.forward(model, batch)["hidden"])
    assert not torch.equal(trained, objective.forward(model.eval(), batch)["hidden"])


def test_a_split_batch_has_the_gradient_of_the_whole_and_packing_is_refused() -> None:
    objective = VAE(latent_size=4, kl_weight=0.5, word_dropout=0.3, free_bits=0.5)
    model, rows = built(objective), shown(objective)
    found = []
    for batches in ([rows], [rows[:3], rows[3:]]):
        model.zero_grad()
        step(model, objective, [collate(b, ASKED) for b in batches])
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="cannot be packed: set batch.pack_to_length=0"):
        pack(rows, 64, ASKED)
    with pytest.raises(UserError, match="a variational autoencoder reads one document a row"):
        check_batching(objective, SHAPE, pack=64, accumulate=1)


def test_ten_steps_on_one_batch_lower_both_terms() -> None:
    objective = VAE(latent_size=4)
    model, batch = built(objective), collate(shown(objective), ASKED)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    found = []
    for _ in range(10):
        found.append(step(model, objective, [batch]))
        optimizer.step()
        optimizer.zero_grad()
    assert all(float(found[-1][term]) < float(found[0][term]) for term in objective.labels)


def test_a_view_is_pure_and_the_weight_is_a_function_of_the_step() -> None:
    objective = VAE(latent_size=4, word_dropout=0.5, kl_anneal_steps=8)
    rows = [objective.build_example({"tokens": np.arange(20, 30)}, VOCAB, np.random.default_rng(3)) for _ in range(2)]
    assert all(np.array_equal(rows[0][name], rows[1][name]) for name in rows[0])
    assert [objective.at_step(step).kl_weight for step in (0, 2, 8, 100)] == [0.0, 0.25, 1.0, 1.0]


def test_a_collapse_is_told() -> None:
    assert "has collapsed" in VAE().notes({"valid/kl": 0.01, "valid/active": 3.0})[0]
    assert "has collapsed" in VAE().notes({"valid/kl": 3.0, "valid/active": 0.0})[0]
    assert VAE().notes({"valid/kl": 3.2, "valid/active": 5.0, "kl": 0.0}) == [
        "The latent carries 3.2 nats of a text, in 5 of its 32 units."
    ]


def test_texts_are_written_from_a_latent() -> None:
    model = built(VAE(latent_size=4)).eval()
    engine = Engine(model, ByteCoder(), stops=[VOCAB.eos])
    ends = [np.append(ByteCoder().encode(text), VOCAB.eos) for text in ("one text", "and two")]
    latents = engine.posterior(ends)
    alone = model.posterior({"source_tokens": torch.tensor(ends[1])[None]})[0][0]
    torch.testing.assert_close(latents[1], alone, rtol=0, atol=1e-5)
    sampling = Sampling(temperature=0, max_new_tokens=6)
    told, read = engine.decode(latents, sampling), engine.generate(ends, sampling)
    assert [one.text for one in told] == [one.text for one in read]


def test_a_run_draws_from_its_prior_and_its_report_says_what_the_latent_carries(tmp_path: Path) -> None:
    for number in range(24):
        words = [f"word{(number * i) % 17}" for i in range(1, 60)]
        (tmp_path / f"{number}.txt").write_text(" ".join(words))
    small = ["width=32", "heads=2", "depth=1", "encoder=1", "head_width=0", "kv_heads=0", "hidden=48"]
    settings = [
        "tokenizer.vocab_size=400",
        "max_steps=2",
        "batch.size=4",
        "evaluation.every=0",
        "evaluation.max_examples=8",
    ]
    recipe = load("vae", [*(f"shape.{one}" for one in small), *settings, f"data.path={tmp_path}"])
    done = run(recipe, tmp_path / "run", log=lambda _: None)
    assert done.metrics["valid/elbo"] == pytest.approx(
        -done.metrics["valid/loss/tokens"] - done.metrics["valid/loss/divergence"], abs=1e-4
    ), "held-out text is scored with the whole KL, though training has hardly begun to charge it"
    [remark] = json.loads((done.directory / "done.json").read_text())["remarks"]
    assert "latent carries" in remark and remark in html.unescape((done.directory / "report.html").read_text())
    rows = [json.loads(line) for line in (done.directory / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows if row["step"] == 2] == list(recipe.sample_prompts)
    assert all(row["text"].count("\n") >= 4 for row in rows)
    with pytest.raises(UserError, match="only bounds the likelihood"):
        scoring_mode(load_model(done.model).config)


def test_shapes_and_objectives_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="squeezes a text through a latent, which an encoder-decoder cannot"):
        check_pattern(VAE(latent_size=4), replace(SHAPE, latent_size=0))
    with pytest.raises(UserError, match="which a variational autoencoder cannot"):
        check_pattern(SpanCorruption(), SHAPE)
    with pytest.raises(UserError, match=r"objective.latent_size=7 numbers and the shape's model.latent_size=4"):
        check_pattern(VAE(latent_size=7), SHAPE)
    with pytest.raises(UserError, match="needs an encoder and a decoder"):
        replace(SHAPE, num_encoder_layers=0)
    with pytest.raises(UserError, match=r"objective.word_dropout=1.5 must be"):
        VAE(latent_size=4, word_dropout=1.5)
    with pytest.raises(UserError, match="make them equal"):
        load("vae", ["objective.latent_size=8"])
