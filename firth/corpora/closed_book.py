"""Facts out of WordNet's glosses, and questions about them in other words: a closed book and its examination.

Roberts 2020 ("How Much Knowledge Can You Pack Into the Parameters of a Language Model?") asks a T5 that has read the
web; ours is small, so the book is small too: the glosses from which one of a few plain patterns reads a fact, and no
others. A pattern is all there is to it; what it does not match is left out.

    where      Beaumont: a city of southeastern Texas near Houston
               Beaumont is a city in which country or state?              Texas
    capital    Windhoek: capital of Namibia in the center of the country
               What is the capital of Namibia?                            Windhoek
    nation     Euler, Leonhard Euler: Swiss mathematician (1707-1783)
               What nationality was Leonhard Euler?                       Swiss
    born       In which year was Leonhard Euler born?                     1707
    died       When did Leonhard Euler die?                               1783

Left out are questions that the question itself answers (South Australia: a state in Australia) and those that two
glosses answer differently. A quarter of the names, drawn by the name, is asked about in the examination alone: their
glosses are in the book, no question about them is among those that one finetunes on.

>>> [(f.question, f.answer) for f in facts("Bari: capital city of the Apulia region on the Adriatic coast")]
[]
>>> [(f.question, f.answer) for f in facts("Kandy: a city in south central Sri Lanka")]
[('Kandy is a city in which country or state?', 'Sri Lanka')]
>>> [(f.kind, f.answer) for f in facts("Euler, Leonhard Euler: Swiss mathematician (1707-1783)")]
[('nation', 'Swiss'), ('born', '1707'), ('died', '1783')]
"""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from firth.corpora import prepare

ASKED = {
    "where": "{} in which country or state?",
    "capital": "What is the capital of {}?",
    "nation": "What nationality was {}?",
    "born": "In which year was {} born?",
    "died": "When did {} die?",
}
"""Kind of fact -> how it is asked."""

NAME = r"(?:[A-Z][\w'.-]*(?: (?:and )?[A-Z][\w'.-]*)*)"
SIDE = (
    r"(?:(?:(?:north|south|east|west|central|center|extreme|far|upper|lower|and|to|the|of)(?:ern|eastern|western|east|west)?"
    r"|part)[ -])*"
)
"""south central, the far northwestern part of: what stands before a country's name and is not asked for."""

PLACE = re.compile(
    r"(?P<names>[^:;]+): an? (?:(?!in |on |of |at |that )[\w-]+ )*?"
    r"(?P<what>city|town|village|port|resort|river|mountain|peak|volcano|lake|island|province)"
    rf" (?:in|of|on) {SIDE}(?P<where>{NAME}(?: of (?:the )?{NAME})?)"
)
CAPITAL = re.compile(
    rf"(?P<names>[^:;]+): (?:the )?capital(?: and largest city)? of (?:the )?(?P<of>{NAME}(?: of (?:the )?{NAME})?)"
)
PERSON = re.compile(
    r"(?P<names>[^:;]+): (?P<nation>United States|(?!Queen|Roman)[A-Z]\w+(?:n|sh|ese|ch|ss|ek|ic)) [^()]*"
    r"\((?:born in [^()]*)?(?P<born>\d{4})-(?P<died>\d{4})\)$"
)


@dataclass(frozen=True)
class Fact:
    """A question and its answer. kind: of ASKED. about: the name that decides where it is asked."""

    kind: str
    about: str
    question: str
    answer: str


def facts(gloss: str) -> list[Fact]:
    """What the patterns read from "names: gloss"; none where none fits or the question would give the answer away."""
    found: list[tuple[str, str, str]] = []
    what = ""
    if person := PERSON.match(gloss):
        # "Euler, Leonhard Euler": a surname alone may be that of several.
        name = max(person["names"].split(", "), key=len)
        found = [(kind, name, person[kind]) for kind in ("nation", "born", "died")]
    elif capital := CAPITAL.match(gloss):
        found = [("capital", capital["of"].removesuffix("."), capital["names"].split(", ")[0])]
    elif place := PLACE.match(gloss):
        what = f"is {'an' if place['what'] == 'island' else 'a'} {place['what']}"
        found = [("where", place["names"].split(", ")[0], place["where"].removesuffix("."))]
    return [
        Fact(kind, about, ASKED[kind].format(f"{about} {what}".rstrip()), answer)
        for kind, about, answer in found
        if answer.lower() not in about.lower() and about.lower() not in answer.lower()
    ]


def held_out(fact: Fact) -> bool:
    """Whether it is asked in the examination alone: a quarter of the names."""
    return zlib.crc32(fact.about.encode()) % 4 == 0


def book(members: Iterable[tuple[str, BinaryIO]], out: Path, about: Literal["places", "people"]) -> str:
    """The glosses that hold facts as text.jsonl ({"text"}); the questions as train.jsonl and test.jsonl
    ({"prompt", "completion", "kind"}), no name in both."""
    prepare.glosses(members, out)
    source = out / "wordnet.jsonl"
    glosses = [json.loads(row)["text"] for row in source.read_text("utf-8").splitlines()]
    source.unlink()
    kinds = ("nation", "born", "died") if about == "people" else ("where", "capital")
    read = {gloss: [fact for fact in facts(gloss) if fact.kind in kinds] for gloss in glosses}
    answers = defaultdict(set)
    for some in read.values():
        for fact in some:
            answers[fact.question].add(fact.answer)
    lines: dict[str, list[str]] = {"text": [], "train": [], "test": []}
    for gloss, some in read.items():
        sure = [fact for fact in some if len(answers[fact.question]) == 1]
        if sure:
            lines["text"].append(prepare.line({"text": gloss}))
        for fact in sure:
            asked = {"prompt": fact.question, "completion": fact.answer, "kind": fact.kind}
            lines["test" if held_out(fact) else "train"].append(prepare.line(asked))
    for name, some_lines in lines.items():
        prepare.write_text(out / f"{name}.jsonl", "".join(some_lines))
    text, train, test = (len(some_lines) for some_lines in lines.values())
    return f"{text} glosses in text.jsonl, {train} and {test} questions in train.jsonl and test.jsonl"
