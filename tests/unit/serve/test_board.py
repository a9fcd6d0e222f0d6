"""The board of runs: rows as they are written, states, runs that begin later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from starlette.testclient import TestClient

from firth.serve.app import create_app
from firth.serve.board import MAX_ROWS, Board, MetricsFile, board_routes
from firth.serve.config import ServeConfig
from firth.training.logging import MetricsLog


def row(step: int, split: str = "train", **values: float) -> dict[str, Any]:
    return {"split": split, "step": step, "seconds": step / 2, "tokens": 100 * step, "loss": 5.0 - step / 100} | values


def line(step: int, split: str = "train") -> str:
    return json.dumps(row(step, split)) + "\n"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty directory of runs, relative to the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    return Path("runs")


def client(board: Board) -> TestClient:
    return TestClient(create_app(None, ServeConfig(), board_routes(board)), base_url="http://localhost")


def test_an_incomplete_last_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.update()
    assert file.since(0) == []
    text = line(1) + line(2)
    for end in range(len(text) + 1):  # as a writer may be interrupted anywhere
        path.write_text(text[:end])
        file.update()
        assert [one["step"] for one in file.since(0)] == [1, 2][: text[:end].count("\n")]
    assert file.version == 0 and file.since(0)[0] == row(1)


def test_characters_that_are_cut_in_half_do_no_harm(tmp_path: Path) -> None:
    path, file = tmp_path / "metrics.jsonl", MetricsFile(tmp_path / "metrics.jsonl")
    whole = json.dumps(row(1) | {"note": "čaj"}, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(whole[: whole.index("č".encode()) + 1])
    file.update()
    path.write_bytes(whole)
    file.update()
    assert [one["note"] for one in file.since(0)] == ["čaj"]


def test_a_resumed_run_is_read_from_its_beginning(runs: Path) -> None:
    """`MetricsLog` removes the rows after the checkpoint and appends; the client is sent all rows."""
    run = runs / "gpt"
    run.mkdir()
    log = MetricsLog(run, 0)
    for step in range(1, 11):
        log.row("train", step, step, step, {"loss": 3.0})
    log.close()
    with client(Board([runs])) as http:
        first = http.get("/runs/runs/gpt/metrics").json()
        assert [one["step"] for one in first["rows"]] == [*range(1, 11)] and first["next"] == 10
        assert "crc" not in first["rows"][0]
        query = {"from": first["next"], "version": first["version"]}
        assert http.get("/runs/runs/gpt/metrics", params=query).json()["rows"] == []
        log = MetricsLog(run, 4)
        for step in range(5, 13):
            log.row("train", step, step, step, {"loss": 2.0})
        log.close()
        second = http.get("/runs/runs/gpt/metrics", params=query).json()
        assert second["restarted"] and [one["step"] for one in second["rows"]] == [*range(1, 13)]
        assert [one["loss"] for one in second["rows"][3:5]] == [3.0, 2.0]
        query = {"from": second["next"], "version": second["version"]}
        third = http.get("/runs/runs/gpt/metrics", params=query).json()
        assert (third["rows"], third["restarted"]) == ([], False)


def test_only_new_rows_are_sent(runs: Path) -> None:
    (runs / "a").mkdir()
    path = runs / "a" / "metrics.jsonl"
    path.write_text(line(1) + line(1, "valid"))
    with client(Board([runs])) as http:
        assert http.get("/runs/runs/a/metrics?from=0").json()["next"] == 2
        with path.open("a") as file:
            file.write(line(2) + line(3)[:20])
        found = http.get("/runs/runs/a/metrics?from=2").json()
        assert [one["step"] for one in found["rows"]] == [2] and found["next"] == 3


def test_lines_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        line(1).encode() + b"\xff\xfe\n[1]\n{}\n" + b'{"step": "x", "split": "train"}\n' + line(2).encode()
    )
    file = MetricsFile(path)
    file.update()
    assert [one["step"] for one in file.since(0)] == [1, 2]


def test_runs_that_begin_later_appear(runs: Path) -> None:
    board = Board([runs, Path("later")])
    with client(board) as http:
        assert http.get("/runs").json() == {"runs": []}
        (runs / "pipeline" / "sft").mkdir(parents=True)
        (runs / "pipeline" / "sft" / "metrics.jsonl").write_text(line(3))
        Path("later").mkdir()
        Path("later/recipe.yaml").write_text(
            "name: bert\nobjective: [{kind: mlm}, {kind: nsp}]\nbudget: {max_steps: 50, max_seconds: 0.0}\n"
        )
        found = {one["name"]: one for one in http.get("/runs").json()["runs"]}
    assert found.keys() == {"runs/pipeline/sft", "later"}
    assert found["runs/pipeline/sft"]["step"] == 3 and found["runs/pipeline/sft"]["last"]["train"]["loss"] == 4.97
    late = found["later"]
    assert (late["recipe"], late["objective"], late["budget"]) == ("bert", "mlm + nsp", {"max_steps": 50})
    assert (late["state"], late["step"]) == ("preparing", 0)


def test_a_recipe_that_is_half_written_is_read_later(runs: Path) -> None:
    run = runs / "a"
    run.mkdir()
    (run / "recipe.yaml").write_text("name: gpt\nbudget: {max_st")
    board = Board([run])
    assert board.summaries()[0]["recipe"] == ""
    (run / "recipe.yaml").write_text("name: gpt\nbudget: {max_steps: 5}")
    os.utime(run / "recipe.yaml", (1, 1))
    assert board.summaries()[0]["recipe"] == "gpt"


def test_states_of_runs(runs: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name, process in (
        ("alive", os.getpid()),
        ("killed", ended.pid),
        ("done", os.getpid()),
        ("odd", "x"),
        ("group", 0),
        ("all", -1),
    ):
        (runs / name).mkdir()
        (runs / name / "metrics.jsonl").write_text(line(1))
        (runs / name / "lock").write_text(str(process))
    (runs / "done" / "done.json").write_text("{}")
    states = {one["name"]: one["state"] for one in Board([runs]).summaries()}
    assert states == {
        "runs/alive": "training", "runs/killed": "stopped", "runs/done": "finished", "runs/odd": "stopped",
        "runs/group": "stopped", "runs/all": "stopped",
    }  # fmt: skip


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    """Every k-th training step is kept, and the last one; rows of other splits are thinned by themselves."""
    path, file = tmp_path / "metrics.jsonl", MetricsFile(tmp_path / "metrics.jsonl")
    path.write_text("".join(line(step) for step in range(1, 3 * MAX_ROWS)) + line(7, "valid") + line(3 * MAX_ROWS))
    file.update()
    found = file.since(0)
    train = [one["step"] for one in found if one["split"] == "train"]
    assert MAX_ROWS / 2 < len(train) <= MAX_ROWS + 1 and train[-1] == 3 * MAX_ROWS
    assert set(np.diff(train[:-1])) == {4} and train[0] == 1
    assert [one["step"] for one in found if one["split"] == "valid"] == [7] and file.count == 3 * MAX_ROWS + 1
    with path.open("a") as added:
        added.write("".join(line(3 * MAX_ROWS + i) for i in range(1, 6)))
    file.update()
    new = [one["step"] for one in file.since(3 * MAX_ROWS + 1)]
    assert new[-1] == 3 * MAX_ROWS + 5 and len(new) == 2


def test_memory_does_not_grow_with_a_run(runs: Path) -> None:
    (runs / "long").mkdir()
    with (runs / "long" / "metrics.jsonl").open("w") as file:
        for step in range(20_000):
            file.write(line(step))
    board = Board([runs])
    tracemalloc.start()
    board.summaries()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def odd_runs() -> dict[str, Callable[[Path], Any]]:
    """Return what may be in a run directory, by name."""

    def metrics(text: str) -> Callable[[Path], Any]:
        return lambda run: (run / "metrics.jsonl").write_text(text)

    def recipe(text: str) -> Callable[[Path], Any]:
        return lambda run: (run / "recipe.yaml").write_text(text)

    def old(run: Path) -> None:
        (run / "recipe.yaml").write_text("name: old")
        os.utime(run / "recipe.yaml", (0, 0))

    def named(name: str, kind: Callable[[Path], Any]) -> Callable[[Path], Any]:
        return lambda run: ((run / "recipe.yaml").write_text("name: x"), kind(run / name))

    start = '{"step": 1, "split": "train", '
    return {
        "nan": metrics(start + '"loss": NaN}\n'), "infinity": metrics(start + '"loss": 1e999}\n'),
        "surrogate": metrics(start + '"note": "\\ud800", "\\ud800": 1}\n'), "nested": metrics(start + '"x": [NaN]}\n'),
        "long line": metrics(start + f'"x": "{"x" * (3 << 20)}"}}\n' + line(2)), "digits": metrics(start + f'"x": {"1" * 5000}}}\n'),
        "directory": named("metrics.jsonl", Path.mkdir), "pipe": named("metrics.jsonl", os.mkfifo), "lock": named("lock", os.mkfifo),
        "old": old, "budget nan": recipe("budget: {max_steps: .nan}\nname: [1]"),
        "budget date": recipe("budget: {1: 2, max: 2020-01-01}\nname: 2020-01-01"),
        "escaped": recipe('name: "\\uD800"\nobjective: [{kind: "\\uD800"}, {}]'), "bytes": recipe("name: !!binary aGk="),
    }  # fmt: skip


@pytest.mark.parametrize("name", odd_runs())
def test_an_odd_run_does_not_hide_the_others(runs: Path, name: str) -> None:
    for run in ("good", name):
        (runs / run).mkdir()
    (runs / "good" / "metrics.jsonl").write_text(line(1))
    odd_runs()[name](runs / name)
    with client(Board([runs])) as http:
        found = {one["name"]: one for one in http.get("/runs").json()["runs"]}
        assert found["runs/good"]["step"] == 1 and found.keys() == {"runs/good", f"runs/{name}"}
        assert http.get(f"/runs/runs/{name}/metrics").status_code == 200
    if name in ("nan", "infinity"):
        assert found[f"runs/{name}"]["last"]["train"]["loss"] is None
    if name == "long line":
        assert found["runs/long line"]["step"] == 2
    if name == "old":
        assert found["runs/old"]["recipe"] == "old"


def test_a_run_whose_name_is_no_text_is_shown(runs: Path) -> None:
    directory = os.fsencode(runs) + b"/r\xff"
    os.mkdir(directory)
    with open(directory + b"/metrics.jsonl", "w") as file:
        file.write(line(4))
    with client(Board([runs])) as http:
        [found] = http.get("/runs").json()["runs"]
        assert (found["name"], found["step"]) == ("runs/r\\xff", 4)
        assert http.get(f"/runs/{quote(found['name'], safe='')}/metrics").json()["next"] == 1


def test_only_runs_of_the_board_are_read(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "metrics.jsonl").write_text(line(1))
    (runs / "a").mkdir()
    (runs / "a" / "metrics.jsonl").write_text(line(1))
    with client(Board([runs])) as http:
        for name in ("private", "runs%2F..%2Fprivate", f"{tmp_path}/private".replace("/", "%2F"), "runs/b"):
            assert http.get(f"/runs/{name}/metrics").status_code == 404
        assert http.get("/runs/runs%2Fa/metrics").status_code == 200
        for query in ("from=-1", "from=x", "from=1e9", "version=1.5", "from=²"):
            answer = http.get(f"/runs/runs/a/metrics?{query}")
            assert answer.status_code == 400 and "give a row number" in answer.json()["error"]["message"]
        assert http.get("/runs/runs/a/metrics?from=99").json()["restarted"]
