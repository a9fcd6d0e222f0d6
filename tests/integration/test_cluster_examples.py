"""The files for clusters: scripts and YAML parse, their commands exist, and the preparation writes Slurm's files and a corpus."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from firth.data.corpus import PreparedCorpus
from tests.support.commands import ROOT, check_command
from tests.support.tiny_corpus import TEXTS, tokenizer

CLUSTER = ROOT / "examples" / "cluster"


def commands(script: str) -> list[str]:
    """Return the commands of firth in a shell script, with numbers and names in place of variables."""
    joined = re.sub(r"\\\n\s*", " ", script)
    found = re.findall(r"(?:-m )?(firth (?:prepare|train) [^\n]*)", joined)
    return [re.sub(r'"?\$\w+"?', "x", command) for command in found]


@pytest.mark.parametrize("name", ["train.sbatch", "sky.yaml"])
def test_shell_scripts_parse_and_their_commands_exist(name: str) -> None:
    text = (CLUSTER / name).read_text("utf-8")
    scripts = [text]
    if name.endswith(".yaml"):
        task = yaml.safe_load(text)
        assert {"resources", "num_nodes", "setup", "run"} <= task.keys()
        scripts = [task["setup"], task["run"]]
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")
    found = [command for script in scripts for command in commands(script)]
    assert found
    for command in found:
        check_command(command)


def test_the_ray_cluster_parses() -> None:
    cluster = yaml.safe_load((CLUSTER / "ray.yaml").read_text("utf-8"))
    assert cluster["max_workers"] == len(cluster["provider"]["worker_ips"])
    for command in (
        cluster["setup_commands"] + cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    ):
        assert subprocess.run(["bash", "-n"], input=command, text=True, capture_output=True).returncode == 0


@pytest.fixture
def text(tmp_path: Path) -> Path:
    pytest.importorskip("datatrove")
    (tmp_path / "text").mkdir()
    tokenizer().save(tmp_path / "tokenizer")
    rows = [json.dumps({"text": one}) + "\n" for one in TEXTS]
    for number in range(2):
        (tmp_path / "text" / f"{number}.jsonl").write_text("".join(rows[number::2]))
    return tmp_path


def prepare(folder: Path, *options: str, path: str = "") -> None:
    command = [
        sys.executable,
        str(CLUSTER / "prepare.py"),
        *(str(folder / n) for n in ("text", "corpus", "tokenizer")),
        *options,
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path + os.environ["PATH"]}
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_preparation_runs_here(text: Path) -> None:
    prepare(text, "--tasks", "2", "--workers", "1")
    assert 20 < PreparedCorpus.open(text / "corpus").manifest["documents"] <= len(TEXTS)


@pytest.mark.slow
def test_the_preparation_writes_jobs_for_slurm(text: Path) -> None:
    """A program in the place of sbatch keeps the scripts: an array of tasks, and one task after them."""
    (text / "bin").mkdir()
    fake = text / "bin" / "sbatch"
    fake.write_text(
        f'#!/bin/bash\nn=$(ls {text}/bin | wc -l)\ncp "${{!#}}" {text}/bin/job$n\necho "$@" > {text}/bin/args$n\necho $n\n'
    )
    fake.chmod(0o755)
    prepare(text, "--on", "slurm", "--tasks", "4", path=f"{text}/bin:")
    jobs = [job.read_text() for job in sorted((text / "bin").glob("job*"))]
    arrays = [re.findall("--array=(.*)", job) for job in jobs]
    assert arrays == [["0-3"], ["0-0"], ["0-0"], ["0-0"]]  # each with a job of its statistics
