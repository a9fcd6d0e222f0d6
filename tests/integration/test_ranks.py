"""`firth train` on two ranks: preparation, waiting, failures and resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore

from firth.training import distributed
from firth.training.checkpoint import load
from firth.types import UserError

ROOT = Path(__file__).parents[2]
WORDS = (
    "the king and queen of all that land did walk by night with many a fool who sang. But no one heard it, my lord! "
)
SMALL = [
    "train", "gpt", "model.hidden_size=32", "model.num_heads=2", "model.num_layers=1", "model.max_positions=32", "examples.max_length=16",
    "tokenizer.vocab_size=400", "max_steps=2", "batch.size=8", "evaluation.every=0", "checkpoint.every=1", "sample_prompts=[]",
    "precision=fp32", "data.validation_fraction=0.1",
]  # fmt: skip


def write_text(folder: Path) -> Path:
    """Write two dozen documents with different words, so that every part of a step has other frequencies."""
    folder.mkdir()
    words = WORDS.split()
    for number in range(24):
        permuted = [words[(i * (number % 7 + 1) + number * number) % len(words)] for i in range(200)]
        (folder / f"{number}.txt").write_text(" ".join(permuted))
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run all jobs in one process that imports torch once; return the folder of the runs and the outcomes by job."""
    folder = tmp_path_factory.mktemp("ranks")
    text = write_text(folder / "text")

    def job(name: str, world: int, *overrides: str, **options: Any) -> dict[str, Any]:
        return {
            "name": name,
            "world": world,
            "arguments": [*SMALL, f"data.path={text}", "--out", str(folder / name), *overrides],
        } | options

    shard = "distributed.shard=full"
    jobs = [
        job("one", 1), job("accumulate", 1, "batch.gradient_accumulation_steps=2"), job("two", 2, hook="slow_first"),
        job("fails", 2, hook="failing_first"),
        job("stopped", 2, hook="stopped_second", patience=1, env={"FIRTH_RANK_TIMEOUT": "1"}),
        job("killed", 2, hook="killed_in_save"), job("killed again", 2) | {"arguments": job("killed", 2)["arguments"]},
        job("sharded", 2, shard, hook="count_gathers"),
        job("samples", 2, shard, "sample_prompts=[the]", hook="count_gathers"), job("pass fails", 2, shard, hook="failing_pass"),
        job("killed shards", 2, shard, hook="killed_in_shards", patience=30),
        job("again", 2) | {"arguments": job("killed shards", 2, shard)["arguments"]},
        job("sharded, then one", 1) | {"arguments": job("sharded", 1, "max_steps=2")["arguments"]},
    ]  # fmt: skip
    prompts = folder / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("the king", "no one", "my lord", "and"))
    )
    rewarded = [
        "train", "reinforce", f"init_from={folder / 'one'}", f"data.path={prompts}", "examples.max_new_tokens=6",
        "examples.reward_function=[tests.support.rank_rewards:flaky]", "examples.rollout_size=8", "examples.num_epochs=1",
        "batch.size=8", "max_steps=2", "evaluation.every=0", "checkpoint.every=5", "precision=fp32", "--out",
    ]  # fmt: skip
    flaky = job("reward fails", 2, env={"FLAKY": "1"}) | {"arguments": [*rewarded, str(folder / "reward fails")]}
    jobs += [flaky, flaky | {"name": "reward corrected", "env": {}}]
    jobs.append(
        job("source fails", 2, hook="failing_source") | {"arguments": [*rewarded, str(folder / "source fails")]}
    )
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "tests/support/fork_ranks.py"), str(folder / "jobs.json")], env=environment,
                          text=True, capture_output=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "outcomes.json").read_text())


def first_loss(folder: Path, name: str) -> float:
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return next(row["loss"] for row in rows if row["split"] == "train" and row["step"] == 1)


def test_the_first_loss_does_not_depend_on_the_ranks(outcomes: tuple[Path, dict[str, Any]]) -> None:
    """The initial label frequencies are those of whole steps: 3e-3 off when each rank counted its own share.

    Two ranks compute what one rank computes in two micro-batches, so the difference is 0. A single batch adds the same
    numbers in another order, which changes the last bit of fp32 (2.4e-7 at a loss of 3.7).
    """
    folder, ends = outcomes
    assert [ends[name]["codes"] for name in ("one", "two", "accumulate")] == [[0], [0, 0], [0]]
    one, two, accumulated = (first_loss(folder, name) for name in ("one", "two", "accumulate"))
    assert two == accumulated
    assert abs(one - two) < 1e-6


def test_the_first_loss_does_not_depend_on_micro_batches(outcomes: tuple[Path, dict[str, Any]]) -> None:
    """8e-4 off when the frequencies were those of the first micro-batch."""
    folder, _ = outcomes
    assert abs(first_loss(folder, "one") - first_loss(folder, "accumulate")) < 1e-5


def printed(folder: Path, name: str, rank: int) -> str:
    return (folder / f"{name}-{rank}.txt").read_text()


def test_ranks_wait_longer_than_the_collective_timeout(outcomes: tuple[Path, dict[str, Any]]) -> None:
    """Rank 0 prepares for 4.5 s, and collectives time out after 3 s."""
    _, ends = outcomes
    assert ends["two"]["codes"] == [0, 0] and ends["two"]["seconds"] > 4.5


def test_a_failure_of_rank_0_ends_the_others(outcomes: tuple[Path, dict[str, Any]]) -> None:
    folder, ends = outcomes
    assert ends["fails"]["codes"] == [2, 2]
    assert printed(folder, "fails", 0) == "firth: this is not a text file\n"
    assert printed(folder, "fails", 1) == "firth: rank 0 failed: this is not a text file\n"


