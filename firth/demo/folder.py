"""Data of the demo from a user's own folder of text.

The label of a passage is its document, if several documents are large enough, or else the third of the text that contains it. A
dialogue is a paragraph and the one that follows it.
"""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

from firth.corpora.readers import documents
from firth.demo.data import DatasetInfo, DemoFiles, Row, sample_balanced, write_data
from firth.types import UserError

MIN_BYTES = 50_000
"""Fewest UTF-8 bytes of text: with less, the models learn nothing in minutes and the held-out text is too small."""

THIRDS = ("beginning", "middle", "end")
"""Labels of passages by their position in the whole text."""


def make_data(
    paths: list[str], directory: Path, *, max_labeled_train: int = 300, max_labeled_valid: int = 1500, seed: int = 0
) -> DatasetInfo:
    """Write the data files of the demo from a user's documents.

    Args:
        paths: Files and folders of text.
        directory: The data directory to write.
        max_labeled_train: Largest number of labeled training passages.
        max_labeled_valid: Largest number of labeled held-out passages.
        seed: Seed of the sampling.

    Returns:
        The description of the data.

    Raises:
        UserError: The text has fewer than MIN_BYTES bytes, or it is too small for one of the files.
    """
    rng = random.Random(seed)
    texts = {document.name: document.text for document in documents(paths)}
    num_bytes = sum(len(text.encode()) for text in texts.values())
    if num_bytes < MIN_BYTES:
        raise UserError(
            f"{paths[0]}: {num_bytes} bytes of text are too little for the demo; give it {MIN_BYTES} or more"
        )
    train, valid = _split_documents(texts, rng)
    labels, question = _choose_labels(train)
    labeled = {split: _label_by_document(rows, labels, rng) for split, rows in (("train", train), ("valid", valid))}
    if len(labels) == 3 and labels[0] == THIRDS[0]:
        # Label by thirds of the text: label the passages before the split, and hold out every tenth passage.
        passages = _label_by_third(texts)
        labeled = {"train": [row for i, row in enumerate(passages) if i % 10], "valid": passages[::10]}
    dialogues = [_dialogues(rows) for rows in (train, valid)]
    for rows in dialogues:
        rng.shuffle(rows)
    samples = [" ".join(p.split()[:4]) + " " for row in valid for p in _paragraphs(row["text"])][:3]
    files = DemoFiles(
        train=train,
        valid=valid,
        labeled_train=sample_balanced(labeled["train"], max_labeled_train, rng),
        labeled_valid=sample_balanced(labeled["valid"], max_labeled_valid, rng),
        dialogues_train=dialogues[0],
        dialogues_valid=dialogues[1][:400],
    )
    return write_data(
        directory,
        files,
        DatasetInfo(
            title=", ".join(Path(path).name for path in paths),
            held_out=tuple(row["name"] for row in valid)[:12],
            question=question,
            labels=tuple(labels),
            cue="The prompt is a paragraph; the answer is the start of the next one.",
            scorer="brief",
            samples=tuple(samples),
            bytes=sum(len(row["text"].encode()) for row in train),
        ),
    )


def _split_documents(texts: dict[str, str], rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Hold out about a tenth of the documents; of fewer than ten documents, the last tenth of each."""
    rows = [{"name": name, "text": text} for name, text in sorted(texts.items())]
    if len(rows) >= 10:
        held_out = {row["name"] for row in rng.sample(rows, max(1, len(rows) // 10))}
        return [row for row in rows if row["name"] not in held_out], [row for row in rows if row["name"] in held_out]
    train, valid = [], []
    for row in rows:
        paragraphs = _paragraphs(row["text"])
        split = max(1, len(paragraphs) * 9 // 10)
        train.append({"name": row["name"], "text": "\n\n".join(paragraphs[:split])})
        valid.append({"name": row["name"], "text": "\n\n".join(paragraphs[split:])})
    return train, [row for row in valid if row["text"]]


def _paragraphs(text: str) -> list[str]:
    """Split a text at blank lines, or into groups of three sentences if it has fewer than 20 paragraphs."""
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text)]
    paragraphs = [p for p in paragraphs if p]
    if len(paragraphs) >= 20:
        return paragraphs
    sentences = re.split(r"(?<=[.!?])\s+", text)
    return [" ".join(sentences[i : i + 3]) for i in range(0, len(sentences), 3) if sentences[i].strip()]


def _choose_labels(train: list[Row]) -> tuple[list[str], str]:
    """Return the labels and the question of the classification task: up to four large documents, or the thirds of the text."""
    large = [row for row in train if len(_passages(row["text"])) >= 60]
    if 2 <= len(train) < 10 and len(large) >= 2:
        names = [row["name"] for row in sorted(large, key=lambda row: -len(row["text"]))[:4]]
        return sorted(names), "Which document does this passage come from?"
    return list(THIRDS), "Which third of the text does this passage come from?"


def _passages(text: str) -> list[str]:
    """Return the paragraphs of at least 80 characters, each on one line."""
    return [" ".join(p.split()) for p in _paragraphs(text) if len(p) >= 80]


def _label_by_document(rows: list[Row], labels: list[str], rng: random.Random) -> list[Row]:
    """Return the passages of the labeled documents in random order, each with the name of its document."""
    labeled = [
        {"text": p, "label": row["name"]} for row in rows if row["name"] in labels for p in _passages(row["text"])
    ]
    rng.shuffle(labeled)
    return labeled


def _label_by_third(texts: dict[str, str]) -> list[Row]:
    """Return the passages of all documents in order, each with the third of the text that contains it."""
    passages = [p for _, text in sorted(texts.items()) for p in _passages(text)]
    third = max(1, -(-len(passages) // 3))
    return [{"text": p, "label": THIRDS[i // third]} for i, p in enumerate(passages)]


def _dialogues(rows: list[Row]) -> list[Row]:
    """Return each paragraph as a prompt, with the start of the next paragraph as its completion."""
    pairs = []
    for row in rows:
        paragraphs = [" ".join(p.split()) for p in _paragraphs(row["text"])]
        for paragraph, following in itertools.pairwise(paragraphs):
            answer = _first_sentences(following, 200)
            if len(paragraph) >= 10 and len(answer) >= 10:
                pairs.append({"prompt": f"Go on: {paragraph[-300:]}", "completion": answer})
    return pairs


def _first_sentences(text: str, max_length: int) -> str:
    """Return whole sentences of at most `max_length` characters from the start of a text; a longer first one is truncated."""
    start = ""
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        if len(start) + len(sentence) > max_length:
            break
        start = f"{start} {sentence}".strip()
    return start or text[:max_length].rsplit(" ", 1)[0]
