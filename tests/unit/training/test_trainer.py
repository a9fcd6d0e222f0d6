"""The training loop: bitwise resume, gradient accumulation, skipped steps, and validation without side effects."""

import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from firth.model.model import LM
from firth.training import checkpoint, trainer
from firth.training.checkpoint import load
from firth.training.device import choose_precision, flush_denormals, measured_speed
from firth.training.distributed import Ranks
from firth.training.logging import LineReporter, MetricsLog, NullReporter
from firth.training.optimizer import OptimizerConfig
from firth.training.run_lock import run_lock
from firth.training.schedule import Budget, Schedule
from firth.training.step import pinned, step, validate
from firth.training.trainer import TrainerConfig, train
from firth.types import IGNORE, Batch, Outputs, UserError
from tests.support import training
from tests.support.training import Chains, WithAccuracy, small_batches, small_model, small_run

TIMED = {"seconds", "tokens_per_second", "flops_per_second", "mfu", "crc"}
"""Fields that differ between two equal runs; the checksum includes the times."""


def rows(directory: Path) -> list[dict[str, object]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


def assert_same_run(one: Path, other: Path, step: int, on_policy: bool = True) -> None:
    """Assert that weights, optimizer, source, random states and metrics are bitwise equal."""
    assert rows(one) == rows(other)
    a, b = (load(p / "checkpoints" / f"step-{step:06d}") for p in (one, other))
    assert a.files.keys() == b.files.keys() == {"model", "optimizer"} | ({"source"} if on_policy else set())
    for name in a.files:
        assert a.files[name].keys() == b.files[name].keys()
        for key, x in a.files[name].items():
            assert torch.equal(x, b.files[name][key]), key
    assert a.state | {"seconds": 0} == b.state | {"seconds": 0}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run of 120 steps without interruption."""
    directory = tmp_path_factory.mktemp("whole")
    small_run(directory, 120)
    return directory


@pytest.fixture(scope="module")
def children() -> multiprocessing.context.ForkServerContext:
    """Return a context that starts processes with torch already imported."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.training"])
    warmup = context.Process(target=time.sleep, args=(0,))
    warmup.start()
    warmup.join()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return context


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.005)


@pytest.mark.slow
def test_rollouts_are_logged_once_under_their_first_step(
    uninterrupted: Path,
) -> None:
    rollouts = [row for row in rows(uninterrupted) if row["split"] == "rollouts"]
    assert [row["step"] for row in rollouts] == list(range(1, 121, 3))
    assert len({row["sum"] for row in rollouts}) > 1


@pytest.mark.slow
def test_a_run_killed_twenty_times_equals_an_uninterrupted_one(
    tmp_path: Path, uninterrupted: Path, children: multiprocessing.context.ForkServerContext
) -> None:
    rng = random.Random(0)
    kills = 0
    directory = tmp_path / "run"
    while kills < 20 or not (directory / "ended").exists():
        if (directory / "ended").exists():  # finished before the twentieth kill: compare, and start another run
            assert_same_run(uninterrupted, directory, 120)
            shutil.rmtree(directory)
        child = children.Process(target=training.run_in_process, args=(str(directory), 120))
        child.start()
        wait_until(lambda child=child: (directory / "lock").exists() or not child.is_alive())
        if kills < 20:
            child.join(rng.uniform(0.02, 0.5))
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                kills += 1
        child.join()
        assert child.exitcode in (0, -signal.SIGKILL)
    assert (directory / "ended").read_text() == "finished"
    assert_same_run(uninterrupted, directory, 120)


