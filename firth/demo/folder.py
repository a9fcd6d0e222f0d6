"""Data of the demo from a user's own folder of text.

The label is the document that a passage comes from, if several are large enough, else the third of the text it is in. A dialogue is a
paragraph and the one that follows it.
"""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

from firth.corpora.readers import documents
from firth.demo.data import DemoFiles, DemoText, Row, balanced, write
from firth.types import UserError

MIN_BYTES = 50_000  # with less there is nothing to learn in minutes, and too little held-out text


def make(paths: list[str], directory: Path, *, labels: int = 300, held_labels: int = 1500, seed: int = 0) -> DemoText:
    """Write the demo's files from the documents under `paths` into `directory`.

    Raises UserError where the text is smaller than MIN_BYTES bytes.
    """
    rng = random.Random(seed)
    texts = {d.name: d.text for d in documents(paths)}
    size = sum(len(t.encode()) for t in texts.values())
    if size < MIN_BYTES:
        raise UserError(f"{paths[0]}: {size} bytes of text are too little for the demo; give it {MIN_BYTES} or more")
    train, valid = _hold_out(texts, rng)
    names, question = _question(train)
    labeled = {part: _labeled(rows, names, rng) for part, rows in (("train", train), ("valid", valid))}
    if len(names) == 3 and names[0] == "beginning":
        # Thirds of the text: label paragraphs before they are divided, and hold every tenth paragraph out.
        everything = _thirds(texts)
        labeled = {"train": [r for i, r in enumerate(everything) if i % 10], "valid": everything[::10]}
    dialogues = [_dialogues(rows) for rows in (train, valid)]
    for rows in dialogues:
        rng.shuffle(rows)
    beginnings = [" ".join(p.split()[:4]) + " " for row in valid for p in _paragraphs(row["text"])][:3]
    files = DemoFiles(
        train, valid, balanced(labeled["train"], labels, rng), balanced(labeled["valid"], held_labels, rng),
        dialogues[0], dialogues[1][:400],
    )  # fmt: skip
    return write(
        directory,
        files,
        DemoText(
            title=", ".join(Path(p).name for p in paths),
            held_out=tuple(row["name"] for row in valid)[:12],
            question=question,
            labels=tuple(names),
            cue="A paragraph; the answer is how the text goes on.",
            scorer="brief",
            samples=tuple(beginnings),
            bytes=sum(len(row["text"].encode()) for row in train),
        ),
    )


def _hold_out(texts: dict[str, str], rng: random.Random) -> tuple[list[Row], list[Row]]:
    """About a tenth of the documents; of fewer than ten documents, the last tenth of each."""
    rows = [{"name": name, "text": text} for name, text in sorted(texts.items())]
    if len(rows) >= 10:
        held = {row["name"] for row in rng.sample(rows, max(1, len(rows) // 10))}
        return [r for r in rows if r["name"] not in held], [r for r in rows if r["name"] in held]
    train, valid = [], []
    for row in rows:
        paragraphs = _paragraphs(row["text"])
        cut = max(1, len(paragraphs) * 9 // 10)
        train.append({"name": row["name"], "text": "\n\n".join(paragraphs[:cut])})
        valid.append({"name": row["name"], "text": "\n\n".join(paragraphs[cut:])})
    return train, [row for row in valid if row["text"]]


def _paragraphs(text: str) -> list[str]:
    found = [p.strip() for p in re.split(r"\n\s*\n", text)]
    found = [p for p in found if p]
    if len(found) >= 20:
        return found
    # A text without blank lines: sentences in groups of three.
    sentences = re.split(r"(?<=[.!?])\s+", text)
    return [" ".join(sentences[i : i + 3]) for i in range(0, len(sentences), 3) if sentences[i].strip()]


def _question(train: list[Row]) -> tuple[list[str], str]:
    """Labels that the text itself carries: its largest documents, or the thirds of the whole."""
    enough = [r for r in train if len(_passages(r["text"])) >= 60]
    if 2 <= len(train) < 10 and len(enough) >= 2:
        names = [r["name"] for r in sorted(enough, key=lambda r: -len(r["text"]))[:4]]
        return sorted(names), "Which document does this passage come from?"
    return ["beginning", "middle", "end"], "Which third of the text does this passage stand in?"


def _passages(text: str) -> list[str]:
    return [" ".join(p.split()) for p in _paragraphs(text) if len(p) >= 80]


def _labeled(rows: list[Row], names: list[str], rng: random.Random) -> list[Row]:
    found = [{"text": p, "label": r["name"]} for r in rows if r["name"] in names for p in _passages(r["text"])]
    rng.shuffle(found)
    return found


def _thirds(texts: dict[str, str]) -> list[Row]:
    passages = [p for _, text in sorted(texts.items()) for p in _passages(text)]
    third = max(1, -(-len(passages) // 3))
    return [{"text": p, "label": ("beginning", "middle", "end")[i // third]} for i, p in enumerate(passages)]


def _dialogues(rows: list[Row]) -> list[Row]:
    pairs = []
    for row in rows:
        paragraphs = [" ".join(p.split()) for p in _paragraphs(row["text"])]
        for first, second in itertools.pairwise(paragraphs):
            answer = _sentences(second, 200)
            if len(first) >= 10 and len(answer) >= 10:
                pairs.append({"prompt": f"Go on: {first[-300:]}", "completion": answer})
    return pairs


def _sentences(text: str, limit: int) -> str:
    """Whole sentences from the start of the text, at most `limit` letters; the first one cut if it is longer."""
    kept = ""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        if len(kept) + len(sentence) > limit:
            break
        kept = f"{kept} {sentence}".strip()
    return kept or text[:limit].rsplit(" ", 1)[0]
