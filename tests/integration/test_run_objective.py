"""The training objective of a run decides its samples, its export and how its likelihood is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from firth.evaluate.evaluate import evaluate
from firth.evaluate.task import load_evaluated_model
from firth.generate.scoring import scoring_mode
from firth.runs.inference import fill_text, open_run
from firth.runs.recipe import load
from firth.runs.run import RunResult, run
from firth.types import UserError

SMALL = (
    "model.hidden_size=32",
    "model.num_heads=2",
    "tokenizer.vocab_size=400",
    "max_steps=1",
    "batch.size=4",
    "batch.pack_to_length=0",
    "checkpoint.every=0",
)
Make = Callable[..., RunResult]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("reads")
    line = "The otter swims in the cold river. It sleeps on the bank, and the {} runs by. "
    for i in range(20):
        (place / f"{i}.txt").write_text(line.format(["water", "hare", "king"][i % 3]) * 12)
    return place


@pytest.fixture(scope="module")
def make(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[tuple[str, ...], RunResult] = {}

    def one(*settings: str) -> RunResult:
        if settings not in made:
            name, *rest = settings
            started = any(s.startswith("init_from=") for s in rest)  # such a run has the tokenizer of its start
            small = [s for s in SMALL if not (started and s.startswith("tokenizer."))]
            recipe = load(name, [*small, f"data.path={folder}", *rest])
            made[settings] = run(recipe, tmp_path_factory.mktemp("run"), log=lambda _: None)
        return made[settings]

    return one


BILM = ("lstm", "objective=bilm", "model.causal=false", "model.rnn.separate_directions=true", "model.num_heads=1")


@pytest.mark.parametrize(
    "settings",
    [
        ("roberta", "objective=nsp", "examples=segment_pairs", "model.embedding.type_vocab_size=2"),
        ("vae", "model.encoder.latent_size=0", "objective=denoising"),
        BILM,
    ],
)
def test_unsupported_sample_prompts_are_skipped(make: Make, settings: tuple[str, ...]) -> None:
    """Without an LM head, without a latent, with two directions: the run ends, and its report has no such samples."""
    made = make(*settings)
    assert (made.directory / "report.html").exists()
    rows = (made.directory / "samples.jsonl").read_text("utf-8")
    assert not {"<mask>", "<to>", "<prior>"} & {mark for mark in ("<mask>", "<to>", "<prior>") if mark in rows}


def test_bilm_does_not_generate(make: Make, folder: Path) -> None:
    made = make(*BILM)
    with pytest.raises(UserError, match="this model has no LM head, so it cannot generate text"):
        open_run(made.directory)
    with pytest.raises(UserError, match="cannot score the likelihood of text"):
        evaluate(made.directory, [str(folder / "0.txt")])


def test_causal_encoder_has_no_bidirectional_family(make: Make, folder: Path) -> None:
    left, both = make("roberta", "objective=causal_lm"), make("roberta")
    assert json.loads((both.model / "config.json").read_text())["architectures"] == ["ModernBertForMaskedLM"]
    assert json.loads((left.model / "firth.json").read_text())["family"] is None
    assert not (left.model / "config.json").exists()
    with pytest.raises(UserError, match="is causal, so it cannot fill masks"):
        fill_text(left.directory, "The <mask> swims.", 3)
    text = [str(folder / "0.txt")]
    assert evaluate(left.directory, text)["mode"] == "causal"
    assert evaluate(left.model, text)["mode"] == "causal"
    assert evaluate(both.directory, text, limit=50)["mode"] == "masked"
    again = run(load(str(left.directory / "recipe.yaml")), left.directory, log=lambda _: None)
    assert again.steps == left.steps


def test_bidirectional_model_uses_pseudo_likelihood(make: Make) -> None:
    made = make("lstm", "objective=mlm", "model.causal=false", "model.num_heads=1", "examples=chunks")
    assert scoring_mode(load_evaluated_model(made.directory).model.config) == "masked"


def test_init_from_keeps_the_attention_pattern(make: Make, folder: Path) -> None:
    """A bidirectional model can be made causal, but not the reverse."""
    left, both = make("roberta", "objective=causal_lm"), make("roberta")
    on = make("roberta", "objective=causal_lm", "model=null", f"init_from={both.directory}")
    assert (
        load_evaluated_model(on.directory).model.config.causal
        and json.loads((on.model / "firth.json").read_text())["family"] is None
    )
    with pytest.raises(
        UserError, match=r"a causal decoder cannot: start from a model of the recipe roberta \(an encoder\)"
    ):
        make("roberta", "model=null", f"init_from={left.directory}")
