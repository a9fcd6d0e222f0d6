"""What a run is trained for decides what is asked of it: its samples, its export, and how its likelihood is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from firth.evaluate.evaluate import evaluate
from firth.evaluate.task import load_evaluated_model
from firth.evaluate.text_perplexity import scoring_mode
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
            recipe = load(name, [*SMALL, f"data.path={folder}", *rest])
            made[settings] = run(recipe, tmp_path_factory.mktemp("run"), echo=lambda _: None)
        return made[settings]

    return one


BILM = ("lstm", "objective=bilm", "model.causal=false", "model.separate_directions=true", "model.num_heads=1")


@pytest.mark.parametrize(
    "settings",
    [
        ("roberta", "objective=nsp", "examples=segment_pairs", "model.type_vocab_size=2"),
        ("vae", "model.latent_size=0", "objective=denoising"),
        BILM,
    ],
)
def test_samples_that_a_model_cannot_answer_are_left_out(make: Make, settings: tuple[str, ...]) -> None:
    """Without a head, without a latent, with the head of two readers: the run ends, and its report has no such samples."""
    made = make(*settings)
    assert (made.directory / "report.html").exists()
    rows = (made.directory / "samples.jsonl").read_text("utf-8")
    assert not {"<mask>", "<to>", "<prior>"} & {mark for mark in ("<mask>", "<to>", "<prior>") if mark in rows}


def test_a_bilm_is_told_apart_from_a_model_that_writes(make: Make, folder: Path) -> None:
    made = make(*BILM)
    with pytest.raises(UserError, match="no vocabulary head reads this model's states, so it cannot write"):
        open_run(made.directory)
    with pytest.raises(UserError, match="cannot score the likelihood of text"):
        evaluate(made.directory, [str(folder / "0.txt")])


def test_an_encoder_trained_from_left_to_right_is_no_family_that_reads_both_ways(make: Make, folder: Path) -> None:
    left, both = make("roberta", "objective=causal_lm"), make("roberta")
    assert json.loads((both.model / "config.json").read_text())["architectures"] == ["ModernBertForMaskedLM"]
    assert json.loads((left.model / "firth.json").read_text())["family"] is None
    assert not (left.model / "config.json").exists()
    with pytest.raises(UserError, match="reads from left to right, so it fills no gaps"):
        fill_text(left.directory, "The <mask> swims.", 3)
    text = [str(folder / "0.txt")]
    assert evaluate(left.directory, text)["mode"] == "causal"
    assert evaluate(left.model, text)["mode"] == "causal"
    assert evaluate(both.directory, text, limit=50)["mode"] == "masked"
    again = run(load(str(left.directory / "recipe.yaml")), left.directory, echo=lambda _: None)
    assert again.steps == left.steps


def test_what_reads_from_both_ends_is_asked_one_token_at_a_time(make: Make) -> None:
    made = make("lstm", "objective=mlm", "model.causal=false", "model.num_heads=1", "examples=chunks")
    assert scoring_mode(load_evaluated_model(made.directory).model.config) == "masked"


def test_what_starts_from_it_reads_as_it_does(make: Make, folder: Path) -> None:
    """And one that reads both ways may be made to read to the left, but not the other way about."""
    left, both = make("roberta", "objective=causal_lm"), make("roberta")
    on = make("roberta", "objective=causal_lm", "model=null", f"init_from={both.directory}")
    assert (
        load_evaluated_model(on.directory).model.config.causal
        and json.loads((on.model / "firth.json").read_text())["family"] is None
    )
    with pytest.raises(UserError, match=r"a causal decoder cannot: start from the recipe roberta \(an encoder\)"):
        make("roberta", "model=null", f"init_from={left.directory}")
