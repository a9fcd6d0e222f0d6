"""The wheel built from the tree holds all files of the package, and runs the demo in an environment outside the checkout."""

from __future__ import annotations

import os
import pydoc_data.topics
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("hatchling", reason="the build backend; installed with the test extra")

AUDIT = """import os, sys
def audit(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(args[0]))
        if path.startswith({root!r}) and not path.startswith({packages!r}):
            with os.fdopen(os.open({log!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY), "w") as file:
                file.write(path + "\\n")
sys.addaudithook(audit)
"""
"""Records each file of the checkout that a Python process opens; the installed packages may lie within it."""


def run(command: list[object], **options: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=500, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel, built without a network."""
    out = tmp_path_factory.mktemp("wheel")
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-build-isolation",
            "--no-index",
            "--wheel-dir",
            out,
            ROOT,
        ]
    )
    [file] = out.glob("firth-*.whl")
    return file


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = [p for p in (ROOT / "firth").rglob("*") if p.is_file() and p.suffix != ".pyc"]
    names = {str(p.relative_to(ROOT)) for p in files}
    assert {p.suffix for p in files} >= {".py", ".c", ".h", ".j2"}
    found = set(zipfile.ZipFile(wheel).namelist())
    assert names <= found
    assert {Path(name).parts[0] for name in found} == {"firth", f"{wheel.name.split('-py3')[0]}.dist-info"}


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the scripts of a new environment with the wheel, and the log of opened files of the checkout.

    Its other packages are those of this environment. A path in a .pth file does not load the .pth files there, so an editable
    installation of firth is not found.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, symlinks=True)
    python, log = home / "bin" / "python", home / "opened.txt"
    run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel])
    [site] = home.glob("lib/*/site-packages")
    packages = sysconfig.get_paths()["purelib"]
    (site / "audit_files.py").write_text(AUDIT.format(root=f"{ROOT}{os.sep}", packages=packages, log=str(log)), "utf-8")
    (site / "borrowed.pth").write_text(f"import audit_files\n{packages}\n", "utf-8")
    return home / "bin", log


def test_the_wheel_runs_the_demo_elsewhere(environment: tuple[Path, Path], tmp_path: Path) -> None:
    scripts, log = environment
    topics = sorted(pydoc_data.topics.topics.items())
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"part-{i}.txt").write_text("\n\n".join(text for _, text in topics[i::12]), "utf-8")
    # An empty cache, so that the kernels are compiled from the sources in the wheel.
    settings = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    settings |= {"FIRTH_CACHE": str(tmp_path / "cache")}
    where = run([scripts / "python", "-c", "import firth; print(firth.__file__)"], cwd=tmp_path, env=settings)
    assert where.startswith(str(scripts.parent))
    printed = run([scripts / "firth", "demo", "--size", "tiny", "--text", "texts"], cwd=tmp_path, env=settings)
    assert "[7/7]" in printed
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    if shutil.which("cc"):
        assert any((tmp_path / "cache").rglob("*.so"))
    assert not log.exists(), log.read_text("utf-8")


def test_an_opened_file_of_the_checkout_is_found(environment: tuple[Path, Path], tmp_path: Path) -> None:
    scripts, log = environment
    before = log.read_text("utf-8") if log.exists() else ""
    run([scripts / "python", "-c", f"open({str(ROOT / 'README.md')!r})"], cwd=tmp_path)
    assert log.read_text("utf-8") == f"{before}{ROOT / 'README.md'}\n"
    log.write_text(before, "utf-8") if before else log.unlink()
