"""Location of the cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """Return the cache directory: $FIRTH_CACHE, else ~/.cache/firth. It may not exist yet."""
    return Path(os.environ.get("FIRTH_CACHE") or Path.home() / ".cache" / "firth")
