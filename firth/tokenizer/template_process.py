"""The process that renders untrusted templates (`firth.tokenizer.template_worker`), started when it is first needed."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WORKERS: dict[int, subprocess.Popen[str]] = {}
"""Process id -> its rendering process: a fork must not share the pipes of its parent."""
LOCK = threading.Lock()


def send(request: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the reply of the rendering process to a request, or None if the request exceeds its limits and ended it."""
    with LOCK:
        worker = _worker()
        reply = ""
        with contextlib.suppress(OSError):
            worker.stdin.write(json.dumps(request) + "\n")  # type: ignore[union-attr]
            worker.stdin.flush()  # type: ignore[union-attr]
            reply = worker.stdout.readline()  # type: ignore[union-attr]
        if not reply:
            _end(worker)
            del WORKERS[os.getpid()]
            return None
    found: dict[str, Any] = json.loads(reply)
    return found


def _worker() -> subprocess.Popen[str]:
    """Return the rendering process of this process, started when it is first needed."""
    process = os.getpid()
    if process not in WORKERS:
        file = Path(__file__).with_name("template_worker.py")
        WORKERS[process] = subprocess.Popen(
            [sys.executable, "-I", str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, encoding="utf-8",
        )  # fmt: skip
        atexit.register(_end, WORKERS[process])
    return WORKERS[process]


def _end(worker: subprocess.Popen[str]) -> None:
    worker.kill()
    worker.wait()
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):
            pipe.close()  # type: ignore[union-attr]
