"""datatrove's executors write the same corpus: on this machine, after a kill, and as files for Slurm."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datatrove")

from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader

from firth.data.corpus import PreparedCorpus, open_stores
from firth.data.datatrove_steps import FirthManifest, FirthTokens
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError
from tests.support.tiny_corpus import TEXTS, write_text_folder

TASKS = 3


class KillOnce(PipelineStep):
    """Kills its process at the fifth document of rank 1, the first time."""

    name, type = "kill once", "Test"

    def __init__(self, marker: str) -> None:
        super().__init__()
        self.marker = marker

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        for number, document in enumerate(data):
            if rank == 1 and number == 5 and not os.path.exists(self.marker):
                with open(self.marker, "w"):
                    pass
                os.kill(os.getpid(), signal.SIGKILL)
            yield document


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("datatrove"))


def pipeline(folder: Path, out: Path, *steps: PipelineStep) -> list[PipelineStep]:
    reader = JsonlReader(str(folder / "text"), doc_progress=False)
    return [reader, LambdaFilter(long_enough), *steps, FirthTokens(str(out), str(folder / "tokenizer"), 0.1)]


def long_enough(document: Any) -> bool:
    return len(document.text) > 500


def finish(folder: Path, out: Path) -> PreparedCorpus:
    step = FirthManifest(str(out), str(folder / "tokenizer"), TASKS)
    LocalPipelineExecutor([step], logging_dir=str(out / "logs" / "manifest")).run()
    return PreparedCorpus.open(out)


def parts(out: Path) -> dict[str, str]:
    files = [path for path in sorted((out / "parts").rglob("*")) if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, str]:
    out = folder / "local"
    LocalPipelineExecutor(pipeline(folder, out), tasks=TASKS, workers=1, logging_dir=str(out / "logs")).run()
    finish(folder, out)
    return parts(out)


def test_a_local_executor_writes_a_corpus(folder: Path, local: dict[str, str]) -> None:
    train, valid = open_stores([folder / "local"], Tokenizer.load(folder / "tokenizer"))
    assert valid is not None
    assert len(train) + len(valid) == 2 * sum(len(text) > 500 for text in TEXTS)
    assert len(valid) % 2 == 0  # both copies of a document
    found = [
        Tokenizer.load(folder / "tokenizer").decode(store.tokens[1 : store.offsets[1] - 1]) for store in (train, valid)
    ]
    assert set(found) <= set(TEXTS)


def test_a_manifest_needs_every_task(folder: Path, tmp_path: Path) -> None:
    LocalPipelineExecutor(
        pipeline(folder, tmp_path), tasks=TASKS, local_tasks=2, workers=1, logging_dir=str(tmp_path / "logs")
    ).run()
    with pytest.raises(UserError, match=r"00002/part\.json is missing: task 2 of 3 has not ended"):
        list(FirthManifest(str(tmp_path), str(folder / "tokenizer"), TASKS).run(None))


def test_a_killed_task_changes_no_byte(folder: Path, local: dict[str, str], tmp_path: Path) -> None:
    """The process is killed at a document of its second task; the same executor then runs what is missing."""

    def run() -> None:
        steps = pipeline(folder, tmp_path, KillOnce(str(tmp_path / "killed")))
        LocalPipelineExecutor(steps, tasks=TASKS, workers=1, logging_dir=str(tmp_path / "logs")).run()

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (tmp_path / "parts" / "00000" / "part.json").exists()
    assert not (tmp_path / "parts" / "00001" / "part.json").exists()
    run()
    finish(folder, tmp_path)
    assert parts(tmp_path) == local


def test_two_attempts_at_a_part_do_not_meet(folder: Path, local: dict[str, str], tmp_path: Path) -> None:
    """A task runs while an earlier process of it has written half of the part; the part is complete, and replaced by equal bytes."""
    step = FirthTokens(str(tmp_path), str(folder / "tokenizer"), 0.1)

    def documents() -> Any:
        reader, keep, _ = pipeline(folder, tmp_path)
        return keep.run(reader.run(None, 1, TASKS), 1, TASKS)

    def interrupted() -> Any:
        for number, document in enumerate(documents()):
            if number == 5:
                list(step.run(documents(), 1, TASKS))
                assert parts(tmp_path) | written == parts(tmp_path)
            yield document

    written = {name: digest for name, digest in local.items() if name.startswith("parts/00001/")}
    assert list(step.run(interrupted(), 1, TASKS)) == []
    assert parts(tmp_path) == written


def test_a_slurm_executor_writes_its_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sbatch is not there: the script that it would be given is written, with one task per rank."""
    scripts: list[str] = []
    from datatrove.executor import slurm

    def submit(script: str, *_: Any) -> str:
        scripts.append(script)
        return "1"

    monkeypatch.setattr(slurm, "launch_slurm_job", submit)
    SlurmPipelineExecutor(
        pipeline(folder, tmp_path), tasks=TASKS, time="01:00:00", partition="cpu", logging_dir=str(tmp_path / "logs")
    ).run()
    assert len(scripts) == 2  # the tasks, and their statistics
    assert "#SBATCH --array=0-2" in scripts[0]
    assert "launch_pickled_pipeline" in scripts[0]
