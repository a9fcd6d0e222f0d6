"""Sweeps over sizes and budgets: branches equal whole runs to the bit, kills, several processes, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from firth.model.flops import num_parameters
from firth.runs.recipe import load
from firth.runs.run import run
from firth.scaling.sizes import scaled
from firth.scaling.sweep import MIN_STEPS, SweepConfig, prepare, run_sweep
from firth.types import UserError
from tests.support.runs import quiet

TINY = [
    "data.corpus=pydoc", "tokenizer.vocab_size=300", "batch.size=2", "examples.max_length=32", "evaluation.max_examples=8",
    "precision=fp32",
]  # fmt: skip
BUDGETS = {"gpt": (3.6e8, 8e8), "roberta": (1.5e8, 3e8), "lstm": (3e8, 6e8)}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def rows(out: Path) -> list[dict[str, Any]]:
    """Return the table without the columns that depend on the speed."""
    found = [json.loads(line) for line in (out / "table.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


@pytest.mark.parametrize("name", BUDGETS)
def test_a_branch_equals_the_run_from_step_0(name: str, tmp_path: Path) -> None:
    recipe = load(name, [*TINY, "model.dropout=0.1"])
    config = SweepConfig(BUDGETS[name], (16,))
    run_sweep(recipe, config, tmp_path / "sweep", quiet)
    sweep = prepare(recipe, config, tmp_path / "sweep", quiet)
    small, large = sweep.included
    assert MIN_STEPS <= small.stable_steps < small.steps < large.steps
    alone = run(large.recipe, tmp_path / "alone", quiet)
    ours = load_file(large.directory(sweep.out) / "model" / "model.safetensors")
    whole = load_file(alone.model / "model.safetensors")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[key], whole[key]) for key in whole)
    first, second = rows(sweep.out)
    assert (second["loss"], second["flops"], second["tokens"]) == (
        alone.metrics["valid/loss"],
        alone.flops,
        alone.tokens,
    )
    assert first["reused_flops"] == 0
    share = small.stable_steps / small.steps
    assert second["reused_flops"] == pytest.approx(share * first["flops"], rel=0.05)
    assert second["loss"] != first["loss"]
    assert (large.directory(sweep.out) / "checkpoints").exists()
    assert len(list((large.directory(sweep.out) / "checkpoints").iterdir())) == 1


def command(out: Path) -> list[str]:
    budgets = ",".join(f"{b:g}" for b in BUDGETS["gpt"])
    options = ["--budgets", budgets, "--sizes", "16,24", "--out", str(out)]
    return [sys.executable, "-m", "firth", "scale", "run", "gpt", *TINY, *options]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two sizes and two budgets by one process."""
    out = tmp_path_factory.mktemp("whole") / "sweep"
    done = subprocess.run(command(out), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 points" in done.stdout and "firth scale fit" in done.stdout
    return out


def test_a_killed_sweep_continues(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    with subprocess.Popen(command(out), env=ENVIRONMENT, stdout=subprocess.DEVNULL) as process:
        while not (out / "table.jsonl").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    done = len(rows(out))
    assert 1 <= done < 4
    again = subprocess.run(command(out), env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"[{done + 1}/4]" in again.stdout and f"[{done}/4]" not in again.stdout
    assert rows(out) == rows(whole)


def test_two_processes_share_a_sweep(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    both = [subprocess.Popen(command(out), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert rows(out) == rows(whole)
    trained = [line for output in outputs for line in output.splitlines() if line.startswith("[")]
    assert len(trained) == 4  # no point twice


def test_workers_of_one_command_share_a_sweep(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    done = subprocess.run([*command(out), "--workers", "2"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert rows(out) == rows(whole)


def test_a_killed_process_leaves_its_point_to_another(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    both = [subprocess.Popen(command(out), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    victim = None
    while victim is None and all(process.poll() is None for process in both):
        for file in out.glob("width-*/*/metrics.jsonl"):
            claim = out / "claims" / f"{file.parts[-3]}.1"
            text = claim.read_text()
            victim = json.loads(text)["process"] if text.startswith("{") else None
        time.sleep(0.005)
    assert victim in [process.pid for process in both]
    os.kill(victim, signal.SIGKILL)
    for process in both:
        process.communicate()
    assert sorted(process.returncode for process in both) == [-signal.SIGKILL, 0]
    assert rows(out) == rows(whole)


def test_a_finished_sweep_grows(whole: Path) -> None:
    recipe, before = load("gpt", TINY), rows(whole)
    run_sweep(recipe, SweepConfig((1.2e9,), (16, 24)), whole, quiet)
    assert rows(whole)[:4] == before
    assert len(rows(whole)) == 6
    assert all(row["reused_flops"] > 0 for row in rows(whole)[4:])


def test_another_recipe_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds a sweep of another recipe \(another batch\): choose another --out"):
        prepare(load("gpt", [*TINY, "batch.size=4"]), SweepConfig((1e9,), (16,)), whole, quiet)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists and holds no sweep"):
        prepare(load("gpt", TINY), SweepConfig((1e9,), (16,)), tmp_path, quiet)
    with pytest.raises(UserError, match="starts from another run"):
        prepare(load("classification", ["data.path=x"]), SweepConfig((1e9,), (16,)), tmp_path / "other", quiet)
    with pytest.raises(UserError, match="no point is left: only 3 steps at the smallest"):
        run_sweep(load("gpt", TINY), SweepConfig((1e7,), (16,)), tmp_path / "short", quiet)


def test_a_diverged_point_is_a_row_without_a_loss(tmp_path: Path) -> None:
    recipe = load("gpt", [*TINY, "optimizer.lr=1e38", "optimizer.embedding_lr=1e38", "optimizer.max_grad_norm=0"])
    lines: list[str] = []
    text = run_sweep(recipe, SweepConfig((2.5e8,), (16,)), tmp_path / "sweep", lines.append)
    (row,) = rows(tmp_path / "sweep")
    assert row["loss"] is None and "not finite" in row["error"] + "infinite or NaN"
    assert "1 points diverged" in text
    assert run_sweep(recipe, SweepConfig((2.5e8,), (16,)), tmp_path / "sweep", quiet) == text  # it is not trained again


@pytest.mark.parametrize(
    "name", ["gpt", "gpt2", "llama", "roberta", "albert", "electra", "lstm", "elmo", "t5", "xlnet"]
)
def test_every_family_has_sizes(name: str) -> None:
    recipe = load(name)
    assert recipe.model is not None
    counts = [num_parameters(scaled(recipe, width).model) for width in (32, 64, 128, 256)]  # type: ignore[union-attr]
    assert counts == sorted(counts) and counts[0] < counts[1]
    same = scaled(recipe, recipe.model.hidden_size)
    assert same.model == recipe.model and same.optimizer.lr == recipe.optimizer.lr
    assert scaled(recipe, recipe.model.hidden_size // 4).optimizer.lr == pytest.approx(2 * recipe.optimizer.lr)


def test_a_start_that_is_no_beginning_is_refused(whole: Path, tmp_path: Path) -> None:
    sweep = prepare(load("gpt", TINY), SweepConfig(BUDGETS["gpt"], (16,)), whole, quiet)
    small, large = sweep.included
    start, recipe = next(small.directory(whole).glob("checkpoints/*")), large.recipe
    with pytest.raises(
        UserError, match="cannot be the beginning of this run, which has another batch: start from step 0"
    ):
        run(replace(recipe, batch=replace(recipe.batch, size=4)), tmp_path / "a", quiet, start_from=start)
    with pytest.raises(UserError, match=r"whose learning rate is another in step 1: give both runs schedule.kind=wsd"):
        run(replace(recipe, schedule=replace(recipe.schedule, warmup_steps=5)), tmp_path / "b", quiet, start_from=start)
    early = replace(recipe, schedule=replace(recipe.schedule, decay_ratio=0.9))
    with pytest.raises(UserError, match=r"whose learning rate is another in step \d\d"):
        run(early, tmp_path / "c", quiet, start_from=start)
    text = tmp_path / "other.txt"
    text.write_text("Another text. " * 400)
    other = replace(recipe, data=replace(recipe.data, path=(str(text),), validation_fraction=0.0))
    with pytest.raises(UserError, match="another data and content of its inputs"):
        run(other, tmp_path / "d", quiet, start_from=start)
