"""Files in object stores (`s3://`, `gs://`, `hf://`, ...), through fsspec where the user has it installed.

    list_files("s3://bucket/text/*.jsonl.zst")     # [RemoteFile(url, name, size, version), ...]
    fetch("s3://bucket/text/a.jsonl", target, (0, 1 << 20))
    (Address("s3://bucket/corpus") / "corpus.json").read_bytes()

Files are listed once and copied, a piece at a time, to the disk of the machine that reads them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from firth.corpora.readers import is_readable
from firth.types import UserError

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "az": "adlfs", "abfs": "adlfs"}
"""Protocol -> the package that it needs besides fsspec."""

COPIED_BYTES = 1 << 22


@dataclass(frozen=True)
class RemoteFile:
    """A file in an object store.

    Args:
        url: Its address.
        name: Its name relative to the directory, or the fixed part of the pattern, that was given.
        size: Bytes.
        version: A number that changes with its content, as far as the store tells.
    """

    url: str
    name: str
    size: int
    version: int


def _open_store(url: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path within it.

    Raises:
        UserError: A package is missing, or there is no such protocol.
    """
    protocol = url.partition("://")[0]
    wanted = " ".join(["fsspec", *filter(None, [PACKAGES.get(protocol)])])
    try:
        import fsspec.core

        found, path = fsspec.core.url_to_fs(url)
    except ImportError:
        raise UserError(f"{url}: reading it needs packages that are not installed: pip install {wanted}") from None
    except ValueError as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}") from None
    return found, str(path)


@contextmanager
def _reported(url: str) -> Iterator[None]:
    """Convert the errors of a store to a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # stores raise classes of their own: botocore's, aiohttp's, gcsfs's
        why = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{url}: it cannot be read: {why}") from None


@dataclass(frozen=True)
class Address:
    """A file or a directory in an object store, in the place of a path.

    Args:
        url: Its address.
    """

    url: str

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        """Return whether there is such a file.

        Raises:
            UserError: The store cannot be read.
        """
        store, path = _open_store(self.url)
        with _reported(self.url):
            try:
                return store.info(path)["type"] == "file"
            except FileNotFoundError:
                return False

    def read_bytes(self, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the content of a file, or a span of its bytes.

        Raises:
            UserError: The store cannot be read, or ignores the span.
        """
        store, path = _open_store(self.url)
        with _reported(self.url):
            raw: bytes = store.cat_file(path, start=start, end=stop)
            if stop is not None and len(raw) > stop - (start or 0):
                raise UserError(f"{self.url}: this server does not send parts of a file, which a corpus is read in")
            return raw

    def read_text(self, encoding: str = "utf-8") -> str:
        """Return the content of a text file."""
        return self.read_bytes().decode(encoding)

    def copy(self, target: Path) -> None:
        """Copy a directory to the disk."""
        store, path = _open_store(self.url)
        with _reported(self.url):
            for file in store.find(path):
                place = target / file.removeprefix(path).lstrip("/")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(store.cat_file(file))


def list_files(url: str) -> list[RemoteFile]:
    """Return the readable files of an address: a file, a directory or a pattern; sorted, without hidden ones.

    Raises:
        UserError: There is none, a package is missing, or the store cannot be read.
    """
    store, path = _open_store(url)
    protocol = url.partition("://")[0]
    with _reported(url):
        fixed = re.split(r"[*?\[]", path)[0]
        if fixed != path:
            root, found = fixed.rpartition("/")[0], store.glob(path, detail=True)
        elif store.isdir(path):
            root, found = path.rstrip("/"), store.find(path, detail=True)
        else:
            root, found = path.rpartition("/")[0], {path: store.info(path)}
    files = []
    for place, facts in sorted(found.items()):
        name = place.removeprefix(root).lstrip("/")
        hidden = any(part.startswith(".") for part in name.split("/"))
        if facts["type"] == "file" and not hidden and is_readable(Path(name)):
            files.append(RemoteFile(f"{protocol}://{place}", name, int(facts["size"]), _version(facts)))
    if not files:
        raise UserError(f"{url}: there is no text that is read")
    return files


def _version(facts: Any) -> int:
    """Return a number from the fields of a file that a store changes with its content."""
    known = [
        str(facts.get(name))
        for name in ("ETag", "etag", "md5Hash", "sha256", "blob_id", "LastModified", "mtime", "created")
    ]
    return int.from_bytes(hashlib.sha256("|".join([str(facts["size"]), *known]).encode()).digest()[:6])


def version(url: str) -> tuple[int, int]:
    """Return the present size and version of a file."""
    store, path = _open_store(url)
    with _reported(url):
        facts = store.info(path)
    return int(facts["size"]), _version(facts)


def open_file(url: str) -> BinaryIO:
    """Open a file for reading; it can be positioned."""
    store, path = _open_store(url)
    with _reported(url):
        return cast(BinaryIO, store.open(path, "rb"))


def fetch(url: str, target: Path, span: tuple[int, int] | None) -> None:
    """Copy a file, or a span of its bytes, to the disk.

    Raises:
        UserError: The store ends the connection.
    """
    with open_file(url) as source, target.open("wb") as file:
        left = -1
        if span is not None:
            source.seek(span[0])
            left = span[1] - span[0]
        while left:
            with _reported(url):
                block = source.read(COPIED_BYTES if left < 0 else min(COPIED_BYTES, left))
            if not block:
                break
            file.write(block)
            left -= len(block) if left > 0 else 0
