"""Headless Chromium for tests of pages, and the checks that every page passes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WIDTHS = (1280, 390)
"""Widths of a desktop and of a phone, in pixels."""


@contextmanager
def chromium() -> Iterator[Any]:
    """Yield a browser; skip the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser; installed with the test extra")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextmanager
def checked_page(browser: Any, url: str, width: int, theme: str = "light") -> Iterator[Any]:
    """Yield a page, and check at the end that it was quiet, sent no request to another host, and does not scroll sideways."""
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=theme)
    page = context.new_page()
    page.set_default_timeout(30_000)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    allowed = urlsplit(url).netloc
    page.on(
        "request",
        lambda request: (
            urlsplit(request.url).scheme == "data"
            or urlsplit(request.url).netloc == allowed
            or faults.append(f"request: {request.url}")
        ),
    )
    page.goto(url)
    yield page
    assert sideways(page) == 0
    assert faults == []
    context.close()


def sideways(page: Any) -> int:
    """Return by how many pixels a page can be scrolled sideways."""
    return int(page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
