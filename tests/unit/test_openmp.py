"""OpenMP's wait policy is set before torch is loaded, and never overrides the user's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from firth import openmp

ROOT = Path(__file__).parents[2]
CHOSEN = {"GOMP_SPINCOUNT": str(openmp.GOMP_SPINS), "KMP_BLOCKTIME": str(openmp.KMP_BLOCKTIME_MS)}


@pytest.mark.parametrize(
    ("given", "added"),
    [
        ({}, {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, set()),
        ({"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME"}),
        ({"KMP_BLOCKTIME": "200"}, {"GOMP_SPINCOUNT"}),
        ({"KMP_LIBRARY": "turnaround"}, {"GOMP_SPINCOUNT"}),
        ({"OMP_NUM_THREADS": "2"}, {"GOMP_SPINCOUNT", "KMP_BLOCKTIME"}),
    ],
)
def test_wait_policy_of_the_user_is_kept(given: dict[str, str], added: set[str]) -> None:
    environment = dict(given)
    assert openmp.set_wait_policy(environment, ["os"])
    assert environment == given | {name: CHOSEN[name] for name in added}


def test_nothing_is_set_once_torch_is_loaded() -> None:
    environment: dict[str, str] = {}
    assert not openmp.set_wait_policy(environment, ["os", "torch"])
    assert environment == {}


def run(path: str, arguments: list[str], **given: str) -> subprocess.CompletedProcess[str]:
    """Run Python without any variable of the wait policy, except the given ones."""
    names = {*openmp.GNU_VARIABLES, *openmp.LLVM_VARIABLES}
    environment = {k: v for k, v in os.environ.items() if k not in names} | {"PYTHONPATH": path} | given
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)


CHILD = "import firth, subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'import torch']).returncode)"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "firth", "doctor"],  # and a rank: torchrun -m firth
        ["-c", "import sys; from firth.cli import main; sys.argv[1:] = ['doctor']; main()"],  # the firth command
        ["-c", "import firth.model.model"],
        ["-c", CHILD],
    ],
    ids=["module", "command", "import", "worker"],
)
def test_wait_policy_is_set_before_torch_loads(tmp_path: Path, arguments: list[str]) -> None:
    """A fake torch prints the variable when it is imported, and ends the process."""
    (tmp_path / "torch.py").write_text(
        "import os, sys\nprint(os.environ['GOMP_SPINCOUNT'])\nsys.stdout.flush()\nos._exit(9)\n"
    )
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    found = run(path, arguments)
    assert (found.returncode, found.stdout) == (9, f"{openmp.GOMP_SPINS}\n"), found.stderr
    assert run(path, arguments, GOMP_SPINCOUNT="7").stdout == "7\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="torch includes libgomp only on Linux")
def test_libgomp_reads_what_is_set() -> None:
    """The library itself prints its settings when it is loaded."""
    found = run(str(ROOT), ["-c", "import firth, torch"], OMP_DISPLAY_ENV="verbose")
    if "GOMP_SPINCOUNT" not in found.stderr:
        pytest.skip("this torch links another OpenMP library")
    assert f"GOMP_SPINCOUNT = '{openmp.GOMP_SPINS}'" in found.stderr
