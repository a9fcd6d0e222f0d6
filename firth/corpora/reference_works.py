"""Read the text of reference works: HTML pages and manual pages without markup, code listings and navigation, and a dictionary.

>>> html_text("<body><nav>Menu</nav><h1>Général</h1><p>Un <b>mot</b>.<pre>ls</pre></body>")
['Général', 'Un mot.']
>>> manual_text('.TH nss 5\\n.SH NOM\\nnss \\\\- Service\\\\ de \\\\fBnoms\\\\fP\\n.PP\\nAutre.\\n')
['NOM', 'nss - Service de noms', 'Autre.']
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath

from firth.corpora.prepare import Members, line, write_text

BLOCKS = frozenset(
    ("p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "td", "th", "div", "br", "ul", "ol", "table", "body")
)
HEADINGS = frozenset(("h1", "h2", "h3", "h4", "h5", "h6"))
MIN_ANSWER_CHARACTERS = 40
"""Fewest characters of a paragraph that explains its heading."""
SKIPPED = frozenset(("script", "style", "head", "nav", "aside", "header", "footer", "pre", "button", "title"))
SKIPPED_CLASSES = frozenset(("MAC", "docnav", "toc"))
"""Classes of elements to leave out: LibreOffice's variants for macOS, Publican's navigation."""
EMPTY_ELEMENTS = frozenset(("img", "meta", "br", "input", "link", "hr", "col"))


def html_pages(members: Members, out: Path) -> str:
    """Write HTML pages, one .txt each, and headings.jsonl: {"prompt": heading, "completion": the paragraph after it}.

    A paragraph that stood in an earlier page is left out.
    """
    pairs: dict[str, str] = {}

    def read(data: bytes) -> list[str]:
        page = _parsed(data.decode("utf-8", "replace"))
        for at in page.headings:
            first = page.blocks[at + 1] if at + 1 < len(page.blocks) and at + 1 not in page.headings else ""
            if len(first) >= MIN_ANSWER_CHARACTERS:
                pairs.setdefault(page.blocks[at], first)
        return page.blocks

    summary = _write(members, out, read)
    with (out / "headings.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(line({"prompt": heading, "completion": text}) for heading, text in pairs.items())
    return f"{summary}, {len(pairs)} headings with their paragraph in headings.jsonl"


def manual_pages(members: Members, out: Path) -> str:
    """Write manual pages, one .txt each; a paragraph that stood in an earlier page is left out."""
    return _write(members, out, lambda data: manual_text(gzip.decompress(data).decode("utf-8", "replace")))


def _write(members: Members, out: Path, read: Callable[[bytes], list[str]]) -> str:
    """Write a .txt for each page and return a summary."""
    seen: set[str] = set()
    pages = size = repeated = 0
    for name, member in sorted((name, file.read()) for name, file in members):
        blocks = read(member)
        kept = [block for block in dict.fromkeys(blocks) if block not in seen]
        repeated += len(blocks) - len(kept)
        seen.update(kept)
        if kept:
            pages += 1
            text = "\n\n".join(kept) + "\n"
            size += len(text.encode())
            write_text(out / f"{pages:04d}-{PurePosixPath(name).name.partition('.')[0]}.txt", text)
    return f"{pages} pages as .txt ({size / 1e6:.1f} MB), {repeated} repeated paragraphs left out"


class _Blocks(HTMLParser):
    """Collects the blocks of text of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = []
        self.headings: set[int] = set()
        """Indices of the blocks that are headings."""
        self._heading = False
        self._parts: list[str] = []
        self._tags: list[str] = []
        self._skipped: list[bool] = []
        """For each open element, whether its text is left out."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self.close_block()
            self._heading = tag in HEADINGS
        if tag not in EMPTY_ELEMENTS:
            classes = (dict(attrs).get("class") or "").split()
            self._skipped.append(tag in SKIPPED or not SKIPPED_CLASSES.isdisjoint(classes))
            self._tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.close_block()
            self._heading = False
        if tag in self._tags:
            while self._tags.pop() != tag:  # elements without an end tag, such as li
                self._skipped.pop()
            self._skipped.pop()

    def handle_data(self, data: str) -> None:
        if not any(self._skipped):
            self._parts.append(data)

    def close_block(self) -> None:
        """End the current block."""
        text = " ".join("".join(self._parts).split())
        self._parts.clear()
        if text:
            self.headings |= {len(self.blocks)} if self._heading else set()
            self.blocks.append(text)


def html_text(page: str) -> list[str]:
    """Return the paragraphs and headings of an HTML page."""
    return _parsed(page).blocks


def _parsed(page: str) -> _Blocks:
    """Return the parser after it has read a page."""
    parser = _Blocks()
    parser.feed(page)
    parser.close()
    parser.close_block()
    return parser


ESCAPES = {"-": "-", " ": " ", "(aq": "'", "[aq]": "'", "e": "\\", "&": "", "(em": "—", "(en": "–", "(dq": '"', "(lq": "“", "(rq": "”",
           "~": " ", "0": " ", "|": "", "^": "", "/": "", ",": "", "c": "", "(bu": "•", "(co": "©", "(ha": "^", "(ti": "~"}  # fmt: skip
"""Escape sequence of roff, without its backslash -> text."""
ESCAPE = re.compile(r"\\(f\(..|f\[[^\]]*\]|f.|s[-+]?\d+|\*\(..|\*.|\(..|\[[^\]]*\]|.)")
TEXT_MACROS = frozenset(("B", "I", "BR", "BI", "IB", "IR", "RB", "RI", "SM", "SB", "SH", "SS", "MT", "UR"))
LISTINGS = {"nf": "fi", "EX": "EE", "TS": "TE"}
"""Macro that begins a listing or a table -> the one that ends it."""


def manual_text(source: str) -> list[str]:
    """Return the paragraphs and headings of a manual page in roff."""
    blocks: list[list[str]] = [[]]
    until = ""
    for row in source.split("\n"):
        macro, _, rest = row[1:].strip().partition(" ") if row.startswith((".", "'")) else ("", "", row)
        if until:
            until = "" if macro == until else until
        elif not macro and not row.startswith("."):
            blocks[-1].append(_plain(rest)) if rest.strip() else blocks.append([])
        elif macro in LISTINGS:
            until = LISTINGS[macro]
        elif macro in TEXT_MACROS:
            if macro in ("SH", "SS"):
                blocks += [[_plain(rest.strip('"'))], []]
            else:
                words = re.findall(r'"([^"]*)"|(\S+)', rest)
                joint = "" if len(macro) == 2 and macro not in ("SM", "SB") else " "
                blocks[-1].append(_plain(joint.join(quoted or bare for quoted, bare in words)))
        elif not macro.startswith("\\"):
            blocks.append([])
    texts = (" ".join(" ".join(block).split()) for block in blocks)
    return [text for text in texts if text]


def _plain(text: str) -> str:
    """Return a line of roff without escape sequences."""
    return ESCAPE.sub(lambda found: ESCAPES.get(found[1], ""), text)


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
