"""Shakespeare's plays as material for the demo: whole plays held out, verse or prose, and cues with their answers."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

from firth.demo.material import Files, Material, Row, balanced, write

# One play of each kind, with both verse and prose in it; nothing of them is seen in any training stage.
HELD_OUT = ("the-tempest", "much-ado-about-nothing", "henry-iv-part-1", "julius-caesar")

PASSAGE = range(80, 1200)  # letters: shorter speeches show no metre, longer ones are cut by the model's length


def verse_or_prose(text: str) -> str | None:
    """How a speech is set: in verse every line begins with a capital, in prose lines break anywhere.

    None where it cannot be told (fewer than three continuation lines, or a mixture).

    >>> verse_or_prose("To be, or not\\nTo suffer\\nThe slings\\nAnd arrows")
    'verse'
    """
    starts = [re.sub(r"^[^A-Za-z]*", "", line)[:1] for line in text.split("\n")[1:]]
    starts = [s for s in starts if s]
    if len(starts) < 3:
        return None
    share = sum(s.isupper() for s in starts) / len(starts)
    return "verse" if share >= 0.95 else "prose" if share <= 0.6 else None


def passage(text: str) -> str:
    """A speech as the classifier sees it: in one line, without the capitals of its lines, so that only the words tell.

    >>> passage("O, what a rogue\\nAnd peasant slave am I!\\nIs it not monstrous")
    'O, what a rogue and peasant slave am I! Is it not monstrous'
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    joined = lines[:1]
    for before, line in itertools.pairwise(lines):
        begins = before.endswith((".", "!", "?")) or re.match(r"(I|O)\b", line)
        joined.append(line if begins else line[:1].lower() + line[1:])
    return " ".join(joined)


def make(plays: Path, directory: Path, *, labels: int = 300, seed: int = 0) -> Material:
    """Write the demo's files from the fetched plays (one .txt each, and speeches.jsonl) into `directory`."""
    rng = random.Random(seed)
    train: list[Row] = []
    valid: list[Row] = []
    for path in sorted(plays.glob("*.txt")):
        (valid if path.stem in HELD_OUT else train).append({"text": path.read_text("utf-8"), "name": path.stem})
    labelled: dict[bool, list[Row]] = {True: [], False: []}
    dialogues: dict[bool, list[Row]] = {True: [], False: []}
    before: dict[str, str] = {}
    for speech in _speeches(plays / "speeches.jsonl"):
        held = speech["play"] in HELD_OUT
        text = speech["text"]
        label = verse_or_prose(text)
        if label and len(text) in PASSAGE:
            labelled[held].append({"text": passage(text), "label": label})
        if before.get("play") == speech["play"] and before["speaker"] != speech["speaker"]:
            cue, answer = " ".join(before["text"].split()), " ".join(text.split())
            if 10 <= len(cue) <= 300 and 10 <= len(answer) <= 200:
                dialogues[held].append({"prompt": ask(speech["speaker"], cue), "completion": answer})
        before = speech
    rng.shuffle(dialogues[False])
    rng.shuffle(dialogues[True])
    files = Files(
        train, valid, balanced(labelled[False], labels, rng), balanced(labelled[True], 400, rng),
        dialogues[False], dialogues[True][:400],
    )  # fmt: skip
    return write(
        directory,
        files,
        Material(
            title="Shakespeare's plays",
            held_out=HELD_OUT,
            question="Is this speech verse or prose? (set in one line, without the capitals that begin a verse)",
            labels=("prose", "verse"),
            cue="A speaker's name and the cue that was given; the answer is what that speaker says next.",
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
