"""datatrove's executor on Ray, with two CPUs of this machine: the same bytes as on one machine, also after kills."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

pytest.importorskip("datatrove")
pytest.importorskip("ray", reason="Ray is not installed: pip install 'firth[ray]'")

from datatrove.executor import LocalPipelineExecutor

from firth.data.corpus import PreparedCorpus
from firth.data.datatrove_steps import FirthManifest
from tests.support.commands import ROOT
from tests.support.ray_corpus import TASKS, steps
from tests.support.tiny_corpus import TEXTS, write_text_folder

pytestmark = pytest.mark.slow

SECONDS = 150
"""Of a run, most of them for the start of Ray; it is killed then."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_folder(tmp_path_factory.mktemp("ray"))


def end_session(leader: int) -> list[str]:
    """Kill the processes of a session, and return their names."""
    ended = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            name, _, fields = (place / "stat").read_text().rpartition(")")
            state, _, _, session = fields.split()[:4]
            if int(session) == leader and state != "Z":
                os.kill(int(place.name), signal.SIGKILL)
                ended.append(name.partition("(")[2])
    return ended


def in_session(command: Sequence[str], output: Path) -> tuple[int, str]:
    """Run a command; end all processes of its session; return its exit code and its output."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    with output.open("w") as file:
        child = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = child.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = -signal.SIGKILL
        finally:
            end_session(child.pid)
            child.wait()
    return code, output.read_text()


def run(folder: Path, out: Path, *options: str) -> tuple[int, str]:
    """Run the preparation on Ray; return its exit code and its output."""
    script = str(ROOT / "tests" / "support" / "ray_corpus.py")
    return in_session([sys.executable, script, str(folder), str(out), *options], out / "output.txt")


def files(folder: Path, out: Path) -> dict[str, str]:
    """Write the manifest over the parts, and return the hash of each file of the corpus."""
    LocalPipelineExecutor(
        [FirthManifest(str(out), str(folder / "tokenizer"), TASKS)], logging_dir=str(out / "logs" / "manifest")
    ).run()
    assert PreparedCorpus.open(out).manifest["documents"] == 2 * len(TEXTS)
    found = [out / "corpus.json", *(path for path in sorted((out / "parts").rglob("*")) if path.is_file())]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def local(folder: Path) -> dict[str, str]:
    out = folder / "local"
    LocalPipelineExecutor(steps(folder, out), tasks=TASKS, workers=1, logging_dir=str(out / "logs")).run()
    return files(folder, out)


def test_ray_writes_the_bytes_of_one_machine(folder: Path, local: dict[str, str], tmp_path: Path) -> None:
    code, output = run(folder, tmp_path)
    assert code == 0, output
    assert f"All {TASKS}/{TASKS} tasks" in output
    assert files(folder, tmp_path) == local


@pytest.mark.parametrize("what", ["worker", "parent"])
def test_a_killed_worker_changes_no_byte(folder: Path, local: dict[str, str], tmp_path: Path, what: str) -> None:
    """Ray starts the task again, in the same run; where only its parent died, the first process of the task goes on."""
    code, output = run(folder, tmp_path, "--kill", what)
    assert code == 0, output
    assert (tmp_path / "killed").read_text() == what
    assert "failed with RayActorError" in output, output
    assert f"All {TASKS}/{TASKS} tasks" in output
    assert files(folder, tmp_path) == local


def test_a_killed_task_is_done_by_the_next_run(folder: Path, local: dict[str, str], tmp_path: Path) -> None:
    """The pool of processes in a worker waits forever for a child that was killed, until the limit of the executor ends the run."""
    code, output = run(folder, tmp_path, "--kill", "task", "--limit", "20")
    assert code not in (0, -signal.SIGKILL), output
    assert not (tmp_path / "parts" / "00001").exists()
    code, output = run(folder, tmp_path, "--kill", "task")
    assert code == 0, output
    assert "run pipeline on 1 incomplete ranks" in output
    assert files(folder, tmp_path) == local


def test_the_example_runs_on_a_cluster_of_two(folder: Path, tmp_path: Path) -> None:
    """The commands of ray.yaml start a head and a worker, both here; the autoscaler, which logs in to machines, does not run."""
    cluster = yaml.safe_load((ROOT / "examples" / "cluster" / "ray.yaml").read_text("utf-8"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    limits = "--num-cpus=1 --object-store-memory=80000000 --node-ip-address=127.0.0.1"
    head, worker = (cluster[f"{kind}_start_ray_commands"][-1].replace("6379", str(port)) for kind in ("head", "worker"))
    names = " ".join(str(folder / name) for name in ("text", "tokenizer"))
    script = tmp_path / "cluster.sh"
    script.write_text(
        f"""set -e
        export RAY_TMPDIR={place} PATH={Path(sys.executable).parent}:$PATH RAY_HEAD_IP=127.0.0.1
        {head.replace(" --autoscaling-config=~/ray_bootstrap_config.yaml", "")} {limits} --include-dashboard=false --temp-dir={place}
        {worker} {limits}
        export RAY_ADDRESS=127.0.0.1:{port}
        python -c 'import ray; ray.init(); print(ray.cluster_resources()["CPU"], "processors")'
        set -- {names}
        python {ROOT}/examples/cluster/prepare.py $1 {tmp_path}/corpus $2 --on ray --tasks {TASKS} --time 00:02:00
        """
    )
    try:
        code, output = in_session(["bash", str(script)], tmp_path / "output.txt")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    assert code == 0, output
    assert "2.0 processors" in output
    assert 60 < PreparedCorpus.open(tmp_path / "corpus").manifest["documents"] <= 2 * len(TEXTS)


def test_the_cluster_file_passes_rays_own_checks() -> None:
    """Without the option of the head no worker is started."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    cluster = yaml.safe_load((ROOT / "examples" / "cluster" / "ray.yaml").read_text("utf-8"))
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in cluster["head_start_ray_commands"][-1]
    checked = prepare_config(cluster)
    validate_config(checked)
    assert checked["available_node_types"]["local.cluster.node"]["min_workers"] == 4
