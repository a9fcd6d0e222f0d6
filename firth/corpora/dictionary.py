"""Write a dictionary in dictd's format: gcide.jsonl, one {"text": "Bathe: To wash by immersion ..."} for each entry."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path

from firth.corpora.prepare import Members, line


def write_dictionary(members: Members, out: Path) -> str:
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

    An entry begins with an unindented line, which has the word twice, the second time between backslashes; text about the
    dictionary itself has not. Everything in brackets (sources, pronunciation, etymology) is left out, and so are entries
    without a definition.

    >>> list(entries("Bath \\Bath\\, n. [Heb.]\n   A measure,\n   in gallons.\n   [1913 Webster]\n\n   {Bath metal}, an alloy.\n"))
    [('Bath', 'A measure, in gallons. Bath metal, an alloy.')]
    """
    for entry in re.split(r"\n(?=\S)", text):
        plain = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[a-z=.'^\"|/-]{1,6}\]", "", entry))  # accents, then the rest
        head, _, body = plain.partition("\n   ")
        word = re.split(r"\s*\\|\s\(|,", head, maxsplit=1)[0].strip()
        definition = re.sub(r"[{}]|^\s*(?:\d+\.|\([a-z]\))(?=\s)", "", body, flags=re.M)
        definition = re.sub(r"\s+([,.;])", r"\1", " ".join(definition.split()))
        if "\\" in head and word and len(definition.split()) > 2:
            yield word, definition
