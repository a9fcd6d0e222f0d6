"""More labelled corpora in the form that firth reads (`firth.corpora.prepare` has the rest): choices, graded likeness, and
translations.

quartz, logiqa      {"text", "options": [...], "label": the place of the right one}
lee                 {"text", "other", "label": how alike people found the two, 0 to 1}
multiemo            {"en", "es", "fr", "pl": one sentence in each language, "label": what it says of its subject}
"""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from firth.corpora.prepare import Members, line, records
from firth.types import UserError

LETTERS = "ABCD"
QUARTZ = re.compile(r"(.*?)\s*\n+ *A: (.*?)\n+ *B: (.*?)\s*", re.S)
LOGIQA = re.compile(
    r"\s*Passage:(.*?)Question:(.*?)\nA\.(.*?)\nB\.(.*?)\nC\.(.*?)\nD\.(.*?)\nAnswer:\s*", re.S
)  # each option's letter is told twice


def quartz(members: Members, out: Path) -> str:
    """Two effects of a cause, one of them right (Tafjord 2019): quartz.jsonl."""

    def read(asked: str) -> tuple[str, list[str]] | None:
        found = QUARTZ.fullmatch(asked)
        return (found[1], [found[2], found[3]]) if found else None

    return _choices(members, out / "quartz.jsonl", read)


def logiqa(members: Members, out: Path) -> str:
    """A passage and four conclusions, one of which follows (Liu 2020): logiqa.jsonl."""

    def read(asked: str) -> tuple[str, list[str]] | None:
        found = LOGIQA.fullmatch(asked)
        if not found:
            return None
        options = [re.sub(r"^[A-D]\.", "", option.strip()).strip() for option in found.groups()[2:]]
        return f"{found[1].strip()} {found[2].strip()}", options

    return _choices(members, out / "logiqa.jsonl", read)


def _choices(members: Members, path: Path, read: Any) -> str:
    kept = lost = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records(members):
            found = read(record["input"][-1]["content"])
            if found is None or record["ideal"] not in LETTERS[: len(found[1])]:
                lost += 1
                continue
            kept += 1
            file.write(line({"text": found[0], "options": found[1], "label": LETTERS.index(record["ideal"])}))
    return f"{kept} questions in {path.name} ({lost} of another form left out)"


def lee(members: Members, out: Path) -> str:
    """Fifty pieces of news and how alike people found each two of them (Lee, Pincombe & Welsh 2005): lee.jsonl."""
    texts: list[str] = []
    likeness: list[list[float]] = []
    for name, member in members:
        rows = member.read().decode("cp1252").strip().split("\n")
        if name.endswith(".cor"):
            texts = rows
        else:
            likeness = [[float(cell) for cell in row.split("\t")] for row in rows]
    with (out / "lee.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for i, text in enumerate(texts):
            for j in range(i):
                file.write(line({"text": text, "other": texts[j], "label": likeness[j][i]}))
    return f"{len(texts) * (len(texts) - 1) // 2} pairs of {len(texts)} texts in lee.jsonl"


def multiemo(members: Members, out: Path) -> str:
    """Sentences of Polish reviews and their machine translations (Kocon 2021): multiemo.jsonl, a field for each language.

    A sentence may stand there twice, in any of the languages: who holds some out must look for it among the others.
    """
    told: dict[str, list[tuple[str, str]]] = {}
    for name, member in members:
        examples = json.load(member)["examples"]
        scores = [example["target_scores"] for example in examples]
        labels = [max(score, key=score.__getitem__) for score in scores]
        language = PurePosixPath(name).parent.name.rpartition("_")[2]
        told[language] = [(example["input"].strip(), label) for example, label in zip(examples, labels, strict=True)]
    kept = lost = 0
    languages = sorted(told)
    with (out / "multiemo.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for number, said in enumerate(zip(*(told[language] for language in languages), strict=True)):
            texts, meant = [text for text, _ in said], {label for _, label in said}
            if len(meant) > 1:
                raise UserError(
                    f"sentence {number} of multiemo is not the same in all languages: {', '.join(sorted(meant))}"
                )
            if not all(texts):
                lost += 1
                continue
            kept += 1
            file.write(line(dict(zip(languages, texts, strict=True)) | {"label": meant.pop()}))
    return f"{kept} sentences in {', '.join(languages)} in multiemo.jsonl ({lost} with an empty one left out)"
