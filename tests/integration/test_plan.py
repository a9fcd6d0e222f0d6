"""Plans: a law, a text and an hour give a command that parses, runs, and takes the time and memory that it states."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from firth.runs import config_io
from firth.runs.estimate import prepared
from firth.runs.recipe import load
from firth.scaling import plan as plan_module
from firth.scaling.fit import ComputeRule, LossLaw, RepeatLaw
from firth.scaling.fitted import FittedLaw
from firth.scaling.plan import default_law, plan_run, plan_runs
from firth.scaling.text import frequent_share, of_vocabulary, prepared_with_vocabulary
from firth.types import UserError
from tests.support.runs import quiet

SETTINGS = [
    "tokenizer.vocab_size=300", "batch.size=4", "examples.max_length=32", "evaluation.max_examples=8", "precision=fp32",
]  # fmt: skip
SMALL = LossLaw(E=1.5, A=20.0, B=60.0, alpha=0.25, beta=0.3)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, body in list(topics.items())[:40]:
        (folder / f"{re.sub('[^a-z]', '', name)}.txt").write_text(body)
    return folder


def law(name: str, repeats: bool = False) -> FittedLaw:
    recipe = load(name, ["data.path=elsewhere/", *SETTINGS])
    return FittedLaw(
        SMALL, tuple(dataclasses.replace(SMALL, E=E) for E in (1.4, 1.45, 1.55, 1.6)), ComputeRule(), (0.01, -0.01), (5e3, 2e5),
        (1e4, 1e7), (1e9, 1e12), RepeatLaw(SMALL, 5.0, 5.0) if repeats else None, ((4.0, 5.0), (6.0, 5.0)) if repeats else (), 0.4,
        source={"recipe": config_io.to_dict(recipe), "compressed_bits": 2.5},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["gpt", "roberta"])
def test_the_command_trains_what_was_planned(name: str, text: Path, tmp_path: Path) -> None:
    goal = "text" if name == "gpt" else "labels"
    plan = plan_run([str(text)], 8 / 3600, goal, law(name), tmp_path / "run", quiet)
    words = shlex.split(plan.command)
    assert words[:3] == ["firth", "train", name]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "done.json").read_text())
    found = plan.estimate
    assert result["steps"] == found.steps
    assert result["tokens"] == pytest.approx(found.tokens, rel=0.03)
    assert result["flops"] == pytest.approx(found.flops, rel=0.1)  # a mean over sampled masks
    assert found.seconds <= 8
    assert f"{found.step.parameters:,} parameters" in done.stdout
    assert (
        plan.bits_per_byte is not None and plan.bits_per_byte.low < plan.bits_per_byte.value < plan.bits_per_byte.high
    )


def test_more_time_gives_a_larger_model_until_text_ends(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "WIDTHS", tuple(width for width in plan_module.WIDTHS if width <= 256))
    plans = [plan_run([str(text)], hours, "text", law("gpt", True), tmp_path, quiet) for hours in (2e-3, 2e-2, 20.0)]
    sizes = [plan.parameters for plan in plans]
    assert sizes == sorted(sizes) and sizes[0] < sizes[2]
    losses = [plan.loss.value for plan in plans]
    assert losses == sorted(losses, reverse=True)
    assert not plans[0].notes or "extrapolation" in plans[0].notes[0]
    notes = " ".join(plans[2].notes)
    assert "further epochs are not worth the rest of the time" in notes and "extrapolation" in notes
    assert plans[2].estimate.epochs <= 1 + 5 * 2.3026  # a repeat is then worth a tenth


def test_what_cannot_be_planned_is_a_sentence(text: Path, tmp_path: Path) -> None:
    law("gpt").save(tmp_path / "fit.json")
    with pytest.raises(UserError, match=r"is a law of models for text, and the plan is for labels: use --for text"):
        plan_runs([str(text)], 1.0, "labels", tmp_path / "fit.json", tmp_path, quiet)
    with pytest.raises(UserError, match=r"there is time or text for \d+ steps of 128 tokens only"):
        plan_run([str(text)], 1e-6, "text", law("gpt"), tmp_path, quiet)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match=r"other\.json"):
        plan_runs([str(text)], 1.0, "text", tmp_path / "other.json", tmp_path, quiet)
    with pytest.raises(UserError, match="firth ships no law of encoders for labels"):
        plan_runs([str(text)], 1.0, "labels", None, tmp_path, quiet)


def test_a_size_that_is_not_determined_is_no_plan(text: Path, tmp_path: Path) -> None:
    """`firth scale fit` prints a sentence for such a budget, and so does `firth plan`."""
    vague = dataclasses.replace(
        law("gpt"), draws=tuple(dataclasses.replace(SMALL, alpha=a, beta=b) for a, b in ((0.1, 0.6), (0.6, 0.1)) * 4)
    )
    assert vague.optimum(1e11).too_wide
    with pytest.raises(UserError, match=r"the best size for .* FLOPs is not determined: .* or plan fewer hours"):
        plan_run([str(text)], 8 / 3600, "text", vague, tmp_path, quiet)


def test_the_planned_size_fits_into_the_memory(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the sizes that `firth train` accepts the best one is taken, and a note says that a larger one would be better."""
    monkeypatch.setattr(plan_module, "WIDTHS", (16, 32, 64, 128))
    wide = plan_run([str(text)], 0.02, "text", law("gpt", True), tmp_path, quiet)
    free = int(0.8 * wide.estimate.step.peak_bytes)
    for module in ("compatibility", "step_estimate"):
        monkeypatch.setattr(f"firth.runs.{module}.available_memory", lambda _: {"main memory": free})
    plan = plan_run([str(text)], 0.02, "text", law("gpt", True), tmp_path, quiet)
    assert plan.parameters < wide.parameters
    assert plan.estimate.step.peak_of_run(plan.estimate.steps) <= free
    assert "does not fit into the free memory" in " ".join(plan.notes)
    free = 1000
    with pytest.raises(UserError, match="main memory"):
        plan_run([str(text)], 0.02, "text", law("gpt"), tmp_path, quiet)


