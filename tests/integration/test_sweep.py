"""Sweeps of settings: trials are runs, kills and several workers lose nothing, pruning follows the median, errors come first."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial
from typer.testing import CliRunner

from firth.cli import app
from firth.io.integrity import read_done
from firth.runs.recipe import Recipe, load
from firth.runs.run import run
from firth.sweep import trials as trials_module
from firth.sweep.report import importance, page, show, sweep_recipe
from firth.sweep.trials import JOURNAL, StudyConfig, Sweeper, completed, prepare, reopen
from firth.training.trainer import DivergedError
from firth.types import UserError
from tests.support.commands import ROOT
from tests.support.runs import quiet
from tests.support.tiny_corpus import TEXTS

TINY = (
    "data.corpus=pydoc", "tokenizer.vocab_size=300", "model.hidden_size=16", "model.num_heads=1", "model.head_dim=16",
    "model.intermediate_size=32", "model.num_layers=1", "examples.max_length=32", "evaluation.max_examples=8", "precision=fp32",
    "max_steps=16",
)  # fmt: skip
VARIED = ("optimizer.lr=log(1e-4,1)", "batch.size=choice(2,4)", "model.dropout=uniform(0,0.3)")
TRIALS = 9
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def command(out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "firth",
        "sweep",
        "gpt",
        *TINY,
        *VARIED,
        "--trials",
        str(TRIALS),
        "--out",
        str(out),
        *more,
    ]


def opened(out: Path) -> tuple[Sweeper, list[FrozenTrial]]:
    """Return a sweep and its trials."""
    name, settings, config = reopen(out, None, 0)
    sweeper = prepare(name, settings, config, out, quiet)
    return sweeper, sweeper.study().get_trials(deepcopy=False)


def outcomes(out: Path) -> list[tuple[Any, ...]]:
    """Return what each trial was and how it ended."""
    return [(t.number, t.state.name, t.value, t.params, t.intermediate_values) for t in opened(out)[1]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep by one process, with two further seeds."""
    out = tmp_path_factory.mktemp("whole") / "sweep"
    done = subprocess.run(command(out, "--seeds", "2"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is the best: loss" in done.stdout and "2 other seeds" in done.stdout
    return out


def test_every_trial_is_a_run_with_its_settings(whole: Path) -> None:
    sweeper, trials = opened(whole)
    assert len(trials) == TRIALS and len(completed(sweeper.study())) >= 5
    for trial in trials:
        directory = sweeper.directory(trial.number)
        recipe = load(str(directory))
        varied = dict(one.split("=") for one in sweeper.settings(trial))
        assert (
            float(varied["optimizer.lr"])
            == recipe.optimizer.lr
            == pytest.approx(trial.params["optimizer.lr"], rel=1e-3)
        )
        assert str(recipe.batch.size) == trial.params["batch.size"]
        if trial.state.name == "COMPLETE":
            assert read_done(directory)["metrics"]["valid/loss"] == trial.value
            assert (directory / "model" / "model.safetensors").exists()
        assert not (directory / "checkpoints").exists()
    own = load("gpt", TINY)
    assert (trials[0].params["optimizer.lr"], trials[0].params["model.dropout"]) == (
        own.optimizer.lr,
        own.model.dropout,
    )


def test_the_command_of_the_best_trial_repeats_it(whole: Path, tmp_path: Path) -> None:
    text = show(opened(whole)[0])
    best = min((t for t in opened(whole)[1] if t.state.name == "COMPLETE"), key=lambda t: t.value)
    assert f"Trial {best.number} is the best" in text
    (line,) = [line for line in text.splitlines() if line.startswith("firth train")]
    words = line.split()
    assert words[:3] == ["firth", "train", "gpt"]
    ended = run(load("gpt", words[3 : words.index("--out")]), tmp_path / "again", quiet)
    assert ended.metrics["valid/loss"] == best.value


def test_pruned_trials_were_behind_the_median(whole: Path) -> None:
    """The rule is recomputed from the trials' own metrics.jsonl, in the order in which one process trained them."""
    sweeper, trials = opened(whole)
    losses = {}
    for trial in trials:
        rows = [
            json.loads(line) for line in (sweeper.directory(trial.number) / "metrics.jsonl").read_text().splitlines()
        ]
        losses[trial.number] = {round(100 * row["step"] / 16): row["loss"] for row in rows if row["split"] == "valid"}
    finished: list[int] = []
    pruned = 0
    for trial in trials:
        own, behind = losses[trial.number], []
        for point in sorted(own):
            before = [losses[n][point] for n in finished]
            best = min(loss for at, loss in own.items() if at <= point)
            behind.append(len(finished) >= 5 and 30 <= point < 100 and best > statistics.median(before))
        if trial.state.name == "COMPLETE":
            assert not any(behind)
            finished.append(trial.number)
        else:
            assert behind[-1] and not any(behind[:-1])
            pruned += 1
    assert pruned >= 1


def test_a_killed_sweep_ends_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    with subprocess.Popen(command(out), env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        while not list(out.glob("trials/0002/checkpoints/step-*[0-9]")) and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    trials = opened(out)[1]
    assert [t.state.name for t in trials[:3]].count("RUNNING") == 1 and len(trials) < TRIALS
    with open(out / JOURNAL, "a") as journal:
        journal.write('{"op_code": 6, "worker')  # what a full disk leaves
    again = subprocess.run(command(out), env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "trial 0:" not in again.stdout
    assert outcomes(out) == outcomes(whole)


def test_two_workers_lose_nothing_when_one_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    both = [subprocess.Popen(command(out), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    victim: int | None = None
    while victim is None and all(process.poll() is None for process in both):
        for file in sorted(out.glob("claims/trial-*.1")):
            number = int(file.name[6:10])
            text = file.read_text()
            if number >= 2 and text.startswith("{") and list(out.glob(f"trials/{number:04d}/metrics.jsonl")):
                victim = json.loads(text)["process"]
        time.sleep(0.005)
    assert victim in [process.pid for process in both]
    os.kill(victim, signal.SIGKILL)
    outputs = [process.communicate()[0] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [-signal.SIGKILL, 0]
    sweeper, trials = opened(out)
    assert [t.number for t in trials] == list(range(TRIALS))
    assert all(t.state.is_finished() for t in trials)
    ended = [int(n) for output in outputs for n in re.findall(r"^trial (\d+): (?:loss|pruned)", output, re.M)]
    assert sorted(ended) == list(range(TRIALS))  # each ended once
    for trial in trials:
        if trial.state.name == "COMPLETE":
            assert read_done(sweeper.directory(trial.number))["metrics"]["valid/loss"] == trial.value


def test_several_workers_of_one_command(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    done = subprocess.run(command(out, "--workers", "2"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(opened(out)[1]) == TRIALS
    owners = {
        json.loads(line)["worker_id"] for line in (out / JOURNAL).read_text().splitlines() if '"op_code":6' in line
    }
    assert len(owners) == 2  # both have ended trials


def test_a_finished_sweep_grows_and_prints_its_table(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    shutil.copytree(whole, out)
    before = outcomes(out)
    more = subprocess.run(
        [sys.executable, "-m", "firth", "sweep", str(out), "--trials", str(TRIALS + 1)],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert more.returncode == 0, more.stderr
    assert outcomes(out)[:TRIALS] == before and len(outcomes(out)) == TRIALS + 1
    assert reopen(out, None, 0)[2].trials == TRIALS + 1  # the directory alone continues all of them
    table = subprocess.run(
        [sys.executable, "-m", "firth", "sweep", str(out), "--table"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert table.returncode == 0, table.stderr
    rows = [line.split() for line in table.stdout.splitlines()[1 : TRIALS + 2]]
    assert [row[0] for row in rows] == [str(n) for n in range(TRIALS + 1)]
    refused = subprocess.run(
        [sys.executable, "-m", "firth", "sweep", str(out), "batch.size=4"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2 and "whose settings are fixed: leave out batch.size=4" in refused.stderr
    for option in (["--metric", "accuracy"], ["--direction", "maximize"], ["--no-prune"], ["--seed", "1"]):
        result = CliRunner().invoke(app, ["sweep", str(out), *option])
        assert isinstance(result.exception, UserError) and f"with another {option[0]}: leave it out" in str(
            result.exception
        )


def test_the_page_shows_all_of_it(whole: Path) -> None:
    sweeper, trials = opened(whole)
    html = (whole / "report.html").read_text()
    assert "PED-ANOVA" in html and "not to be trusted" in html
    assert html.count("firth train gpt") >= 1 and "<script" not in html and "http" not in html.replace("http-equiv", "")
    report = page(sweeper, sweeper.study())
    (parallel,) = next(section for section in report.sections if section.parallels).parallels
    assert [axis.label for axis in parallel.axes] == ["lr", "size", "dropout", "loss"]
    assert sorted(parallel.kinds).count("best") == 1
    assert len(next(s for s in report.sections if s.title == "Other seeds").tables[0].rows) == 2
    (trial_table,) = report.sections[0].tables
    assert [row[0] for row in trial_table.rows] == [t.number for t in trials]


@pytest.mark.oracle
def test_importance_is_optunas(whole: Path) -> None:
    sweeper, _ = opened(whole)
    ours = importance(sweeper.study())
    theirs = optuna.importance.get_param_importances(
        sweeper.study(), evaluator=optuna.importance.PedAnovaImportanceEvaluator()
    )
    assert ours == theirs and sum(ours.values()) == pytest.approx(1)


@pytest.mark.parametrize(("settings", "config", "message"), [
    (["optimizer.lrr=log(1,2)"], {}, "there is no field 'lrr'"),
    (["optimizer.lr=log(0,1)"], {}, "log needs numbers above 0"),
    (["optimizer.lr=log(1e-4,1e-2)"], {"metric": "f1"}, r"--metric f1 is not among the held-out metrics: choose one of loss"),
    (["optimizer.lr=log(1e-4,1e-2)", "data.validation_fraction=0"], {}, "nothing is held out"),
    (["optimizer.lr=1e-3"], {}, "no field is varied"),
    (["optimizer.lr=log(1e-4,1e-2)"], {"metric": ""}, "--metric is empty: name a metric"),
])  # fmt: skip
def test_wrong_input_is_an_error_before_training(
    settings: list[str], config: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials_module, "run", lambda *_, **__: pytest.fail("something was trained"))
    with pytest.raises(UserError, match=message) as raised:
        sweep_recipe("gpt", [*TINY, *settings], StudyConfig(**config), tmp_path / "sweep", log=quiet)
    assert "\n" not in str(raised.value)


def test_wrong_settings_can_be_corrected_in_the_same_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--metric f1"):
        prepare("gpt", [*TINY, *VARIED], StudyConfig(metric="f1", direction="maximize"), tmp_path / "sweep", quiet)
    sweeper = prepare("gpt", [*TINY, *VARIED], StudyConfig(), tmp_path / "sweep", quiet)
    assert sweeper.study().direction.name == "MINIMIZE"


def test_another_sweep_or_other_files_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds a sweep with another search space: choose another --out"):
        prepare("gpt", [*TINY, "optimizer.lr=log(1e-4,2)", *VARIED[1:]], StudyConfig(TRIALS), whole, quiet)
    with pytest.raises(UserError, match=r"holds a sweep with another recipe and seed"):
        prepare("gpt", [*TINY, "seed=3", *VARIED], StudyConfig(TRIALS, seed=1), whole, quiet)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists and holds no sweep of settings"):
        prepare("gpt", [*TINY, *VARIED], StudyConfig(), tmp_path, quiet)


def test_trials_that_diverge_are_recorded(tmp_path: Path) -> None:
    settings = [*TINY, "optimizer.max_grad_norm=0", "optimizer.embedding_lr=1e38", "optimizer.lr=choice(1e38,2e38)"]
    lines: list[str] = []
    with pytest.raises(
        UserError, match=r"none of 2 trials has finished: 2 diverged or failed, the first of them trial 0"
    ):
        sweep_recipe("gpt", settings, StudyConfig(2), tmp_path / "sweep", log=lines.append)
    trials = opened(tmp_path / "sweep")[1]
    assert [t.state.name for t in trials] == ["PRUNED", "PRUNED"]
    assert sum("diverged" in line for line in lines) == 2
    assert "diverged" in show(opened(tmp_path / "sweep")[0])


@pytest.mark.parametrize(("metric", "minimizes"), [("loss", True), ("train/loss", True), ("accuracy", False)])
def test_the_direction_follows_the_name(metric: str, minimizes: bool) -> None:
    assert StudyConfig(metric=metric).minimizes == minimizes


def test_a_full_disk_ends_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise UserError("not enough disk space") from OSError(errno.ENOSPC, "No space left on device")

    sweeper = prepare("gpt", [*TINY, *VARIED], StudyConfig(1), tmp_path / "sweep", quiet)
    with monkeypatch.context() as patch:
        patch.setattr(trials_module, "run", full)
        with pytest.raises(UserError, match="not enough disk space"):
            trials_module.run_trials(sweeper, quiet)
    trials_module.run_trials(sweeper, quiet)
    assert [trial.state.name for trial in sweeper.study().get_trials()] == ["COMPLETE"]


def test_a_metric_can_be_maximized(tmp_path: Path) -> None:
    sweeper = prepare(
        "gpt", [*TINY, *VARIED], StudyConfig(3, "train/norm", "maximize", seeds=0), tmp_path / "sweep", quiet
    )
    trials_module.run_trials(sweeper, quiet)
    trials = sweeper.study().get_trials()
    assert sweeper.study().best_trial.value == max(t.value for t in trials if t.value is not None)
    assert f"Trial {sweeper.study().best_trial.number} is the best: train/norm" in show(sweeper)
    with pytest.raises(
        UserError, match="--metric train/speed is not among the metrics of a training step: train/step, "
    ):
        sweep_recipe("gpt", [*TINY, *VARIED], StudyConfig(3, "train/speed"), tmp_path / "other", log=quiet)


def test_a_sweep_continues_from_another_directory(tmp_path: Path) -> None:
    """The files of its settings were named relative to the first working directory."""
    (tmp_path / "first" / "texts").mkdir(parents=True)
    (tmp_path / "second").mkdir()
    (tmp_path / "first" / "texts" / "a.txt").write_text("\n\n".join(TEXTS[:20]))
    settings = [one for one in TINY if not one.startswith("data.")]
    out = tmp_path / "first" / "sweep"
    calls = (
        (
            "first",
            ["gpt", "data.path=texts", "data.split_by=blank", *settings, VARIED[0], "--out", "sweep", "--trials", "1"],
        ),
        ("second", [str(out), "--trials", "2"]),
        (
            "first",
            ["gpt", "data=texts", "data.split_by=blank", *settings, VARIED[0], "--out", "sweep", "--trials", "2"],
        ),
    )
    for place, arguments in calls:
        done = subprocess.run(
            [sys.executable, "-m", "firth", "sweep", *arguments], capture_output=True, text=True, cwd=tmp_path / place,
            env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert (out / "trials" / "0001").exists()


def test_a_seed_that_diverges_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other seeds are compared, the table shows it, and a repeated call does not train it again."""
    begun: list[Path] = []

    def diverging(recipe: Recipe, directory: Path, **rest: Any) -> Any:
        begun.append(directory)
        if directory.match("recipe/seed-2"):
            directory.mkdir(parents=True)
            raise DivergedError("the loss is not finite")
        return run(recipe, directory, **rest)

    monkeypatch.setattr(trials_module, "run", diverging)
    settings, config = [*TINY, VARIED[0]], StudyConfig(1, seeds=3)
    lines: list[str] = []
    shown = sweep_recipe("gpt", settings, config, tmp_path / "sweep", log=lines.append)
    assert any(line.endswith("seed 2: diverged: the loss is not finite") for line in lines)
    assert "over 2 other seeds" in shown
    assert "Diverged: 0 of 3 seeds of trial-0000, 1 of 3 of the recipe's own." in shown
    assert len(begun) == 7
    assert sweep_recipe("gpt", settings, config, tmp_path / "sweep", log=quiet) == shown
    assert len(begun) == 7
    sweeper = prepare("gpt", settings, config, tmp_path / "sweep", quiet)
    (table,) = next(s for s in page(sweeper, sweeper.study()).sections if s.title == "Other seeds").tables
    assert [row[2:] for row in table.rows if row[0] == "2"] == [["diverged", None]]
