"""The manual: links and anchors resolve, every page is in the navigation, generated pages are those of the code."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(text: str) -> str:
    """Return a page without its code."""
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M | re.S)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings.

    >>> sorted(anchors("# One, two\\n\\n## `firth train`\\n"))
    ['firth-train', 'one-two']
    """
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def broken(page: Path, text: str) -> list[str]:
    """Return the links of a page that lead nowhere."""
    out = []
    for target in LINK.findall(prose(text)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text("utf-8"))):
            out.append(target)
    return out


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_exist(page: Path) -> None:
    assert broken(page, page.read_text("utf-8")) == []


def test_a_broken_link_is_found() -> None:
    assert broken(DOCS / "index.md", "[a](no-such.md) [b](install.md#nowhere) [c](install.md#extras)") == [
        "no-such.md", "install.md#nowhere",
    ]  # fmt: skip


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        inner = entry.values() if isinstance(entry, dict) else entry
        return [page for one in inner for page in pages(one)]  # type: ignore[attr-defined]

    named = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def test_the_reference_is_that_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("write_reference", DOCS / "write_reference.py")
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    for name, make in writer.WRITERS.items():
        assert (writer.PAGES / name).read_text("utf-8") == writer.NOTE + make().rstrip() + "\n", (
            f"run docs/write_reference.py: {name}"
        )


def test_the_results_fit_one_page() -> None:
    assert len((DOCS / "results" / "index.md").read_text("utf-8").splitlines()) <= 120
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120
