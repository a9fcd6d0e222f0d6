"""Optional loggers of metrics: TensorBoard is real, wandb and mlflow are stand-ins that record their calls."""

import json
import logging
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import firth
from firth.training.logging import RUN_IDS

TINY = {
    "model.hidden_size": 32, "model.num_heads": 2, "model.num_layers": 1, "tokenizer.vocab_size": 300, "max_steps": 6,
    "checkpoint.every": 2, "evaluation.every": 3, "data.split_by": "line", "precision": "fp32",
}  # fmt: skip


class KilledError(Exception):
    """Ends a run in the middle."""


class Calls(list):
    """The calls of a stand-in module: (function, arguments)."""

    def record(self, name, result=None, fails_at=0):
        def call(*args, **named):
            self.append((name, *args, named))
            if fails_at and len(self.named(name)) == fails_at:
                raise ConnectionError("no route to host")
            return result

        return call

    def named(self, name):
        return [call[1:] for call in self if call[0] == name]


def stand_in(monkeypatch, name, **members):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin="stand-in")
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def fake_wandb(monkeypatch, fails_at=0):
    calls = Calls()
    run = SimpleNamespace(id="abc", log=calls.record("log", fails_at=fails_at), finish=calls.record("finish"))
    stand_in(monkeypatch, "wandb", init=calls.record("init", run))
    return calls


def fake_mlflow(monkeypatch):
    calls = Calls()
    run = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    names = ("log_params", "log_metrics", "end_run")
    stand_in(monkeypatch, "mlflow", start_run=calls.record("start_run", run), **{n: calls.record(n) for n in names})
    return calls


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text("".join(f"so shaken as we are {i} wan with care {i * i}\n" for i in range(200)), "utf-8")
    return path


def train(text, out, loggers, kill_after=None):
    """Train with loggers; `kill_after` ends the run after a training row of that step."""

    def on_metrics(row):
        if row["split"] == "train" and row["step"] == kill_after:
            raise KilledError

    recipe = firth.load_recipe("gpt", {**TINY, "data.path": text, "loggers": loggers})
    return firth.train(recipe, out, on_metrics=on_metrics)


def rows(out: Path):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_every_row_once_after_a_resume(text, tmp_path):
    """The run ends at step 5 after the checkpoint of step 4, so step 5 is trained twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KilledError):
        train(text, tmp_path, ["tensorboard"], kill_after=5)
    train(text, tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path)).Reload()
    for split in ("train", "valid"):
        expected = [(row["step"], row["loss"]) for row in rows(tmp_path) if row["split"] == split]
        assert [(e.step, pytest.approx(e.value)) for e in events.Scalars(f"{split}/loss")] == expected
    assert len(events.Scalars("train/loss")) == 6
    assert b"vocab_size" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]


def test_a_new_run_removes_the_events_of_one_without_checkpoint(text, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(KilledError):
        train(text, tmp_path, ["tensorboard"], kill_after=1)
    train(text, tmp_path, ["tensorboard"])
    assert [e.step for e in EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]


def test_wandb_gets_the_recipe_and_each_row_once(text, tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    monkeypatch.setenv("WANDB_PROJECT", "poems")
    with pytest.raises(KilledError):
        train(text, tmp_path, "wandb", kill_after=5)
    train(text, tmp_path, "wandb")
    first, second = (named for (named,) in calls.named("init"))
    assert first["project"] == "poems" and first["name"] == tmp_path.name and first["dir"] == tmp_path
    assert first["config"]["model"]["hidden_size"] == 32 and first["id"] and second["id"] == "abc"
    logged = [(step["step"], "train/loss" in metrics) for metrics, step in calls.named("log")]
    assert logged == [(row["step"], row["split"] == "train") for row in rows(tmp_path)]
    assert len(calls.named("finish")) == 2


def test_mlflow_gets_parameters_in_batches_and_metrics(text, tmp_path, monkeypatch):
    calls = fake_mlflow(monkeypatch)
    with pytest.raises(KilledError):
        train(text, tmp_path, ["mlflow"], kill_after=3)
    train(text, tmp_path, ["mlflow"])
    first, second = (named for (named,) in calls.named("start_run"))
    assert first["run_name"] == tmp_path.name and first["run_id"] is None and second["run_id"] == "r1"
    params = [params for params, _ in calls.named("log_params")]
    assert max(map(len, params)) <= 100 and sum(map(len, params)) > 100  # those of the first start only
    assert {k: v for one in params for k, v in one.items()}["batch.size"] == "8"
    assert [named["step"] for metrics, named in calls.named("log_metrics") if "train/loss" in metrics] == [*range(1, 7)]
    assert len(calls.named("end_run")) == 2


def test_a_logger_that_raises_does_not_end_the_run(text, tmp_path, monkeypatch, caplog):
    calls = fake_wandb(monkeypatch, fails_at=3)
    with caplog.at_level(logging.WARNING, "firth"):
        assert train(text, tmp_path, ["wandb", "tensorboard"]).steps == 6
    [warning] = [record.getMessage() for record in caplog.records if "logger" in record.getMessage()]
    assert "the logger wandb is turned off" in warning and "ConnectionError: no route to host" in warning
    assert len(calls.named("log")) == 3 and not calls.named("finish")
    assert [row["step"] for row in rows(tmp_path) if row["split"] == "train"] == [*range(1, 7)]
    assert any(tmp_path.glob("events.out.tfevents.*"))


def test_a_resumed_run_may_add_a_logger(text, tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    with pytest.raises(KilledError):
        train(text, tmp_path, [], kill_after=5)
    assert not (tmp_path / RUN_IDS).exists()
    train(text, tmp_path, ["wandb"])
    assert [step["step"] for _, step in calls.named("log")] == [5, 6, 6]
    assert json.loads((tmp_path / RUN_IDS).read_text()) == {"wandb": "abc"}


def test_a_missing_library_is_named_before_the_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(firth.UserError, match=r"loggers=wandb: .*pip install 'firth\[logging\]'"):
        train(text, tmp_path / "run", ["wandb"])
    assert not (tmp_path / "run").exists()
    with pytest.raises(firth.UserError, match=r"loggers.*tensorboard"):
        train(text, tmp_path / "run", ["tensorbord"])


def test_the_first_rank_alone_logs(text, tmp_path):
    settings = [f"{field}={value}" for field, value in {**TINY, "max_steps": 2, "data.path": text}.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "firth"]
    done = subprocess.run(
        [*command, "train", "gpt", "loggers=tensorboard", *settings, "--out", tmp_path / "run"],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len([*(tmp_path / "run").glob("events.out.tfevents.*")]) == 1
