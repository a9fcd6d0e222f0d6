"""Each corpus in the form that firth reads: one .txt per document, or one JSON record per line.

A maker takes the corpus's files as `firth.text.registry.members` yields them, and an empty directory; it returns one
line that says what it wrote, with what it left out. Names of what it writes are made here, never taken as paths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

Members = Iterable[tuple[str, BinaryIO]]


def plays(members: Members, out: Path) -> str:
    """Shakespeare, from Markdown: PLAY.txt as one reads it, and speeches.jsonl in order.

    A speech is {"play", "kind" (the edition's shelf: comedies, histories, ...), "speaker", "text"}; its text has the
    edition's line breaks (verse lines, or prose as it was set), without stage directions.
    """
    kinds: dict[str, str] = {}
    with (out / "speeches.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        count = 0
        for name, member in members:
            path = PurePosixPath(name)
            kinds[path.stem] = path.parent.name
            markdown = member.read().decode("utf-8")
            write_text(out / f"{path.stem}.txt", play_text(markdown))
            for speaker, text in speeches(markdown):
                count += 1
                file.write(line({"play": path.stem, "kind": path.parent.name, "speaker": speaker, "text": text}))
    return f"{len(kinds)} plays as .txt, {count} speeches in speeches.jsonl"


MISPRINTED = re.compile(r"^\*\*(As long as you or I|Here stand I)\*\* *$", re.M)
"""Two lines that the edition sets in bold as if they were speakers: they go on with the speech before."""

DIRECTION = re.compile(
    r"(?:_+\\?\[|\*\[|^\[)[^\]]*\\?\][_*]*"  # _\[Aside]_, *[Reads.]*, [To ROBIN]_ (its beginning forgotten)
    r"|(?<!\w)_(?:[^_\n]|\n(?!\n))*_"  # _Enter GHOST_, over lines but not over paragraphs
    r"|(?<!\*)\*(?!\*)(?:[^*\n]|\n(?!\n))*\*(?!\*)",  # *Enter GHOST*
    re.M,
)
"""A stage direction in any of the edition's ways."""


def play_text(markdown: str) -> str:
    """A play without its Markdown: speakers and directions on lines of their own, no trailing blanks.

    >>> play_text("# Hamlet\\n\\n## ACT I\\n\\n_Exit_\\n\\n\\n**HAMLET**  \\n_\\\\[Aside\\\\]_  \\nTo be\\\\--  \\n")
    'Hamlet\\n\\nACT I\\n\\nExit\\n\\nHAMLET\\n[Aside]\\nTo be--\\n'
    """
    text = MISPRINTED.sub(r"\1", markdown.replace("\r", ""))
    text = re.sub(r"^#+ *", "", text, flags=re.M)
    lines = [part.strip() for part in plain(text).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def speeches(markdown: str) -> Iterator[tuple[str, str]]:
    """(speaker, what is spoken) in order. What follows a direction belongs to the last speaker until another is named.

    >>> list(speeches("**GHOST**  \\nMark me.\\n\\n_Exit_\\n\\n**HAMLET**  \\n_\\\\[Aside\\\\]_  \\nI will.\\n"))
    [('GHOST', 'Mark me.'), ('HAMLET', 'I will.')]
    """
    text = MISPRINTED.sub(r"\1", markdown.replace("\r", ""))
    for scene in re.split(r"^#+ .*$", text, flags=re.M):
        parts = re.split(r"^\*\*([^*\n]+)\*\*", scene, flags=re.M)
        for speaker, body in zip(parts[1::2], parts[2::2], strict=True):
            lines = [part.strip() for part in plain(DIRECTION.sub("", body)).split("\n")]
            spoken = "\n".join(part for part in lines if part)
            if spoken:  # some only come and go
                yield plain(speaker).strip(), spoken


def plain(markdown: str) -> str:
    """Without emphasis and escapes. No play has an asterisk or an underscore of its own."""
    return re.sub(r"[*_]", "", re.sub(r"\\(.)", r"\1", markdown))


def topics(members: Members, out: Path) -> str:
    """The topics of Python's own help, one .txt each: part of every Python, so there is always something to read."""
    from pydoc_data.topics import topics as found

    for _ in members:  # there are none: nothing is fetched
        raise ValueError("pydoc has no archive")
    for name, text in sorted(found.items()):
        write_text(out / f"{re.sub(r'[^A-Za-z0-9-]+', '-', name)}.txt", text.strip() + "\n")
    return f"{len(found)} topics as .txt"


def line(record: dict[str, Any]) -> str:
    """A record as one line of JSONL."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """UTF-8 with plain newlines on every system, so that a corpus is the same bytes everywhere."""
    with path.open("x", encoding="utf-8", newline="\n") as file:
        file.write(text)
