"""Where files that can be made again are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache() -> Path:
    """Return $FIRTH_CACHE, else ~/.cache/firth; it may not exist yet."""
    return Path(os.environ.get("FIRTH_CACHE") or Path.home() / ".cache" / "firth")
