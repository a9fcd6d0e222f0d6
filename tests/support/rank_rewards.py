"""Rewards that differ between ranks."""

import os

calls = 0


def flaky(text: str) -> float:
    """Return the length of a text; on rank 1, with FLAKY set, from the sixth text on, raise an error."""
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and os.environ.get("FLAKY") and calls >= 6:
        raise ValueError("endpoint down")
    return float(len(text))
