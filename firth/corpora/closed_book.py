"""Extract facts from WordNet's glosses and write questions about them in other words: a closed-book data set.

Roberts 2020 ("How Much Knowledge Can You Pack Into the Parameters of a Language Model?") tests a T5 that was trained on the web.
firth's models are small, so the text is small too: only the glosses that match one of a few patterns.

    where      Beaumont: a city of southeastern Texas near Houston
               Beaumont is a city in which country or state?              Texas
    capital    Windhoek: capital of Namibia in the center of the country
               What is the capital of Namibia?                            Windhoek
    nation     Euler, Leonhard Euler: Swiss mathematician (1707-1783)
               What nationality was Leonhard Euler?                       Swiss
    born       In which year was Leonhard Euler born?                     1707
    died       When did Leonhard Euler die?                               1783

Questions that contain their answer (South Australia: a state in Australia) and those with different answers in two glosses are
dropped. A quarter of the names, chosen by their hash, is in the test set: their glosses are in the text, but no question about
them is in the training set.

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

QUESTIONS = {
    "where": "{} in which country or state?",
    "capital": "What is the capital of {}?",
    "nation": "What nationality was {}?",
    "born": "In which year was {} born?",
    "died": "When did {} die?",
}
"""Kind of fact -> template of its question."""

NAME = r"(?:[A-Z][\w'.-]*(?: (?:and )?[A-Z][\w'.-]*)*)"
SIDE = (
    r"(?:(?:(?:north|south|east|west|central|center|extreme|far|upper|lower|and|to|the|of)(?:ern|eastern|western|east|west)?"
    r"|part)[ -])*"
)
"""south central, the far northwestern part of: words before a country's name that are not part of the answer."""

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
    """A question and its answer.

    Args:
        kind: Key of QUESTIONS.
        about: The name that decides the split.
        question: The question.
        answer: The answer.
    """

    kind: str
    about: str
    question: str
    answer: str


def facts(gloss: str) -> list[Fact]:
    """Return the facts in "names: gloss"; empty if no pattern matches or the question would contain the answer."""
    found: list[tuple[str, str, str]] = []
    what = ""
    if person := PERSON.match(gloss):
        # "Euler, Leonhard Euler": a surname alone may be ambiguous.
        name = max(person["names"].split(", "), key=len)
        found = [(kind, name, person[kind]) for kind in ("nation", "born", "died")]
    elif capital := CAPITAL.match(gloss):
        found = [("capital", capital["of"].removesuffix("."), capital["names"].split(", ")[0])]
    elif place := PLACE.match(gloss):
        what = f"is {'an' if place['what'] == 'island' else 'a'} {place['what']}"
        found = [("where", place["names"].split(", ")[0], place["where"].removesuffix("."))]
    return [
        Fact(kind, about, QUESTIONS[kind].format(f"{about} {what}".rstrip()), answer)
        for kind, about, answer in found
        if answer.lower() not in about.lower() and about.lower() not in answer.lower()
    ]


def held_out(fact: Fact) -> bool:
    """Return whether the fact is in the test set: a quarter of the names."""
    return zlib.crc32(fact.about.encode()) % 4 == 0


def write_closed_book(members: Iterable[tuple[str, BinaryIO]], out: Path, about: Literal["places", "people"]) -> str:
    """Write the glosses with facts as text.jsonl ({"text"}) and the questions as train.jsonl and test.jsonl.

    Records of questions are {"prompt", "completion", "kind"}; no name is in both files.
    """
    prepare.glosses(members, out)
    source = out / "wordnet.jsonl"
    glosses = [json.loads(row)["text"] for row in source.read_text("utf-8").splitlines()]
    source.unlink()
    kinds = ("nation", "born", "died") if about == "people" else ("where", "capital")
    by_gloss = {gloss: [fact for fact in facts(gloss) if fact.kind in kinds] for gloss in glosses}
    answers = defaultdict(set)
    for some in by_gloss.values():
        for fact in some:
            answers[fact.question].add(fact.answer)
    lines: dict[str, list[str]] = {"text": [], "train": [], "test": []}
    for gloss, some in by_gloss.items():
        unambiguous = [fact for fact in some if len(answers[fact.question]) == 1]
        if unambiguous:
            lines["text"].append(prepare.line({"text": gloss}))
        for fact in unambiguous:
            record = {"prompt": fact.question, "completion": fact.answer, "kind": fact.kind}
            lines["test" if held_out(fact) else "train"].append(prepare.line(record))
    for name, some_lines in lines.items():
        prepare.write_text(out / f"{name}.jsonl", "".join(some_lines))
    text, train, test = (len(some_lines) for some_lines in lines.values())
    return f"{text} glosses in text.jsonl, {train} and {test} questions in train.jsonl and test.jsonl"
