"""Claims of processes on jobs: one owner, dead owners here and on another machine, jobs that are run once."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from firth.runs import workers
from firth.runs.workers import RELEASED, ClaimLostError, Claims, WorkUnit, preparing, start_workers, work
from firth.types import UserError
from tests.support.runs import quiet

HOLDER = """
import sys, time
from pathlib import Path
from firth.runs.workers import Claims
with Claims(Path(sys.argv[1])).take("job"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_claim_has_one_owner_until_it_is_released(tmp_path: Path) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    claim = first.take("share-0.5")
    assert claim is not None
    with claim:
        assert second.take("share-0.5") is None
        other = second.take("share-0")  # another group, though its name is the beginning of the first
        assert other is not None
        with other:
            pass
    again = second.take("share-0.5")
    assert again is not None and again.deaths == 0
    with again:
        again.check()


@pytest.mark.slow
def test_the_claim_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    for deaths in (1, 2):
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as owner:
            assert owner.stdout is not None and owner.stdout.readline() == "held\n"
            assert claims.take("job") is None
            owner.kill()
        if deaths == 2:
            claim = claims.take("job")
            assert claim is not None and claim.deaths == 2
            with claim:
                pass
    after = claims.take("job")
    assert after is not None and after.deaths == 0


def elsewhere(directory: Path, text: str) -> Path:
    """Write a claim as a process on another machine does."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "job.1"
    file.write_text(text)
    return file


@pytest.mark.parametrize("text", ['{"machine": "another one", "process": 3}', ""])
def test_a_silent_owner_on_another_machine_is_dead(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SILENCE_SECONDS", 0.2)
    file, claims = elsewhere(tmp_path, text), Claims(tmp_path)
    os.utime(file, (1.0, 1.0))  # its clock may be years behind
    assert claims.take("job") is None
    time.sleep(0.15)
    os.utime(file, (2.0, 2.0))  # it is alive
    assert claims.take("job") is None
    time.sleep(0.15)
    assert claims.take("job") is None
    time.sleep(0.1)
    claim = claims.take("job")
    assert claim is not None and claim.deaths == 1


def test_a_released_claim_of_another_machine_is_free(tmp_path: Path) -> None:
    elsewhere(tmp_path, RELEASED)
    assert Claims(tmp_path).take("job") is not None


def test_a_replaced_owner_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(job: WorkUnit, claim: workers.Claim) -> None:
        ran.append(job.name)
        if len(ran) == 1:  # it was suspended meanwhile, and another machine has replaced it and is done
            claim.following.write_text(RELEASED)
            claim.check()
            ran.append("not stopped")

    lines: list[str] = []
    work([WorkUnit("a", "a")], Claims(tmp_path), lambda _: len(ran) > 1, run, lines.append)
    assert ran == ["a", "a"]
    assert any("another process has taken over" in line for line in lines)


def test_owners_touch_their_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.02)
    claim = Claims(tmp_path).take("job")
    assert claim is not None
    with claim:
        os.utime(claim.file, (1.0, 1.0))
        deadline = time.monotonic() + 10
        while claim.file.stat().st_mtime == 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_many_workers_run_every_job_once_and_groups_in_order(tmp_path: Path) -> None:
    jobs = [WorkUnit(f"{group}{n}", group) for n in range(6) for group in "abcde"]
    ran: list[str] = []

    def one_worker() -> None:
        def run(job: WorkUnit, _: workers.Claim) -> None:
            time.sleep(0.002)
            ran.append(job.name)
            (tmp_path / job.name).touch()

        work(jobs, Claims(tmp_path / "claims"), lambda job: (tmp_path / job.name).exists(), run, quiet)

    threads = [threading.Thread(target=one_worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(ran) == sorted(job.name for job in jobs)
    for group in "abcde":
        assert [name for name in ran if name[0] == group] == [f"{group}{n}" for n in range(6)]


def test_a_job_that_kills_its_processes_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SILENCE_SECONDS", -1.0)
    for n in (1, 2, 3):
        (tmp_path / f"job.{n}").write_text(json.dumps({"machine": "another one"}))
    for _ in range(2):  # the next process does not try again either
        with pytest.raises(UserError, match=r"large: the last 3 processes that ran this ended without a message"):
            work(
                [WorkUnit("large", "job")],
                Claims(tmp_path),
                lambda _: False,
                lambda *_: pytest.fail("it was run"),
                quiet,
            )
    for file in tmp_path.glob("job.*"):  # as the message says
        file.unlink()
    assert Claims(tmp_path).take("job", workers.MAX_DEATHS) is not None


def test_a_claim_that_cannot_be_written_blocks_nobody(tmp_path: Path) -> None:
    claim, before = Claims(tmp_path).take("job"), resource.getrlimit(resource.RLIMIT_FSIZE)
    assert claim is not None
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # the rest of a write fails as on a full disk
        with pytest.raises(UserError, match=r"job\.1: .*; free some room"), claim:
            pytest.fail("it was entered")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = Claims(tmp_path).take("job")
    assert again is not None and again.deaths == 0


def test_a_directory_that_another_process_prepares(tmp_path: Path) -> None:
    claims, entered = tmp_path / "out" / "claims", threading.Event()

    def second() -> None:
        with preparing(claims, "record.json", "sweep"):
            entered.set()

    with preparing(claims, "record.json", "sweep"):
        (tmp_path / "out" / "record.json.partial").touch()
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.1)
        (tmp_path / "out" / "record.json.partial").rename(tmp_path / "out" / "record.json")
    thread.join(10)
    assert entered.is_set()


@pytest.mark.parametrize("name", ["out/notes.txt", "out"])
def test_a_directory_of_something_else_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=r"holds no sweep|a file is where"):
        preparing(tmp_path / "out" / "claims", "record.json", "sweep").__enter__()
    assert (tmp_path / name).read_text() == "mine" and not (tmp_path / "out" / "claims").exists()


def test_an_error_of_a_job_frees_its_claim(tmp_path: Path) -> None:
    def run(job: WorkUnit, _: workers.Claim) -> None:
        raise UserError("the data is missing")

    with pytest.raises(UserError, match="the data is missing"):
        work([WorkUnit("a", "a")], Claims(tmp_path), lambda _: False, run, quiet)
    again = Claims(tmp_path).take("a")
    assert again is not None and again.deaths == 0


def touch_jobs(directory: Path, kill: bool) -> None:
    """Touch a file for each of four jobs; one process ends itself in its first job."""

    def run(job: WorkUnit, claim: workers.Claim) -> None:
        if kill and job.name == "0" and not claim.deaths:
            os.kill(os.getpid(), 9)
        (directory / job.name).touch()

    jobs = [WorkUnit(str(n), str(n)) for n in range(4)]
    work(jobs, Claims(directory / "claims"), lambda job: (directory / job.name).exists(), run)


def fail(directory: Path) -> None:
    raise UserError("nothing works")


@pytest.mark.slow
def test_workers_replace_one_that_was_killed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start_workers(2, touch_jobs, (tmp_path, True))
    assert all((tmp_path / str(n)).exists() for n in range(4))
    assert "ended before its work was done" in caplog.text
    with pytest.raises(UserError, match="worker 1 and worker 2 failed"):
        start_workers(2, fail, (tmp_path,))


def test_a_lost_claim_is_a_user_error() -> None:
    assert issubclass(ClaimLostError, UserError)
