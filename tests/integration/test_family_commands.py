"""Every model family has commands that support it (fill, decode, evaluate); the others name that command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from firth.cli import app
from firth.generate.decoding_batch import rectangle
from firth.generate.fill import InfillPrompt, fill_masks, fill_spans, fill_two_way, split_gaps
from firth.generate.sampling import Sampling
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.presets import bart as bart_shape
from firth.pretrained.load_save import save_model
from firth.runs.inference import fill_text, open_engine, open_run
from firth.runs.loaded_model import encode_prompt, open_model
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.train import train
from firth.types import UserError

SENTENCES = [f"The {a} {b} the boat {c}." for a in ("otter", "baker", "pilot", "clerk") for b in ("paints", "sells", "hides")
             for c in ("at dawn", "in Leeds", "after supper", "by the mill", "with care")]  # fmt: skip
BODY = [
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=1",
    "model.intermediate_size=64",
    "model.max_positions=64",
]
RUNS = {
    "t5": [*BODY, "model.encoder.num_layers=1", "examples.max_length=32"],
    "bart": [*BODY, "model.encoder.num_layers=1", "examples.max_length=32"],
    "vae": [
        *BODY,
        "model.encoder.num_layers=1",
        "examples.max_length=32",
        "objective.latent_size=4",
        "model.encoder.latent_size=4",
    ],
    "elmo": ["model.hidden_size=32", "model.embedding.characters.num_filters=64", "examples.max_length=32"],
    "electra": [*BODY, "model.embedding.size=16", "examples.max_length=32", "objective.mlm_probability=0.4"],
    "word2vec": ["model.hidden_size=32", "examples.max_length=64"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps of every family."""
    place = tmp_path_factory.mktemp("families")
    (place / "text.txt").write_text("\n".join(SENTENCES) + "\n")
    (place / "held.txt").write_text("\n".join(SENTENCES[::7]) + "\n")
    train(SENTENCES, "byte-bpe", 340, num_sentinels=6).save(place / "tokenizer")
    for name, settings in RUNS.items():
        shared = [
            f"data.path={place / 'text.txt'}", f"data.validation_path={place / 'held.txt'}", "data.corpus=", "data.split_by=line",
            f"tokenizer.path={place / 'tokenizer'}", "max_steps=2", "batch.size=8", "batch.pack_to_length=0", "evaluation.every=0",
            "precision=fp32", "init_head_from_frequencies=false",
        ]  # fmt: skip
        run(load(name, [*shared, *settings]), place / name, log=lambda _: None)
    return place


def firth(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, list(arguments))
    if code:
        assert isinstance(done.exception, UserError)
        return str(done.exception)
    assert done.exit_code == 0, done.output
    return done.output


# Filling masks


def test_t5_fills_each_mask_with_a_span(runs: Path) -> None:
    lines = firth("fill", str(runs / "t5"), "The <mask> sells the boat <mask> the mill.", "--top", "3").splitlines()
    assert len(lines) == 2
    opened = open_run(runs / "t5")
    pieces = split_gaps(opened.tokenizer, "The <mask> sells the boat <mask> the mill.", "<mask>")
    assert opened.objective is not None
    shown = opened.objective.hide(pieces, opened.tokenizer.vocab)
    assert shown is not None
    prompt = shown["tokens"]
    first, second = (opened.tokenizer.id(f"<extra_id_{i}>") for i in (0, 1))
    assert np.isin(prompt, [first, second]).sum() == 2 and prompt[-1] == opened.tokenizer.vocab.eos
    assert "mask" not in opened.tokenizer.vocab.roles or opened.tokenizer.vocab.mask not in prompt


def test_span_probability_is_that_of_its_tokens(runs: Path) -> None:
    """The span and the sentinel after it, given the sentinel before it."""
    opened = open_run(runs / "t5")
    vocab = opened.tokenizer.vocab
    marks = vocab.sentinels[:2]
    with torch.no_grad():  # a model that writes its marks
        opened.model.heads["lm"].weight[marks] *= 30
    source = np.concatenate((opened.tokenizer.encode("The"), marks[:1], [vocab.eos]))
    [candidates] = fill_spans(opened.engine, InfillPrompt(source, marks), k=4)
    assert candidates and [c.probability for c in candidates] == sorted(
        (c.probability for c in candidates), reverse=True
    )
    for one in candidates:
        tokens = opened.tokenizer.encode(one.piece)
        if opened.tokenizer.decode(tokens) == one.piece and len(tokens) == 0:
            whole = opened.engine.score([source], [marks])[0] - opened.engine.score([source], [marks[:1]])[0]
            assert one.probability == pytest.approx(np.exp(whole), rel=1e-4)
            break
    else:
        pytest.fail("no empty span among the candidates")


