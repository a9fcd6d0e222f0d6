"""Data files of the demo, made from Shakespeare's plays or from a user's own folder.

    train.jsonl, valid.jsonl           {"text"}: documents for pretraining, and held-out documents
    labeled-train.jsonl, -valid        {"text", "label"}: labeled passages; the held-out ones come from held-out documents
    dialogues-train.jsonl, -valid      {"prompt", "completion"}: a prompt and its answer
    material.json                      descriptions of the tasks, and the name of the ground-truth reward

Every stage of the demo reads these files and no others.

`make_play_data`, from Shakespeare's plays: four plays are held out. The classification task is questions and statements;
the dialogues are cues with their answers.

`make_folder_data`, from a user's own folder of text: the label of a passage is its document, if several documents are large
enough, or else the third of the text that contains it. A dialogue is a paragraph and the one that follows it.

The ground-truth rewards of the demo, against which every alignment method is measured, are here too. In practice the true reward is
human judgment, known only through comparisons. Here it is a function of the text, so that the report can show both the score of the
reward model and the true reward.

>>> brief("I will go.") > brief("I will go") > brief("")
True
>>> thou("What wilt thou do?") > thou("What will you do?")
True
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from firth.compare.probe_dataset import sentences
from firth.corpora.readers import documents
from firth.io.atomic import new_directory, new_file
from firth.types import UserError

Row = dict[str, str]

INFO = "material.json"
"""File name of the `DatasetInfo`; it exists if the data of a demo is complete."""


@dataclass(frozen=True)
class DatasetInfo:
    """Description of the data of one demo, for the terminal and the report.

    Args:
        title: Name of the text.
        held_out: Names of the held-out documents.
        question: Description of the classification task.
        labels: Names of its classes.
        cue: Description of the dialogues.
        scorer: Name of the ground-truth reward in `firth.demo.data.SCORERS`.
        samples: Prompts for samples of the decoder.
        bytes: UTF-8 bytes of the training text.
    """

    title: str
    held_out: tuple[str, ...]
    question: str
    labels: tuple[str, ...]
    cue: str
    scorer: str
    samples: tuple[str, ...]
    bytes: int

    def save(self, directory: Path) -> None:
        """Write the description to a directory.

        Args:
            directory: The data directory.
        """
        (directory / INFO).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), "utf-8")

    @staticmethod
    def load(directory: Path) -> DatasetInfo:
        """Read the description that `save` wrote.

        Args:
            directory: The data directory.

        Returns:
            The description.
        """
        fields: dict[str, Any] = json.loads((directory / INFO).read_text("utf-8"))
        tuples = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        arguments: Any = fields | tuples
        return DatasetInfo(**arguments)


@dataclass(frozen=True)
class DemoFiles:
    """Rows of the data files of a demo.

    Args:
        train: Training documents.
        valid: Held-out documents.
        labeled_train: Labeled training passages.
        labeled_valid: Labeled held-out passages.
        dialogues_train: Prompts and completions for training.
        dialogues_valid: Held-out prompts and completions.
    """

    train: Sequence[Row]
    valid: Sequence[Row]
    labeled_train: Sequence[Row]
    labeled_valid: Sequence[Row]
    dialogues_train: Sequence[Row]
    dialogues_valid: Sequence[Row]


def write_data(directory: Path, files: DemoFiles, info: DatasetInfo) -> DatasetInfo:
    """Write the data of a demo atomically: the directory appears when all its files are complete.

    Args:
        directory: The data directory.
        files: Rows of each file.
        info: Description of the data.

    Returns:
        `info`.

    Raises:
        UserError: A file would have no rows.
    """
    for name, rows in asdict(files).items():
        if not rows:
            raise UserError(
                f"the text is too small for the demo: no {name.replace('_', ' ')} rows; give it about 200 kB or more"
            )
    with new_directory(directory) as partial:
        for name, rows in vars(files).items():
            write_rows(partial / f"{name.replace('_', '-')}.jsonl", rows)
        info.save(partial)
    return info


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows to a JSONL file atomically.

    Args:
        path: The file.
        rows: One JSON object per line.
    """
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file.

    Args:
        path: A file that `write_rows` wrote.

    Returns:
        Its rows, in order.
    """
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sample_balanced(rows: Sequence[Row], max_rows: int, rng: random.Random) -> list[Row]:
    """Sample rows with equally many rows of each label, in random order.

    A constant prediction then has an accuracy of 1 / (number of labels).

    Args:
        rows: Labeled rows.
        max_rows: Largest number of rows.
        rng: Random number generator.

    Returns:
        The sampled rows.
    """
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    if not by_label:
        return []
    per_label = min(max_rows // len(by_label), *(len(group) for group in by_label.values()))
    sampled = [row for label in sorted(by_label) for row in rng.sample(by_label[label], per_label)]
    rng.shuffle(sampled)
    return sampled


HELD_OUT = ("the-tempest", "much-ado-about-nothing", "henry-iv-part-1", "julius-caesar")
"""Held-out plays, one of each genre; no training stage reads them."""


def make_play_data(
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


MIN_BYTES = 50_000
"""Fewest UTF-8 bytes of text: with less, the models learn nothing in minutes and the held-out text is too small."""

THIRDS = ("beginning", "middle", "end")
"""Labels of passages by their position in the whole text."""


def make_folder_data(
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


ARCHAIC_WORDS = {"thou", "thee", "thy", "thine", "thyself", "art", "hast", "dost", "wilt", "shalt", "hath", "doth"}
"""Words that `thou` rewards."""


def words(text: str) -> list[str]:
    """Split a text into lowercase words.

    Args:
        text: The text.

    Returns:
        Its words, without punctuation and digits.
    """
    return re.findall(r"[a-z']+", text.lower())


def brief(text: str) -> float:
    """Compute a reward for a finished, short answer without repetition.

    The reward is 1 for a final . ! or ?, plus up to 1 for a length of 3 to 20 words (falling to 0 at 40 words); the sum is
    multiplied by the share of distinct words.

    Args:
        text: An answer.

    Returns:
        The reward, 0 to 2.
    """
    answer = words(text)
    if len(answer) < 3:
        return 0.0
    finished = 1.0 if text.rstrip().endswith((".", "!", "?")) else 0.0
    length = min(1.0, max(0.0, (40 - len(answer)) / 20))
    return (finished + length) * len(set(answer)) / len(answer)


def thou(text: str) -> float:
    """Compute the `brief` reward, multiplied by a factor for archaic pronouns and verbs (thou, thee, thy, hath, ...).

    The factor is 1.5, 1.75 or 2 for one, two or three such words; more of them add nothing.

    Args:
        text: An answer.

    Returns:
        The reward, 0 to 4.
    """
    count = sum(word in ARCHAIC_WORDS for word in words(text))
    return brief(text) * (1 + min(1.0, 0.5 * min(count, 1) + 0.25 * max(0, min(count, 3) - 1)))


SCORERS: dict[str, Callable[[str], float]] = {"brief": brief, "thou": thou}
"""Ground-truth rewards by name."""
