"""Prepare more labeled corpora (`firth.corpora.prepare` has the rest): multiple choice, similarity, and translations.

quartz, logiqa      {"text", "options": [...], "label": index of the right option}
lee                 {"text", "other", "label": human rating of similarity, 0 to 1}
multiemo            {"en", "es", "fr", "pl": one sentence in each language, "label": sentiment toward its subject}
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
)  # each option has its letter twice


def quartz(members: Members, out: Path) -> str:
    """Write quartz.jsonl: two effects of a cause, one of them right (Tafjord 2019)."""

    def read(prompt: str) -> tuple[str, list[str]] | None:
        found = QUARTZ.fullmatch(prompt)
        return (found[1], [found[2], found[3]]) if found else None

    return _choices(members, out / "quartz.jsonl", read)


def logiqa(members: Members, out: Path) -> str:
    """Write logiqa.jsonl: a passage and four conclusions, one of which follows (Liu 2020)."""

    def read(prompt: str) -> tuple[str, list[str]] | None:
        found = LOGIQA.fullmatch(prompt)
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
    """Write lee.jsonl: all pairs of fifty news texts with human similarity ratings (Lee, Pincombe & Welsh 2005)."""
    texts: list[str] = []
    similarity: list[list[float]] = []
    for name, member in members:
        rows = member.read().decode("cp1252").strip().split("\n")
        if name.endswith(".cor"):
            texts = rows
        else:
            similarity = [[float(cell) for cell in row.split("\t")] for row in rows]
    with (out / "lee.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for i, text in enumerate(texts):
            for j in range(i):
                file.write(line({"text": text, "other": texts[j], "label": similarity[j][i]}))
    return f"{len(texts) * (len(texts) - 1) // 2} pairs of {len(texts)} texts in lee.jsonl"


def multiemo(members: Members, out: Path) -> str:
    """Write multiemo.jsonl: sentences of Polish reviews and their machine translations, one field per language (Kocon 2021).

    A sentence may occur twice, in any of the languages; a split must group such duplicates.
    """
    by_language: dict[str, list[tuple[str, str]]] = {}
    for name, member in members:
        examples = json.load(member)["examples"]
        scores = [example["target_scores"] for example in examples]
        labels = [max(score, key=score.__getitem__) for score in scores]
        language = PurePosixPath(name).parent.name.rpartition("_")[2]
        by_language[language] = [
            (example["input"].strip(), label) for example, label in zip(examples, labels, strict=True)
        ]
    kept = lost = 0
    languages = sorted(by_language)
    with (out / "multiemo.jsonl").open("w", encoding="utf-8", newline="\n") as file:
        for number, row in enumerate(zip(*(by_language[language] for language in languages), strict=True)):
            texts, row_labels = [text for text, _ in row], {label for _, label in row}
            if len(row_labels) > 1:
                raise UserError(
                    f"sentence {number} of multiemo has different labels in its languages: {', '.join(sorted(row_labels))}"
                )
            if not all(texts):
                lost += 1
                continue
            kept += 1
            file.write(line(dict(zip(languages, texts, strict=True)) | {"label": row_labels.pop()}))
    return f"{kept} sentences in {', '.join(languages)} in multiemo.jsonl ({lost} with an empty one left out)"
