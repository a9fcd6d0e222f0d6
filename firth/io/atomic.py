"""Atomic writes: files and directories appear under their names only when they are complete. And where the cache is.

    with new_file(Path("out.csv")) as partial:      # a path to write; renamed to out.csv at the end
    with new_directory(Path("model")) as partial:   # likewise, a directory
    write_text(Path("done.json"), text)

The partial file or directory is in the directory of the final one, so that both are on one disk and the rename is
atomic. A writer that raises removes it. A writer that is killed leaves `NAME.partial`, which the next write of the file
replaces, or `.NAME.partial-...`, which the next write of the directory removes: its writer held a lock on it, and the
kernel has released that. A power failure can lose what was written; the hashes of `firth.io.integrity` detect that.

Errors of the operating system (disk full, name too long, a file in the way of a directory, no permission) become a
UserError that names the path.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from firth.types import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a write to a full disk, over a quota or past the maximum file size."""

CURES = {
    **dict.fromkeys(FULL, "free some room and run the same command again"),
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.EROFS: "choose another place to write to",
    errno.ENOENT: "check the name, and that its directory exists or can be created",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a file is where a directory should be: choose another place",
    errno.EEXIST: "a file is where a directory should be: choose another place",
    errno.EISDIR: "this is a directory: name a file",
    errno.ENOTEMPTY: "another process has written this directory in the meantime: run the same command again",
}
"""Error number -> what the user can do about it."""


def refusal(error: OSError, path: Path | str) -> UserError | None:
    """Convert an OSError to a UserError about `path`.

    Returns:
        The UserError, or None for an error that the user cannot fix.
    """
    if error.errno not in CURES:
        return None
    reason = os.strerror(error.errno or 0)
    if isinstance(error.filename, str) and ".partial" not in error.filename:  # an input that could not be read
        path = error.filename
    return UserError(f"{_shortened(str(path))}: {reason[:1].lower()}{reason[1:]}; {CURES[error.errno]}")


def _shortened(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:100]}...{path[-60:]}"


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Convert each OSError raised inside the block to a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        named = refusal(error, path)
        if named is None:
            raise
        raise named from error


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents."""
    with refusals(path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield the path of a partial file; rename it to `path` if the block succeeds, remove it otherwise."""
    partial = path.with_name(f"{path.name}.partial")
    with refusals(path):
        try:
            yield partial
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):  # it was not created, or its name is the error
                partial.unlink()
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with new_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory; rename it to `path` if the block succeeds, remove it otherwise.

    An existing directory of that name is replaced.
    """
    with refusals(path), scratch_directory(path) as partial:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        if path.is_dir():
            with scratch_directory(path) as old:
                os.replace(path, old)
                os.replace(partial, path)
        else:
            os.replace(partial, path)


@contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory next to `path`, on the same disk; remove it at the end.

    Directories left by killed writers of the same `path` are removed first.
    """
    with refusals(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        scratch, lock = _locked_directory(path)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def _locked_directory(path: Path) -> tuple[Path, int]:
    """Create a scratch directory and return it with the file descriptor that holds its lock.

    Until it is locked, another process may consider it abandoned and remove it; then another one is created.
    """
    while True:
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.partial-"))
        try:
            lock = os.open(scratch, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if scratch.exists():
            return scratch, lock
        os.close(lock)


def _remove_abandoned(path: Path) -> None:
    """Remove the scratch directories of `path` whose writers ended without removing them."""
    prefix = f".{path.name}.partial-"
    for abandoned in [p for p in path.parent.iterdir() if p.name.startswith(prefix) and p.is_dir()]:
        try:
            lock = os.open(abandoned, os.O_RDONLY)
        except FileNotFoundError:  # its writer has just finished
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(abandoned, ignore_errors=True)
        except BlockingIOError:  # it is being written
            continue
        finally:
            os.close(lock)


def check_regular_file(path: Path) -> None:
    """Check that a path is not a named pipe, a socket or a device: reading one can block forever.

    Missing paths and directories pass; the caller's open() reports those.

    Raises:
        UserError: The path is a pipe, a socket or a device.
    """
    with refusals(path):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UserError(f"{path} is a pipe or a device, not a file: copy its output into a file first")


def cache_directory() -> Path:
    """Return the cache directory: $FIRTH_CACHE, else ~/.cache/firth. It may not exist yet."""
    return Path(os.environ.get("FIRTH_CACHE") or Path.home() / ".cache" / "firth")