@pytest.mark.slow
def test_ctrl_c_saves_and_explains_how_to_resume(
    tmp_path: Path, uninterrupted: Path, children: multiprocessing.context.ForkServerContext
) -> None:
    child = children.Process(target=training.run_in_process, args=(str(tmp_path), 120))
    child.start()
    log = tmp_path / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.read_text().count('"train"') >= 5)
    os.kill(child.pid, signal.SIGINT)
    child.join()
    ended = (tmp_path / "ended").read_text()
    assert ended.startswith("stopped at step ")
    assert "run the same command again to resume" in ended
    step = int(ended.split()[3])
    assert 5 <= step < 120
    assert load(tmp_path / "checkpoints" / f"step-{step:06d}").state["step"] == step
    small_run(tmp_path, 120)
    assert_same_run(uninterrupted, tmp_path, 120)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once_with_valid_checkpoints(
    tmp_path: Path, children: multiprocessing.context.ForkServerContext
) -> None:
    child = children.Process(target=training.stuck_in_process, args=(str(tmp_path),))
    child.start()
    wait_until((tmp_path / "stuck").exists)  # in the middle of a step that takes a minute
    os.kill(child.pid, signal.SIGINT)
    time.sleep(0.2)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGINT)
    child.join(10)
    assert not child.is_alive()
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step-000001", "step-000002"]
    for path in (tmp_path / "checkpoints").iterdir():
        load(path)


def test_two_runs_cannot_share_a_directory(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} is training in this directory"):
        small_run(tmp_path, 2)
    small_run(tmp_path, 2)  # afterwards the lock is free


@pytest.mark.parametrize("later", ["save", "seconds"])
def test_deferred_reads_change_neither_rows_nor_resuming(
    later: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 steps on fixed data, saved at 7, 14 and 21, or read whenever 0 seconds have passed; the second run resumes at 14."""
    monkeypatch.setattr(trainer, "defers_reads", lambda device: True)
    monkeypatch.setattr(trainer, "READ_SECONDS", 0.0 if later == "seconds" else 10.0)

    def run(directory: Path, steps: int) -> None:
        torch.set_num_threads(1)
        train(
            small_model(), WithAccuracy(), small_batches(Chains()), directory, budget=Budget(max_steps=steps), recipe="r",
            schedule=Schedule("constant"), config=TrainerConfig(save_every=7, log_every=2, precision="fp32"), reporter=NullReporter(),
        )  # fmt: skip

    run(tmp_path / "whole", 25)
    run(tmp_path / "resumed", 14)
    run(tmp_path / "resumed", 25)
    assert [row["step"] for row in rows(tmp_path / "whole")] == [*range(2, 25, 2), 25]
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", 25, on_policy=False)
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)


def test_slow_steps_are_saved_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes longer than the limit, so each is saved; 0 steps between checkpoints means none but the last."""
    saved: list[int] = []
    write = checkpoint.save_state

    def count(directory: Path, state: Any, *args: Any, **options: Any) -> None:
        saved.append(state.step)
        write(directory, state, *args, **options)

    monkeypatch.setattr(checkpoint, "save_state", count)
    for every, seconds, expected in ((500, 1e-9, [1, 2, 3]), (500, 1e9, [3]), (500, 0.0, [3]), (0, 1e-9, [3])):
        saved.clear()
        config = TrainerConfig(save_every=every, save_seconds=seconds, precision="fp32")
        train(
            small_model(), WithAccuracy(), small_batches(Chains()), tmp_path / f"{every}-{seconds}", budget=Budget(max_steps=3),
            recipe="r", schedule=Schedule("constant"), config=config, reporter=NullReporter(),
        )  # fmt: skip
        assert saved == expected


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    first = small_run(tmp_path, 4)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}
    again = small_run(tmp_path, 4)
    assert again == first
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}


def test_another_recipe_or_model_is_rejected(tmp_path: Path) -> None:
    small_run(tmp_path, 2)
    with pytest.raises(UserError, match=r"another recipe \(r, this one is other\)"):
        small_run(tmp_path, 4, recipe="other")
    model = small_model()
    model.heads["extra"] = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"'heads.extra.bias' is only in the model"):
        small_run(tmp_path, 4, model=model)


