"""The board of runs: rows as they are written, states, runs that begin later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from firth.serve.app import create_app
from firth.serve.board import MAX_TRAIN_ROWS, Board, MetricsFile, board_routes, thinned
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
    assert file.rows == []
    text = line(1) + line(2)
    for end in range(len(text) + 1):  # as a writer may be interrupted anywhere
        path.write_text(text[:end])
        file.update()
        assert [one["step"] for one in file.rows] == [1, 2][: text[:end].count("\n")]
    assert file.version == 0 and file.rows[0] == row(1)


def test_characters_that_are_cut_in_half_do_no_harm(tmp_path: Path) -> None:
    path, file = tmp_path / "metrics.jsonl", MetricsFile(tmp_path / "metrics.jsonl")
    whole = json.dumps(row(1) | {"note": "čaj"}, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(whole[: whole.index("č".encode()) + 1])
    file.update()
    path.write_bytes(whole)
    file.update()
    assert [one["note"] for one in file.rows] == ["čaj"]


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
    assert [one["step"] for one in file.rows] == [1, 2]


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
    for name, process in (("alive", os.getpid()), ("killed", ended.pid), ("done", os.getpid()), ("odd", "x")):
        (runs / name).mkdir()
        (runs / name / "metrics.jsonl").write_text(line(1))
        (runs / name / "lock").write_text(str(process))
    (runs / "done" / "done.json").write_text("{}")
    states = {one["name"]: one["state"] for one in Board([runs]).summaries()}
    assert states == {
        "runs/alive": "training", "runs/killed": "stopped", "runs/done": "finished", "runs/odd": "stopped",
    }  # fmt: skip


def test_long_runs_are_thinned() -> None:
    rows = [row(step) for step in range(1, 3 * MAX_TRAIN_ROWS)] + [row(7, "valid"), row(3 * MAX_TRAIN_ROWS)]
    found = thinned(rows)
    train = [one["step"] for one in found if one["split"] == "train"]
    assert len(train) == MAX_TRAIN_ROWS and train[-1] == 3 * MAX_TRAIN_ROWS
    assert [one["split"] for one in found].count("valid") == 1
    assert thinned(rows[:5]) == rows[:5]


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
