"""Data of the demo from Shakespeare's plays: whole plays held out, questions and statements, cues with their answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from firth.compare.probe_dataset import sentences
from firth.demo.data import DemoFiles, DemoText, Row, balanced, write

# One play of each kind; nothing of them is seen in any training stage.
HELD_OUT = ("the-tempest", "much-ado-about-nothing", "henry-iv-part-1", "julius-caesar")


def make(plays: Path, directory: Path, *, labels: int = 300, held_labels: int = 1500, seed: int = 0) -> DemoText:
    """Write the demo's files from the fetched plays (one .txt each, and speeches.jsonl) into `directory`."""
    rng = random.Random(seed)
    train: list[Row] = []
    valid: list[Row] = []
    for path in sorted(plays.glob("*.txt")):
        (valid if path.stem in HELD_OUT else train).append({"text": path.read_text("utf-8"), "name": path.stem})
    labeled: dict[bool, list[Row]] = {True: [], False: []}
    dialogues: dict[bool, list[Row]] = {True: [], False: []}
    before: dict[str, str] = {}
    for speech in _speeches(plays / "speeches.jsonl"):
        held = speech["play"] in HELD_OUT
        text = speech["text"]
        labeled[held] += sentences(text)
        if before.get("play") == speech["play"] and before["speaker"] != speech["speaker"]:
            cue, answer = " ".join(before["text"].split()), " ".join(text.split())
            if 10 <= len(cue) <= 300 and 10 <= len(answer) <= 200:
                dialogues[held].append({"prompt": ask(speech["speaker"], cue), "completion": answer})
        before = speech
    rng.shuffle(dialogues[False])
    rng.shuffle(dialogues[True])
    files = DemoFiles(
        train, valid, balanced(labeled[False], labels, rng), balanced(labeled[True], held_labels, rng),
        dialogues[False], dialogues[True][:400],
    )  # fmt: skip
    return write(
        directory,
        files,
        DemoText(
            title="Shakespeare's plays",
            held_out=HELD_OUT,
            question="Is this sentence a question or a statement? (its last mark is removed)",
            labels=("question", "statement"),
            cue="A speaker's name and the cue that was given; the answer is the next words of that speaker.",
            scorer="thou",
            samples=("O, what a ", "My lord, the king is ", "Enter "),
            bytes=sum(len(row["text"].encode()) for row in train),
        ),
    )


def ask(speaker: str, cue: str) -> str:
    """The instruction of one dialogue.

    >>> ask("BERNARDO", "Who's there?")
    "Answer as Bernardo: Who's there?"
    """
    return f"Answer as {speaker.title()}: {cue}"


def _speeches(path: Path) -> Iterable[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