def test_a_damaged_checkpoint_is_skipped_on_resume(tmp_path: Path, uninterrupted: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "checkpoints" / "step-000120" / "optimizer.safetensors"
    last.write_bytes(last.read_bytes()[:-1] + b"!")
    small_run(tmp_path, 120)
    assert_same_run(uninterrupted, tmp_path, 120)


def test_frequent_validation_changes_no_weight(tmp_path: Path) -> None:
    often = TrainerConfig(eval_every=1, save_every=1, log_every=5, precision="fp32")
    never = TrainerConfig(eval_every=0, save_every=0, precision="fp32")
    small_run(tmp_path / "often", 6, often)
    small_run(tmp_path / "never", 6, never)
    a, b = (load(tmp_path / n / "checkpoints" / "step-000006") for n in ("often", "never"))
    assert all(torch.equal(x, b.files["model"][k]) for k, x in a.files["model"].items())
    assert a.state["random"] == b.state["random"]


def test_accumulation_does_not_change_the_gradient() -> None:
    grads = []
    for accumulate in (1, 3, 7):
        model = small_model(dropout=0.0)
        means = step(model, WithAccuracy(), small_batches(Chains(), accumulate).batches(0))
        grads.append((means, {n: p.grad.clone() for n, p in model.named_parameters()}))
    for means, found in grads[1:]:
        for term, value in grads[0][0].items():
            assert value.item() == pytest.approx(means[term].item(), rel=1e-5)
        for name, g in grads[0][1].items():
            assert torch.allclose(g, found[name], atol=1e-6, rtol=1e-4), name


class SometimesNan(WithAccuracy):
    """The loss is NaN in the given calls."""

    bad: frozenset[int] = frozenset()
    calls: list[int]

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(model, outputs, batch)
        self.calls.append(len(self.calls))
        if self.calls[-1] in self.bad:
            terms["tokens"] = terms["tokens"] * float("nan")
        return terms


def run_with_nan(directory: Path, bad: frozenset[int], steps: int, limit: int = 10) -> trainer.TrainingResult:
    objective = SometimesNan()
    object.__setattr__(objective, "bad", bad)
    object.__setattr__(objective, "calls", [])
    config = TrainerConfig(save_every=0, max_bad_steps=limit, precision="fp32")
    return train(
        small_model(dropout=0.0), objective, small_batches(Chains(), accumulate=1), directory,
        budget=Budget(max_steps=steps), schedule=Schedule("constant", warmup_ratio=0.0), config=config, reporter=NullReporter(),
    )  # fmt: skip


@pytest.fixture(params=["read", "deferred"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read each step, as on a CPU, or let the device decide and read later, as on a GPU."""
    monkeypatch.setattr(trainer, "defers_reads", lambda device: request.param == "deferred")


@pytest.mark.usefixtures("way")
def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path: Path) -> None:
    found = run_with_nan(tmp_path, frozenset({1, 2}), steps=4)
    assert found.skipped == 2
    log = rows(tmp_path)
    assert [row["loss"] is None for row in log] == [False, True, True, False]
    assert [row["skipped"] for row in log] == [0, 1, 2, 2]
    saved = load(tmp_path / "checkpoints" / "step-000004")
    assert all(torch.isfinite(x).all() for x in saved.files["model"].values())
    assert {x.item() for k, x in saved.files["optimizer"].items() if k.startswith("step/")} == {2}


@pytest.mark.usefixtures("way")
def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 steps in a row, the last of them step 5, .* lower optimizer.lr"):
        run_with_nan(tmp_path, frozenset({0, 2, 3, 4}), steps=9, limit=3)


def test_a_run_without_labels_is_rejected(tmp_path: Path) -> None:
    class NoLabels(WithAccuracy):
        def build_example(self, example, vocab, rng):  # type: ignore[no-untyped-def]
            built = super().build_example(example, vocab, rng)
            return built | {"labels": built["labels"] * 0 + IGNORE}

    batches = small_batches(Chains())
    batches.objective = NoLabels()
    with pytest.raises(UserError, match=r"no labels in the field 'labels' \(loss term 'tokens'\)"):
        train(small_model(), NoLabels(), batches, tmp_path, budget=Budget(max_steps=2), reporter=NullReporter())


@pytest.mark.slow
def test_a_budget_in_seconds_counts_only_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by 0.01 s per call, and by 100 s during validation."""
    now = [0.0]

    def clock() -> float:
        now[0] += 0.01
        return now[0]

    def slow(_model: LM, _step: int) -> dict[str, float]:
        now[0] += 100
        return {"loss": 1.0}

    monkeypatch.setattr("firth.training.trainer.time.perf_counter", clock)
    found = train(
        small_model(), WithAccuracy(), small_batches(), tmp_path, budget=Budget(max_seconds=0.3), evaluate=slow,
        config=TrainerConfig(eval_every=5), reporter=NullReporter(),
    )  # fmt: skip
    assert 0.3 <= found.seconds < 0.35
    assert 14 <= found.step <= 16  # two calls of the clock in a step
    assert found.metrics["rate"] < 0.2 * OptimizerConfig().lr  # the end of the schedule


@pytest.mark.slow
def test_training_learns_and_reports_progress(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "firth")
    found = train(
        small_model(dropout=0.0), WithAccuracy(), small_batches(Chains()), tmp_path, name="chains",
        budget=Budget(max_steps=60), optimizer=OptimizerConfig(lr=0.01), reporter=LineReporter("chains", every=0.0),
        evaluate=lambda model, _: validate(model, WithAccuracy(), small_batches(Chains()).all_batches(), bytes_per_target=2.0),
    )  # fmt: skip
    log = rows(tmp_path)
    assert log[0]["loss"] > 3
    assert found.metrics["valid/loss"] < 1
    assert found.metrics["valid/accuracy"] > 0.8
    assert found.metrics["valid/bits_per_byte"] == pytest.approx(found.metrics["valid/loss"] / 0.6931472 / 2.0)
    out = caplog.messages
    assert out[0].startswith("chains   2%  step 1/60  loss 3.")
    assert all(word in out[-2] for word in ("step 60/60", "tokens/s", "FLOP/s", "left"))


def test_rows_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for n in range(1, 5):
        log.row("train", n, 0.5 * n, n, {"loss": float("inf") if n == 2 else 1.0})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"split": "tra')
    MetricsLog(tmp_path, 3).close()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1.0), (2, None), (3, 1.0)]


def test_validation_is_the_mean_over_all_labels() -> None:
    model = small_model(dropout=0.5)
    model.train()
    whole = validate(model, WithAccuracy(), [*small_batches(Chains()).all_batches()])
    assert model.training
    one_by_one = validate(
        model,
        WithAccuracy(),
        training.Batches(Chains(), WithAccuracy(), training.VOCAB, batch_size=1, seed=0).all_batches(),
    )
    assert whole["loss"] == pytest.approx(one_by_one["loss"], rel=1e-5)
    assert whole["accuracy"] == pytest.approx(one_by_one["accuracy"], rel=1e-5)


def test_denormals_are_flushed_on_every_thread(tmp_path: Path) -> None:
    """The threads of torch's pool exist before, so the setting has to reach each of them."""
    flush_denormals(False)
    small = torch.full((1 << 22,), 100, dtype=torch.int32).view(torch.float32)  # 1.4e-43 each

    def num_nonzero() -> int:
        return int((small * 1).view(torch.int32).count_nonzero())

    assert num_nonzero() == small.numel()
    supported = flush_denormals()
    flush_denormals(False)
    assert num_nonzero() == small.numel()
    small_run(tmp_path, 1)
    assert num_nonzero() == (0 if supported else small.numel())


def test_measured_speed_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path))
    measured_speed.cache_clear()
    first = measured_speed(size=64, seconds=0.001)
    assert min(first.values()) > 0
    measured_speed.cache_clear()  # another process
    monkeypatch.setattr("firth.training.device.record_speed", None)  # not measured again
    assert measured_speed(size=64, seconds=0.001) == first
    measured_speed.cache_clear()


