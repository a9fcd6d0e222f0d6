"""Unlabeled texts never include held-out texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from firth.data.examples import DataConfig, DatasetSplits
from firth.data.semi_supervised import PartiallyLabeledConfig
from firth.objectives.semi_supervised import Consistency
from firth.runs.prepare import RunData
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError

TEXTS = [f"the {animal} paints boat {n}" for n in range(10) for animal in ("otter", "heron", "badger", "vole")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(TEXTS * 5, "byte-bpe", 300)


def write(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text, "label": "ab"[len(text) % 2]}) + "\n" for text in texts))
    return str(file)


def cut(folder: Path, tokenizer: Tokenizer, others: str, lines: list[str], **source: object) -> DatasetSplits:
    text = DataConfig(path=(write(folder / "labeled.jsonl", TEXTS),), **source)  # type: ignore[arg-type]
    return PartiallyLabeledConfig(unlabeled_path=(others,)).build(
        RunData(text, tokenizer, folder, log=lines.append), Consistency(class_names=("a", "b"))
    )


def test_held_out_texts_are_removed_from_unlabeled_texts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    more = [f"a new text of number {n}" for n in range(12)]
    lines: list[str] = []
    for name, texts in (("more.jsonl", [*TEXTS, *more]), ("more.txt", [*TEXTS, *more])):
        file = write(tmp_path / name, texts)
        if name == "more.txt":
            (tmp_path / name).write_text("\n".join(texts))
        found = cut(tmp_path, tokenizer, file, lines, validation_fraction=0.25)
        assert found.validation is not None and 0 < len(found.validation) < 20
        known = [
            {source[i]["tokens"].tobytes() for i in range(len(source))} for source in (found.train, found.validation)
        ]
        assert not known[0] & known[1] and len(known[0]) == len(texts) - len(found.validation)
        assert found.counts["unlabeled"] == len(texts) - len(found.validation)
    assert [line.split(" texts")[0] for line in lines if "examples.unlabeled_path" in line] == [
        f"{len(found.validation)} of 52"
    ] * 2


def test_unlabeled_texts_all_held_out_are_rejected(tokenizer: Tokenizer, tmp_path: Path) -> None:
    valid = write(tmp_path / "valid.jsonl", TEXTS[:30])
    with pytest.raises(UserError, match=r"^all 30 texts of examples\.unlabeled_path are held out"):
        cut(tmp_path, tokenizer, valid, [], validation_path=(valid,))
