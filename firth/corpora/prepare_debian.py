"""Write the text of Debian packages: a book in HTML, and a dictionary.

anarchism    one .txt for each page
gcide        gcide.jsonl, one {"text": "Bathe: To wash by immersion, as in a bath ..."} for each entry
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from firth.corpora.prepare import Members, line, write_text

BLOCKS = frozenset(
    (
        "p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "blockquote", "pre", "tr", "dt", "dd", "br", "table", "ul", "ol", "dl",
        "section", "article",
    )
)  # fmt: skip
"""Elements that begin and end a paragraph."""

UNREAD = frozenset(("script", "style", "head"))
"""Elements whose text is not read."""

MIN_PAGE_CHARACTERS = 500
"""Shorter pages are tables of contents or redirections."""


class _Paragraphs(HTMLParser):
    """Collects the paragraphs of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self.unread = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.unread += tag in UNREAD
        if tag in BLOCKS:
            self.pieces.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self.unread -= tag in UNREAD
        if tag in BLOCKS:
            self.pieces.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.unread:
            self.pieces.append(data)


def html_text(page: str) -> str:
    """Return the text of an HTML page: paragraphs with an empty line between them, without scripts and styles.

    >>> html_text("<head><title>No</title></head><h1>A <i>bold</i>\\n title</h1><p>Fish &amp; chips.</p>")
    'A bold title\\n\\nFish & chips.\\n'
    """
    parser = _Paragraphs()
    parser.feed(page)
    parser.close()
    paragraphs = (" ".join(text.split()) for text in "".join(parser.pieces).split("\n\n"))
    return "\n\n".join(text for text in paragraphs if text) + "\n"


def pages(members: Members, out: Path) -> str:
    """Write the pages of a book in HTML, one .txt each."""
    count = 0
    for name, member in members:
        text = html_text(member.read().decode("utf-8", "replace"))
        if len(text) >= MIN_PAGE_CHARACTERS:
            write_text(out / f"{PurePosixPath(name).stem}.txt", text)
            count += 1
    return f"{count} pages as .txt"


def dictionary(members: Members, out: Path) -> str:
    """Write a dictionary of dictd: gcide.jsonl with one {"text"} for each entry, the word and its definitions."""
    count = 0
    with (out / "gcide.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for _, member in members:
            for word, text in entries(gzip.decompress(member.read()).decode("utf-8", "replace")):
                file.write(line({"text": f"{word}: {text}"}))
                count += 1
    return f"{count} entries in gcide.jsonl"


def entries(text: str) -> Iterator[tuple[str, str]]:
    r"""Yield the words of a dictionary with their definitions and quotations.

    An entry begins with an unindented line; everything in brackets (sources, pronunciation, etymology) is left out. The
    entries about the dictionary itself (00-database-...) and entries without a definition are skipped.

    >>> list(entries("Bath \\Bath\\, n. [Heb.]\n   A measure,\n   in gallons.\n   [1913 Webster]\n\n   {Bath metal}, an alloy.\n"))
    [('Bath', 'A measure, in gallons. Bath metal, an alloy.')]
    """
    for entry in re.split(r"\n(?=\S)", text):
        plain = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[a-z=.'^\"|/-]{1,6}\]", "", entry))  # accents, then the rest
        head, _, body = plain.partition("\n   ")
        word = re.split(r"\s*\\|\s\(|,", head, maxsplit=1)[0].strip()
        definition = re.sub(r"[{}]|^\s*(?:\d+\.|\([a-z]\))(?=\s)", "", body, flags=re.M)
        definition = re.sub(r"\s+([,.;])", r"\1", " ".join(definition.split()))
        if word and len(definition.split()) > 2 and not word.startswith("00-database"):
            yield word, definition