def test_the_vocabulary_is_that_of_text_and_model(text: Path, tmp_path: Path) -> None:
    """Every subword that is left in the largest vocabulary is frequent enough, and twice as many are not."""
    recipe = load("gpt", [f"data.path={text}", *SETTINGS])
    with prepared_with_vocabulary(recipe, 1 << 14, quiet) as (chosen, run):
        size = chosen.tokenizer.vocab_size
        assert size in (512, 1024, 2048, 4096) and chosen.model is not None and chosen.model.vocab_size == size
        assert size == 512 or frequent_share(run) >= 0.95
    with prepared(of_vocabulary(recipe, 2 * size), quiet) as run:
        assert frequent_share(run) < 0.95
    with prepared_with_vocabulary(recipe, 512, quiet) as (chosen, _):
        assert chosen.tokenizer.vocab_size == 512


def test_a_run_on_the_text_calibrates_the_plan(text: Path, tmp_path: Path) -> None:
    """The measured bits per byte replace the comparison of two texts, whose error the law states."""
    wrong = dataclasses.replace(law("gpt"), source=law("gpt").source | {"compressed_bits": 0.5, "text_error": 0.5})
    plain = plan_run([str(text)], 40 / 3600, "text", wrong, tmp_path, quiet).bits_per_byte
    lines: list[str] = []
    measured = plan_run([str(text)], 40 / 3600, "text", wrong, tmp_path, lines.append, measured=True).bits_per_byte
    assert plain is not None and measured is not None
    found = float(next(line for line in lines if "bits per byte" in line).split()[1])
    assert 0.5 * found < measured.value < found and plain.value > 1.5 * found
    assert measured.high / measured.low < plain.high / plain.low


def test_a_size_above_those_of_the_law_is_noted(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is less than FAR times the largest."""
    monkeypatch.setattr("firth.scaling.plan.WIDTHS", (32,))
    parameters = plan_run([str(text)], 8 / 3600, "text", law("gpt"), tmp_path, quiet).parameters
    small = dataclasses.replace(law("gpt"), sizes=(1e3, parameters / 2))
    notes = " ".join(plan_run([str(text)], 8 / 3600, "text", small, tmp_path, quiet).notes)
    found = re.search(r"the size is ([\d.]+) times the largest of the law", notes)
    assert found is not None and 1 < float(found[1]) <= 2  # the law counts no embeddings, so 2 at most


def test_the_shipped_law_plans_text(text: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    plans = plan_runs([str(text)], 0.02, "both", None, tmp_path, lines.append)
    assert any("firth ships no law of encoders" in line for line in lines)
    assert "For text: a decoder" in plans and "bits per byte" in plans and "firth train gpt" in plans
    shipped = default_law("text")
    assert shipped.source["text"] == "sotu, wordnet, brown" and shipped.source["recipe"]["data"]["path"] == []
    assert shipped.optimum(1e12).too_wide == ""
