"""Batches are built one step ahead in a thread: results are bitwise equal, errors are raised, and the thread ends."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from firth.align.rollouts import RolloutSource
from firth.data.shuffle import ExampleRNG
from firth.data.source import MixtureSource, Source, WrappedSource
from firth.model.model import LM
from firth.runs.recipe import load
from firth.runs.run import run
from firth.training.checkpoint import load as load_checkpoint
from firth.training.logging import NullReporter
from firth.training.schedule import Budget
from firth.training.step import Prefetcher
from firth.training.trainer import TrainerConfig, TrainingResult, train
from firth.types import Batch, Example, UserError
from tests.support.tiny_corpus import TEXTS
from tests.support.training import Chains, OnPolicy, small_batches, small_model

TIMED = {"seconds", "tokens_per_second", "flops_per_second", "mfu", "crc"}
MAIN, AHEAD = "MainThread", "firth-batches_0"


def rows(directory: Path) -> list[dict[str, object]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def thread_names() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


class Recorded(Chains):
    """Records which thread reads; calls `then` when the fifteenth example, the first of step 2, is read."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self.threads: list[str] = []
        self.then = then

    def __getitem__(self, index: int) -> Example:
        self.threads.append(threading.current_thread().name)
        if len(self.threads) == 15:
            self.then()
        return super().__getitem__(index)


def small_run(
    directory: Path, source: Source, evaluate: Callable[[LM, int], dict[str, float]] | None = None
) -> TrainingResult:
    """Train six steps of seven examples with a checkpoint at each."""
    config = TrainerConfig(save_every=1, eval_every=1 if evaluate else 0, precision="fp32")
    return train(small_model(), small_batches().objective, small_batches(source), directory, budget=Budget(max_steps=6),
                 config=config, reporter=NullReporter(), evaluate=evaluate)  # type: ignore[arg-type]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i, words in enumerate(TEXTS[:12]):
        (folder / f"{i}.txt").write_text(words[:900], encoding="utf-8")
    return folder


SMALL = [
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.num_layers=1",
    "model.intermediate_size=48",
    "max_steps=5",
    "batch.size=4",
    "sample_prompts=[]",
    "examples.max_length=48",
    "tokenizer.vocab_size=400",
    "evaluation.every=1",
    "evaluation.max_examples=8",
    "checkpoint.every=5",
    "precision=fp32",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt", "bert", "electra", "t5", "xlnet"])
def test_losses_do_not_depend_on_the_thread(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BERT's sentence pairs are sampled in the thread while the main thread samples validation pairs."""
    overrides = ["model.embedding.size=16"] if name == "electra" else []
    recipe = load(name, [*SMALL, *overrides, f"data.path={text}", "data.validation_fraction=0.3"])
    started: list[int] = []
    begin = Prefetcher.begin
    monkeypatch.setattr(Prefetcher, "begin", lambda self, step: (started.append(step), begin(self, step)))
    run(recipe, tmp_path / "with", log=lambda _: None)
    assert started == [1, 2, 3, 4]
    monkeypatch.setattr(Prefetcher, "begin", lambda self, step: None)
    run(recipe, tmp_path / "without", log=lambda _: None)
    assert rows(tmp_path / "with") == rows(tmp_path / "without")
    ends = [load_checkpoint(tmp_path / name / "checkpoints" / "step-000005") for name in ("with", "without")]
    assert ends[0].state["random"] == ends[1].state["random"]
    for key, x in ends[0].files["model"].items():
        assert torch.equal(x, ends[1].files["model"][key]), key


def test_only_batches_of_later_steps_are_built_ahead(tmp_path: Path) -> None:
    source = Recorded()
    small_run(tmp_path, source)
    assert source.threads == [MAIN] * 7 + [AHEAD] * 35
    assert AHEAD not in thread_names()


def test_on_policy_sources_are_read_by_the_main_thread(tmp_path: Path) -> None:
    class OnPolicyRecorded(Recorded):
        def prepare(self, model: LM, step: int) -> dict[str, float]:
            return {}

    source = OnPolicyRecorded()
    small_run(tmp_path, source)
    assert source.threads == [MAIN] * 42


def test_sources_know_whether_they_are_on_policy() -> None:
    assert not Chains().on_policy
    assert OnPolicy().on_policy
    assert WrappedSource(OnPolicy()).on_policy and not WrappedSource(Chains()).on_policy
    assert (
        MixtureSource([Chains(), OnPolicy()], [1, 1]).on_policy
        and not MixtureSource([Chains(), Chains()], [1, 1]).on_policy
    )
    assert RolloutSource.on_policy.fget(object.__new__(RolloutSource))  # type: ignore[attr-defined]


def test_a_batch_that_was_not_trained_on_is_built_again(tmp_path: Path) -> None:
    """The run stops in the validation of step 3, after the batch of step 4 was built and before step 3 is saved."""
    stopped = False

    def evaluate(_model: LM, step: int) -> dict[str, float]:
        nonlocal stopped
        if step == 3 and not stopped:
            stopped = True
            raise KeyboardInterrupt
        return {"loss": 1.0}

    small_run(tmp_path / "whole", Chains(), lambda _model, _step: {"loss": 1.0})
    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path / "cut", Chains(), evaluate)
    assert AHEAD not in thread_names()
    small_run(tmp_path / "cut", Chains(), evaluate)
    assert rows(tmp_path / "whole") == rows(tmp_path / "cut")
    ends = [load_checkpoint(tmp_path / way / "checkpoints" / "step-000006") for way in ("whole", "cut")]
    for key, x in ends[0].files["model"].items():
        assert torch.equal(x, ends[1].files["model"][key]), key


def test_an_error_of_the_thread_is_raised_at_its_step(tmp_path: Path) -> None:
    """Steps 0 and 1 are trained and saved; step 2 has the error, with its own text."""

    def fail() -> None:
        raise UserError("rows.jsonl, line 15: the text is empty: remove the line")

    with pytest.raises(UserError, match=r"^rows.jsonl, line 15: the text is empty: remove the line$"):
        small_run(tmp_path, Recorded(fail))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoints" / "step-000002").exists()
    assert AHEAD not in thread_names()


def test_a_second_ctrl_c_ends_the_wait_for_a_batch(tmp_path: Path) -> None:
    """Both arrive while the thread builds the batch of step 2 and the main thread waits for it."""

    def interrupt() -> None:
        time.sleep(0.3)  # step 1 is trained meanwhile
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        small_run(tmp_path, Recorded(interrupt))
    assert AHEAD not in thread_names()
    assert small_run(tmp_path, Chains()).step == 6


def test_each_thread_has_its_own_random_state() -> None:
    """Draws of one thread do not advance the stream of another."""
    draws = ExampleRNG(0, "view")
    first = draws.at(0, 7)
    expected = ExampleRNG(0, "view").at(0, 7).random(4)
    other: list[np.ndarray] = []
    thread = threading.Thread(target=lambda: other.append(draws.at(0, 7).random(4)))
    first.random(2)
    thread.start()
    thread.join()
    assert np.array_equal(other[0], expected)
    assert np.array_equal(first.random(2), expected[2:])


def test_torch_uses_one_thread_in_the_batch_thread() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found: list[int] = []
        numbers: list[Batch] = [{"n": torch.zeros(1)}]

        def make(_step: int) -> list[Batch]:
            found.append(torch.get_num_threads())
            return numbers

        with Prefetcher(make) as prefetcher:
            prefetcher.begin(1)
            assert prefetcher.take(1) is numbers
        assert torch.get_num_threads() == 2
        assert found == [1]
    finally:
        torch.set_num_threads(before)
