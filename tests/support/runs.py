"""Shared by tests that start runs."""


def quiet(_: str) -> None:
    """Print no line of progress."""