def test_bart_rewrites_the_text(runs: Path) -> None:
    opened = open_run(runs / "bart")
    text = "The <mask> sells the boat."
    pieces = split_gaps(opened.tokenizer, text, "<mask>")
    source = np.concatenate((pieces[0], [opened.tokenizer.vocab.mask], pieces[1], [opened.tokenizer.vocab.eos]))
    [expected] = opened.engine.generate([source], Sampling(temperature=0, max_new_tokens=2 * len(source) + 12))
    assert fill_text(runs / "bart", text, 5) == expected.text


@pytest.mark.parametrize("name", ["t5", "bart", "electra"])
def test_model_directory_fills_like_its_run(runs: Path, name: str) -> None:
    """firth.json names the objective where the tokenizer has both sentinels and a mask."""
    text = "The <mask> sells the boat."
    assert fill_text(runs / name / "model", text, 2) == fill_text(runs / name, text, 2)


def test_transformers_bart_with_sentinels_fills_as_bart(runs: Path, tmp_path: Path) -> None:
    """Without metadata the model config decides: BART's answers start with eos."""
    tokenizer = open_run(runs / "bart").tokenizer
    config = bart_shape(tokenizer.vocab.size, 32, 1, 2, max_positions=64)
    save_model(LM(config, {"lm": LMHead(config)}), tokenizer, tmp_path)
    (tmp_path / "firth.json").unlink()
    text = "The <mask> sells the boat."
    pieces = split_gaps(tokenizer, text, "<mask>")
    source = np.concatenate((pieces[0], [tokenizer.vocab.mask], pieces[1], [tokenizer.vocab.eos]))
    [expected] = open_model(tmp_path).engine.generate(
        [source], Sampling(temperature=0, max_new_tokens=2 * len(source) + 12)
    )
    assert fill_text(tmp_path, text, 5) == expected.text


def test_elmo_fills_from_both_directions(runs: Path) -> None:
    """The product of the forward model's probability given the left and the backward model's given the right."""
    opened = open_model(runs / "elmo")
    pieces = split_gaps(opened.tokenizer, "The otter <mask> the boat.", "<mask>")
    [found] = fill_two_way(opened.engine, pieces, 3)
    row = np.concatenate(([opened.tokenizer.vocab.bos], pieces[0], [opened.tokenizer.vocab.eos], pieces[1]))
    at = 1 + len(pieces[0])
    with torch.no_grad():
        ahead, back = opened.model(rectangle([row], torch.device("cpu")))[0].chunk(2, -1)
        head = opened.model.heads["lm"]
        total = head(ahead[at - 1]).log_softmax(-1) + head(back[at + 1]).log_softmax(-1)
    ordinary = torch.as_tensor(opened.tokenizer.vocab.ordinary)
    share = total[ordinary].softmax(-1)
    best = share.topk(3)
    assert [c.token for c in found] == ordinary[best.indices].tolist()
    np.testing.assert_allclose([c.probability for c in found], best.values.numpy(), rtol=1e-4)
    assert len(firth("fill", str(runs / "elmo"), "<mask> otter <mask> the boat <mask>").splitlines()) == 3


def test_electra_fills_with_its_generator(runs: Path) -> None:
    opened = open_model(runs / "electra")
    own = opened.tokenizer.token(opened.tokenizer.vocab.mask)
    [gap] = fill_masks(opened.model.heads["generator"], opened.tokenizer, f"The otter {own} the boat.", 1)
    assert f"{gap[0].probability:.2f}" in fill_text(runs / "electra", "The otter <mask> the boat.", 1)
    assert opened.fill("The otter <mask> the boat.", 1) == [[(gap[0].piece, gap[0].probability)]]