def test_a_stopped_rank_is_named_in_time(outcomes: tuple[Path, dict[str, Any]]) -> None:
    """The stopped rank still exists when the other one has ended, and is killed by the test (-9)."""
    folder, ends = outcomes
    assert ends["stopped"]["codes"] == [2, -9]
    last = printed(folder, "stopped", 0).splitlines()[-1]
    assert last.startswith("firth: rank 1 has sent no heartbeat for 1 s: it is stopped or cannot be reached; start all")
    assert (folder / "stopped" / "checkpoints" / "step-000001" / "manifest.json").exists()


def test_a_rank_killed_in_a_save_leaves_valid_checkpoints(outcomes: tuple[Path, dict[str, Any]]) -> None:
    """The next start resumes from the last valid checkpoint, bitwise equal to a run that was not killed."""
    folder, ends = outcomes
    assert ends["killed"]["codes"] == [-9, 2]
    last = printed(folder, "killed", 1).splitlines()[-1]  # after torch's own log
    assert last.startswith("firth: rank 0, which hosts the store of the ranks, has ended")
    assert ends["killed again"]["codes"] == [0, 0]
    assert "resuming from step-000001" in printed(folder, "killed again", 0)
    whole, again = (load(folder / name / "checkpoints" / "step-000002") for name in ("two", "killed"))
    assert whole.files.keys() == again.files.keys()
    for kind, tensors in whole.files.items():
        assert all(torch.equal(x, again.files[kind][name]) for name, x in tensors.items()), kind


def test_a_rank_killed_in_a_sharded_save_leaves_the_step_before(outcomes: tuple[Path, dict[str, Any]]) -> None:
    folder, ends = outcomes
    assert ends["killed shards"]["codes"] == [2, -9]
    assert ends["again"]["codes"] == [0, 0]
    assert "resuming from step-000001" in printed(folder, "again", 0)
    whole, again = (folder / name / "checkpoints/step-000002/shards" for name in ("sharded", "killed shards"))
    for file in whole.iterdir():
        expected, found = load_file(file), load_file(again / file.name)
        assert expected.keys() == found.keys()
        assert all(torch.equal(x, found[name]) for name, x in expected.items())


def test_a_sharded_run_exports_the_model_of_one_process(outcomes: tuple[Path, dict[str, Any]]) -> None:
    """The finished run is found by one process too, because sharding is no part of the identity of a run."""
    folder, ends = outcomes
    assert ends["sharded"]["codes"] == [0, 0]
    one, sharded = (load_file(folder / name / "model/model.safetensors") for name in ("one", "sharded"))
    assert one.keys() == sharded.keys()
    for name, x in one.items():
        assert (x - sharded[name]).abs().max() <= 3e-3, name  # two steps of Muon in bf16 at lr 3e-3
    assert ends["sharded, then one"]["codes"] == [0]
    assert "is finished, after 2 steps" in printed(folder, "sharded, then one", 0)


def test_a_sharded_model_is_gathered_only_for_samples(outcomes: tuple[Path, dict[str, Any]]) -> None:
    folder, ends = outcomes
    for name, count in (("sharded", 0), ("samples", 1)):
        assert ends[name]["codes"] == [0, 0]
        assert all(f"gathered {count} times before training" in printed(folder, name, rank) for rank in (0, 1))


def test_a_rank_that_fails_in_a_sharded_step_is_named(outcomes: tuple[Path, dict[str, Any]]) -> None:
    folder, ends = outcomes
    assert ends["pass fails"]["codes"] == [2, 2]
    last = [printed(folder, "pass fails", rank).splitlines()[-1] for rank in (0, 1)]
    assert last == ["firth: rank 1 failed: this rank has failed in its step", "firth: this rank has failed in its step"]


def test_a_reward_that_fails_on_one_rank_ends_both_after_a_save(outcomes: tuple[Path, dict[str, Any]]) -> None:
    """Rank 1 alone calls the reward that fails; the ranks save together, and the corrected run resumes."""
    folder, ends = outcomes
    assert ends["reward fails"]["codes"] == [2, 2]
    own, other = (printed(folder, "reward fails", rank).splitlines()[-1] for rank in (1, 0))
    assert own.startswith("firth: the reward raised ValueError (endpoint down) at rank_rewards.py:")
    assert other == own.replace("firth: ", "firth: rank 1 failed: ", 1)
    assert "saved step 1 in" in printed(folder, "reward fails", 0)
    assert ends["reward corrected"]["codes"] == [0, 0]
    assert "resuming from step-000001" in printed(folder, "reward corrected", 0)


def test_a_source_that_fails_on_one_rank_saves_nothing(outcomes: tuple[Path, dict[str, Any]]) -> None:
    folder, ends = outcomes
    assert ends["source fails"]["codes"] == [2, 2]
    last = [printed(folder, "source fails", rank).splitlines()[-1] for rank in (0, 1)]
    assert last == ["firth: rank 1 failed: this rank has no more memory", "firth: this rank has no more memory"]
    assert not [*(folder / "source fails" / "checkpoints").glob("step-*")]


def test_a_failed_collective_names_the_lost_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "GRACE_SECONDS", 0.1)
    store = TCPStore("127.0.0.1", 0, 1, True)
    watch = distributed.PeerWatch(store, 0, 2, silence=1)
    assert "rank 1 has ended without an error of its own (killed?)" in watch.explain()
    store.set("firth/failed", "1 rank 1 failed: the file ends early")
    assert watch.explain() == "rank 1 failed: the file ends early"
    watch.close()


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_the_rank_timeout_must_be_a_positive_number(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("FIRTH_RANK_TIMEOUT", text)
    with pytest.raises(UserError, match=f"FIRTH_RANK_TIMEOUT={text} must be a number of seconds above 0"):
        distributed.silence_seconds()