def test_precision_follows_the_measured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert choose_precision("bf16", cpu) == "bf16"
    for speed, expected in (({"fp32": 1.0, "bf16": 2.0}, "bf16"), ({"fp32": 1.0, "bf16": 1.1}, "fp32")):
        monkeypatch.setattr("firth.training.device.measured_speed", lambda speed=speed: speed)
        assert choose_precision("auto", cpu) == expected


def test_sums_over_a_single_rank_are_the_identity() -> None:
    x = torch.randn(3)
    assert torch.equal(Ranks().sum(x.clone()), x)
    assert Ranks().gather(x).shape == (1, 3)


@pytest.mark.usefixtures("way")
def test_infinite_weights_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and gradient of the last step are finite, but its update is not: the run fails with the cause."""

    def update(optimizer: trainer.Optimizer, *arguments: Any) -> None:
        original(optimizer, *arguments)
        with torch.no_grad():
            optimizer.parameters[0].view(-1)[3] *= float("inf")

    original = trainer.Optimizer.step
    monkeypatch.setattr(trainer.Optimizer, "step", update)
    for steps in (1, 4):
        with pytest.raises(
            UserError, match=r"the optimizer has made the weight '.*' infinite or NaN.*lower optimizer.lr"
        ):
            train(
                small_model(),
                WithAccuracy(),
                small_batches(Chains()),
                tmp_path,
                budget=Budget(max_steps=steps),
                reporter=NullReporter(),
            )
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.usefixtures("way")
def test_divergence_at_a_huge_learning_rate_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends at step 4 on a loss .* not finite \(\d in a row\)|has made the weight"):
        train(small_model(), WithAccuracy(), small_batches(Chains()), tmp_path, budget=Budget(max_steps=4),
              optimizer=OptimizerConfig(lr=1e30), schedule=Schedule("constant", warmup_ratio=0.0), reporter=NullReporter())  # fmt: skip
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [{0, 1, 2}, {2}])
def test_a_final_loss_that_is_not_finite_is_an_error(bad: set[int], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"ends at step 3 on a loss .* not finite \({len(bad)} in a row\)"):
        run_with_nan(tmp_path, frozenset(bad), steps=3, limit=9)
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.parametrize(("name", "value"), [("loss", "nan"), ("loss/answers", "inf"), ("accuracy", "nan")])
def test_a_validation_metric_that_is_not_finite_is_an_error(name: str, value: str, tmp_path: Path) -> None:
    """The weights are finite, the second validation is not: the earlier checkpoint stays."""
    values = iter([0.5, float(value)])
    message = rf"step 4: the validation {name} is {value}, while all weights are finite, so the model is not saved"
    with pytest.raises(UserError, match=message):
        train(
            small_model(), WithAccuracy(), small_batches(Chains()), tmp_path, budget=Budget(max_steps=6), reporter=NullReporter(),
            config=TrainerConfig(eval_every=2, save_every=2), evaluate=lambda model, step: {name: next(values)},
        )  # fmt: skip
    assert [path.name for path in (tmp_path / "checkpoints").glob("*")] == ["step-000002"]


def test_an_infinite_perplexity_with_a_finite_loss_is_valid(tmp_path: Path) -> None:
    found = train(
        small_model(), WithAccuracy(), small_batches(Chains()), tmp_path, budget=Budget(max_steps=1), reporter=NullReporter(),
        evaluate=lambda model, step: {"loss": 1000.0, "perplexity": float("inf")},
    )  # fmt: skip
    assert found.metrics["valid/loss"] == 1000.0


def test_frozen_weights_are_hashed_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, hashed, frozen = small_model(), [], checkpoint.frozen
    model.tokens.weight.requires_grad_(False)

    def counted(model: LM, ranks: Ranks) -> dict[str, Tensor]:
        hashed.append(frozen(model, ranks))
        return hashed[-1]

    monkeypatch.setattr(checkpoint, "frozen", counted)
    small_run(tmp_path, 6, TrainerConfig(save_every=2, keep=3, precision="fp32"), model=model)
    saved = [load(path).files["frozen"] for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert len(saved) == 3
    assert len(hashed) == 1
    assert all(torch.equal(files["sha256"], hashed[0]["sha256"]) for files in saved)


def test_batches_for_a_gpu_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 1)
    assert [batch["tokens"].tolist() for batch in pinned([{"tokens": torch.zeros(2)}])] == [[1.0, 1.0]]