def test_python_api_fills_as_the_command_does(runs: Path) -> None:
    text = "The <mask> sells the <mask>."
    for name in ("t5", "elmo"):
        gaps = open_model(runs / name).fill(text, 2)
        shown = [[f"{probability:.2f}" for _, probability in gap] for gap in gaps]
        lines = fill_text(runs / name, text, 2).splitlines()
        assert len(gaps) == 2 and all(number in line for line, gap in zip(lines, shown, strict=True) for number in gap)
    with pytest.raises(UserError, match="rewrites the whole text"):
        open_model(runs / "bart").fill(text)


@pytest.mark.parametrize(
    ("command", "name", "instead"),
    [
        (["fill", "RUN", "a <mask> b"], "vae", "firth generate"),
        (["fill", "RUN", "a <mask> b"], "word2vec", "firth vectors"),
        (["generate", "RUN", "a"], "electra", "firth fill"),
        (["generate", "RUN", "a"], "elmo", "firth fill"),
        (["generate", "RUN", "a"], "word2vec", "firth vectors"),
        (["chat", "RUN"], "electra", "firth fill"),
        (["generate", "RUN", "--between", "a", "b"], "t5", "firth train vae"),
        (["fill", "RUN", "no gap"], "t5", "write <mask> where a token is missing"),
    ],
)
def test_unsuitable_command_names_a_suitable_one(runs: Path, command: list[str], name: str, instead: str) -> None:
    sentence = firth(*(str(runs / name) if word == "RUN" else word for word in command), code=2)
    assert instead in sentence and "\n" not in sentence


# Variational autoencoders


def test_vae_interpolates_and_samples_from_the_prior(runs: Path) -> None:
    opened = open_engine(runs / "vae")
    sampling = Sampling(temperature=0, max_new_tokens=8)
    first, second = "The otter paints the boat.", "The clerk sells the boat."
    lines = opened.interpolate(first, second, 5, sampling)
    ends = opened.engine.posterior([encode_prompt(opened.tokenizer, text, opened.model) for text in (first, second)])
    middle = opened.engine.decode(ends.mean(0, keepdim=True), sampling)[0].text
    assert [lines[0], lines[4]] == [one.text for one in opened.engine.decode(ends, sampling)] and lines[2] == middle
    more = ["--temperature", "0", "-n", "8", "--count", "3", "--seed", "4", "--weights", "fp32"]
    assert firth("generate", str(runs / "vae"), "--between", first, second, *more) == (
        "\n".join(opened.interpolate(first, second, 3, sampling)) + "\n"
    )
    drawn = firth("generate", str(runs / "vae"), *more)
    chance = np.random.default_rng(4).standard_normal((3, 4), np.float32)
    prior = opened.engine.decode(torch.from_numpy(chance), Sampling(temperature=0, max_new_tokens=8, seed=4))
    assert drawn == "\n".join(one.text for one in prior) + "\n"


# Evaluation


def evaluated(runs: Path, name: str, *more: str) -> dict[str, float | str]:
    found: dict[str, float | str] = json.loads(
        firth("evaluate", str(runs / name), str(runs / "held.txt"), "--json", *more)
    )
    return found


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("electra", {"loss/generator", "loss/replaced", "guessed", "replaced_accuracy", "original_accuracy"}),
        ("vae", {"elbo", "kl", "active"}),
        ("elmo", {"loss/forward", "loss/backward"}),
        ("word2vec", {"loss"}),
    ],
)
def test_evaluate_matches_the_metrics_of_training(runs: Path, name: str, keys: set[str]) -> None:
    """On the run's held-out file the metrics equal those of the last step of training."""
    found = evaluated(runs, name)
    held: dict[str, float] = json.loads(firth("evaluate", str(runs / name), "--json"))
    assert found["task"] == "objective" and found["share"] == 1
    for key in keys:
        assert found[key] == pytest.approx(held[key], rel=1e-4, abs=1e-6), key


def test_task_objective_evaluates_the_objective(runs: Path) -> None:
    whole, some = (
        evaluated(runs, "t5", "--task", "objective"),
        evaluated(runs, "t5", "--task", "objective", "--limit", "40"),
    )
    assert whole["examples"] == 9 and whole["share"] == 1
    assert 1 <= float(some["examples"]) < 9
    # A bare model directory does not say how it was trained.
    sentence = firth("evaluate", str(runs / "electra" / "model"), str(runs / "held.txt"), code=2)
    assert "no recipe of its training: name its run directory" in sentence
