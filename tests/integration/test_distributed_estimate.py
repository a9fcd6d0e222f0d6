"""A dry run under torchrun: what one process takes, printed once."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from firth.runs.estimate import describe, estimate, whole_model_uses
from firth.runs.recipe import load
from tests.support.runs import quiet

SETTINGS = ["tokenizer.vocab_size=300", "batch.size=32", "max_steps=10", "examples.max_length=32", "precision=fp32"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("text")
    for number in range(8):
        (place / f"{number}.txt").write_text(f"the king of {number} lands did walk by night. " * 60)
    return place


def test_memory_falls_with_the_processes(text: Path) -> None:
    """Tokens and FLOPs are those of all processes; activations are of a share of the rows, the state of a shard."""
    recipe, sharded = (
        load("gpt", [f"data.path={text}", *SETTINGS, f"distributed.shard={shard}"]) for shard in ("none", "full")
    )
    alone, two, shared = (estimate(r, False, quiet, n) for r, n in ((recipe, 1), (recipe, 2), (sharded, 2)))
    assert two.tokens == pytest.approx(alone.tokens) and two.flops == pytest.approx(alone.flops, rel=0.01)
    assert two.epochs == pytest.approx(alone.epochs) and two.data_tokens == pytest.approx(alone.data_tokens)
    assert two.step.memory.activations < 0.75 * alone.step.memory.activations
    assert two.step.memory.weights == alone.step.memory.weights
    assert shared.step.memory.weights == pytest.approx(alone.step.memory.weights / 2, rel=0.01)
    assert shared.step.memory.optimizer == pytest.approx(alone.step.memory.optimizer / 2, rel=0.01)
    assert shared.step.peak_bytes < two.step.peak_bytes < alone.step.peak_bytes
    assert not (alone.whole or two.whole)
    micro = "batch.gradient_accumulation_steps=2"  # a shard then keeps the gradient of the whole model between them
    copies, shards = (
        estimate(load("gpt", [f"data.path={text}", *SETTINGS, f"distributed.shard={shard}", micro]), False, quiet, 2).step.memory
        for shard in ("none", "full")
    )  # fmt: skip
    gathered = shared.step.memory.activations - two.step.memory.activations
    assert shards.activations == copies.activations + gathered + copies.gradients


@pytest.mark.parametrize("prompts", ["[]", "[the]"])
def test_what_holds_the_whole_model_is_printed(text: Path, prompts: str) -> None:
    recipe = load("gpt", [f"data.path={text}", *SETTINGS, "distributed.shard=full", f"sample_prompts={prompts}"])
    found = estimate(recipe, False, quiet, 2)
    [line] = [line for line in describe(found, 2) if "whole model" in line]
    size = f"{4 * found.step.parameters / 1e6:,.0f} MB"
    assert line.endswith(f"{size} in main memory of the first process at the end, for the export")
    assert (f"{size} on each process during sample_prompts; " in line) == (prompts != "[]")


def test_answers_for_the_report_hold_the_whole_model(tmp_path: Path) -> None:
    """A run on prompts with answers writes its own answers to held-out ones before the first step."""
    rows = [{"prompt": f"the king of {i} lands", "completion": "did walk by night"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = ["model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.max_positions=64"]
    given = [f"data.path={tmp_path / 'data.jsonl'}", *small, *SETTINGS, "distributed.shard=full", "sample_prompts=[]"]
    found = estimate(load("sft", given), False, quiet, 2)
    assert "on each process during answers for the report; " in found.whole


@pytest.mark.parametrize(("start", "whole"), [("start.gguf", True), ("start", False), ("", False)])
def test_a_gguf_file_is_read_as_a_whole(tmp_path: Path, start: str, whole: bool) -> None:
    (tmp_path / "start.gguf").touch()
    recipe = dataclasses.replace(load("gpt"), init_from=str(tmp_path / start) if start else "")
    run = SimpleNamespace(recipe=recipe, batches=SimpleNamespace(source=SimpleNamespace(on_policy=False)), texts=False)
    found = whole_model_uses(run, SimpleNamespace(parameters=10**9, frozen_bytes=0))  # type: ignore[arg-type]
    assert ("in main memory of each process while it is built" in found) == whole


def test_only_the_first_process_prints(text: Path) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617", "-m", "firth"]
    words = [sys.executable, *command, "train", "gpt", f"data.path={text}", *SETTINGS, "--dry-run"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("a dry run, which trains nothing") == 1
    assert "on one of 2 processes" in done.stdout + done.stderr
