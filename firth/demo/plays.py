"""Data of the demo from Shakespeare's plays.

Four plays are held out. The classification task is questions and statements; the dialogues are cues with their answers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from firth.compare.probe_dataset import sentences
from firth.demo.data import DatasetInfo, DemoFiles, Row, sample_balanced, write_data

HELD_OUT = ("the-tempest", "much-ado-about-nothing", "henry-iv-part-1", "julius-caesar")
"""Held-out plays, one of each genre; no training stage reads them."""


def make_data(
    plays: Path, directory: Path, *, max_labeled_train: int = 300, max_labeled_valid: int = 1500, seed: int = 0
) -> DatasetInfo:
    """Write the data files of the demo from the plays.

    Args:
        plays: Directory of the fetched plays: one .txt file per play, and speeches.jsonl.
        directory: The data directory to write.
        max_labeled_train: Largest number of labeled training passages.
        max_labeled_valid: Largest number of labeled held-out passages.
        seed: Seed of the sampling.

    Returns:
        The description of the data.
    """
    rng = random.Random(seed)
    train: list[Row] = []
    valid: list[Row] = []
    for path in sorted(plays.glob("*.txt")):
        (valid if path.stem in HELD_OUT else train).append({"text": path.read_text("utf-8"), "name": path.stem})
    labeled: dict[bool, list[Row]] = {True: [], False: []}  # by whether the play is held out
    dialogues: dict[bool, list[Row]] = {True: [], False: []}
    previous: dict[str, str] = {}
    for speech in _read_speeches(plays / "speeches.jsonl"):
        held_out = speech["play"] in HELD_OUT
        text = speech["text"]
        labeled[held_out] += sentences(text)
        if previous.get("play") == speech["play"] and previous["speaker"] != speech["speaker"]:
            cue, answer = " ".join(previous["text"].split()), " ".join(text.split())
            if 10 <= len(cue) <= 300 and 10 <= len(answer) <= 200:
                dialogues[held_out].append({"prompt": dialogue_prompt(speech["speaker"], cue), "completion": answer})
        previous = speech
    rng.shuffle(dialogues[False])
    rng.shuffle(dialogues[True])
    files = DemoFiles(
        train=train,
        valid=valid,
        labeled_train=sample_balanced(labeled[False], max_labeled_train, rng),
        labeled_valid=sample_balanced(labeled[True], max_labeled_valid, rng),
        dialogues_train=dialogues[False],
        dialogues_valid=dialogues[True][:400],
    )
    return write_data(
        directory,
        files,
        DatasetInfo(
            title="Shakespeare's plays",
            held_out=HELD_OUT,
            question="Is this sentence a question or a statement? (its final punctuation mark is removed)",
            labels=("question", "statement"),
            cue="The prompt is a speaker's name and the preceding speech; the answer is that speaker's next speech.",
            scorer="thou",
            samples=("O, what a ", "My lord, the king is ", "Enter "),
            bytes=sum(len(row["text"].encode()) for row in train),
        ),
    )


def dialogue_prompt(speaker: str, cue: str) -> str:
    """Return the prompt of one dialogue.

    Args:
        speaker: Name of the speaker who answers.
        cue: The preceding speech.

    Returns:
        The prompt.

    >>> dialogue_prompt("BERNARDO", "Who's there?")
    "Answer as Bernardo: Who's there?"
    """
    return f"Answer as {speaker.title()}: {cue}"


def _read_speeches(path: Path) -> Iterable[dict[str, str]]:
    """Yield the speeches of all plays, in order."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
