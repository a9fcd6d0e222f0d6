"""Content hashes that detect damaged files.

    record = sealed({"step": 3}, directory, ["model.safetensors"])     # adds "files" and "digest"
    verify(record, directory, directory / "firth.json", "copy it again")
    write_record(run / "done.json", {"steps": 600})                    # a JSON file: adds "digest"
    record = read_record(run / "done.json", {"steps": int}, "delete it")

"files" has the size and the SHA-256 of each file; "digest" is the SHA-256 of the record without this field. Both detect
damage, not forgery. SHA-256 reads 1.5 GB/s on one core of a CPU with SHA instructions (0.3 GB/s without): about as long
as copying the tensors of a model takes. So a process hashes a file once, and again when its size, a time or its inode has changed.

`cure`, an argument of most functions here, is the end of the error message: what the user can do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from firth.io.atomic import check_regular_file, write_text
from firth.io.json_files import Fields, read_object
from firth.types import UserError

HASH = re.compile("[0-9a-f]{64}")
"""A SHA-256 in hexadecimal."""

COPY_AGAIN = 'copy the directory again, or remove "files" and "digest" from firth.json if you changed it on purpose'
"""What the user can do about a damaged model or adapter directory."""


Hashed = dict[str, list[Any]]
"""Absolute path -> stamp and SHA-256 of a file."""

SETTLED_SECONDS = 2.0
"""A file that was changed less than this before it is hashed may change again without another stamp."""

_known: Hashed = {}
"""Files that this process, or the first rank of its run, has hashed. Each is hashed again when its stamp has changed."""


def stamp(status: os.stat_result) -> list[int]:
    """Return what changes with a file: size, modification time, change time (ns), inode."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def hashed(path: Path) -> list[Any]:
    """Return the stamp and the SHA-256 of a file, which is read if that is not known."""
    with path.open("rb") as file:
        status, key = os.fstat(file.fileno()), str(path.absolute())
        now = stamp(status)
        found = _known.get(key)
        if found is not None and found[:-1] == now:
            return found
        found = [*now, hashlib.file_digest(file, "sha256").hexdigest()]
    if time.time() - status.st_ctime > SETTLED_SECONDS:
        _known[key] = found
    return found


def known_hashes(directory: Path) -> Hashed:
    """Return what is known of the files in a directory."""
    start = f"{directory.absolute()}{os.sep}"
    return {path: found for path, found in _known.items() if path.startswith(start)}


def learn_hashes(found: Hashed) -> None:
    """Take over what another rank has hashed. A file with another stamp here is hashed here."""
    _known.update(found)


def file_facts(path: Path) -> dict[str, Any]:
    """Return {"bytes", "sha256"} of a file."""
    size, *_, digest = hashed(path)
    return {"bytes": size, "sha256": digest}


def digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record of JSON values, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def sealed(record: Mapping[str, Any], directory: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return the record with the hashes of the named files of a directory and its own digest."""
    return with_digest({**record, "files": {name: file_facts(directory / name) for name in sorted(names)}})


def with_digest(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record with its digest."""
    plain: dict[str, Any] = json.loads(json.dumps(record))  # tuples become lists, as in the file
    return plain | {"digest": digest(plain)}


def check_digest(record: Mapping[str, Any], file: object, cure: str) -> None:
    """Check that a record read from `file` is the one that was written.

    Raises:
        UserError: The digest differs.
    """
    rest = {name: value for name, value in record.items() if name != "digest"}
    if record.get("digest") != digest(rest):
        raise UserError(f"{file} is not as it was written (its digest differs): {cure}")


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record as a JSON file with its digest."""
    write_text(file, json.dumps(with_digest(record), indent=1) + "\n")


def read_record(file: Path, needs: Fields | None = None, cure: str = "copy it again") -> dict[str, Any]:
    """Return the object in a JSON file without its digest; files of older versions have none.

    Args:
        file: The JSON file.
        needs: Required fields and their types.
        cure: What the user can do about a damaged file.

    Raises:
        UserError: The file is damaged, or a field is missing.
    """
    record = read_object(file, needs, cure)
    misnamed = any(isinstance(value, str) and HASH.fullmatch(value) for value in record.values())
    if "digest" in record or misnamed:  # the damage may be in the name of the field
        check_digest(record, file, cure)
    return {name: value for name, value in record.items() if name != "digest"}


def read_done(run: Path) -> dict[str, Any]:
    """Return the content of done.json of a run directory; empty if the run is not finished."""
    file = run / "done.json"
    cure = f"delete {file}, and `firth train {run}` exports the model again"
    return read_record(file, {"steps": int}, cure) if file.exists() else {}


def check_recipe(run: Path) -> None:
    """Check recipe.yaml of a run directory against its hash in inputs.json.

    Raises:
        UserError: The file was changed.
    """
    file, inputs = run / "recipe.yaml", run / "inputs.json"
    recorded = read_record(inputs).get("recipe_file") if inputs.exists() and file.exists() else None
    if recorded not in (None, file_facts(file)["sha256"] if file.exists() else None):
        raise UserError(f"{file} was changed after the run began: put it back")


def verify(record: Mapping[str, Any], directory: Path, file: Path, cure: str) -> None:
    """Check a record read from `file`, and the files that it lists, against their hashes.

    A record without "files" and "digest" is of another program or of an older version, and passes.

    Raises:
        UserError: The record or a file differs, or a file is missing.
    """
    if "files" not in record and "digest" not in record:
        return
    check_digest(record, file, cure)
    verify_files(record["files"], directory, cure)


def verify_files(files: Mapping[str, Any], directory: Path, cure: str) -> None:
    """Check files of a directory against their sizes and hashes.

    Args:
        files: Name -> `file_facts`.
        directory: Where they are.
        cure: What the user can do about a damaged file.

    Raises:
        UserError: A file differs or is missing.
    """
    for name, facts in files.items():
        path = directory / name
        check_regular_file(path)
        if not path.is_file():
            raise UserError(f"{path} is missing: {cure}")
        if path.stat().st_size != facts["bytes"] or file_facts(path) != facts:
            raise UserError(f"{path} is not as it was written (its content hash differs): {cure}")
