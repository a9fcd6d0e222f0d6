"""Every row of docs/reference/data-formats.md is read as documented, or rejected with the documented message."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firth.corpora.readers import records
from firth.data.conversations import comparison, messages_of, prompt_of, unpaired
from firth.data.dialogues import DialoguesConfig, PreferencesConfig, Seq2SeqConfig, ranking
from firth.data.labeled import LabeledConfig, MultipleChoiceConfig, ScoredConfig, TaggedConfig
from firth.data.question_answering import QuestionsConfig
from firth.data.records import Records
from firth.data.semi_supervised import MultiAnnotatorConfig
from firth.tokenizer.chat import Message
from firth.types import UserError
from tests.support.tiny_corpus import tokenizer

PAGE = (Path(__file__).parents[3] / "docs" / "reference" / "data-formats.md").read_text("utf-8")


def rows_of(title: str) -> list[list[str]]:
    """Return the cells of the rows of one table of the page."""
    part = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in part.splitlines() if line[:1] == "|"]
    return rows[2:]


def record_of(cell: str) -> dict[str, Any]:
    return json.loads(cell.strip("`"))


def formatted(messages: list[Message], as_role: str = "") -> list[str]:
    """Format messages as the page does."""
    return [f"{as_role or m['role']}: {m['content']}".replace("\n", "\\n") for m in messages]


KINDS = {
    "classification": LabeledConfig(max_length=64),
    "regression": ScoredConfig(max_length=64),
    "multiple_choice": MultipleChoiceConfig(max_length=64),
    "token_classification": TaggedConfig(max_length=64),
    "question_answering": QuestionsConfig(max_length=64, max_question_length=16),
    "weak_supervision": MultiAnnotatorConfig(max_length=64),
}


@pytest.mark.parametrize("row", rows_of("Classes, numbers, choices, tags, spans"), ids=lambda row: row[0])
def test_a_labeled_record_is_read(tmp_path: Path, row: list[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row[1].strip("`") + "\n")
    source = Records(KINDS[row[0].strip("`")], [str(path)], tokenizer())
    assert source.counts == {"examples": 1, "records": 1, "files": 1}


@pytest.mark.parametrize("row", rows_of("Dialogues"), ids=lambda row: row[0])
def test_a_dialogue_is_read_as_documented(row: list[str]) -> None:
    record = record_of(row[1])
    assert "; ".join(formatted(messages_of(record))) == row[2]
    assert "; ".join(formatted(prompt_of(record))) == row[2].rpartition("; assistant: ")[0]


@pytest.mark.parametrize("row", rows_of("Preferences"), ids=lambda row: row[0])
def test_a_preference_is_read_as_documented(row: list[str]) -> None:
    prompt, chosen, rejected = comparison(record_of(row[1]))
    parts = [*formatted(prompt), *formatted(chosen, "chosen"), *formatted(rejected, "rejected")]
    assert "; ".join(parts) == row[2]
    assert prompt_of(record_of(row[1])) == prompt


@pytest.mark.parametrize("row", rows_of("Labeled answers"), ids=lambda row: row[0])
def test_a_labeled_answer_is_read_as_documented(row: list[str]) -> None:
    prompt, answer, desirable = unpaired(record_of(row[1]))
    parts = [*formatted(prompt), *formatted(answer, "desirable" if desirable else "undesirable")]
    assert "; ".join(parts) == row[2]


@pytest.mark.parametrize("row", rows_of("Rankings"), ids=lambda row: row[0])
def test_a_ranking_is_read_as_documented(row: list[str]) -> None:
    prompt, answers, rank = ranking(record_of(row[1]))
    parts = [formatted(answer, str(place)) for answer, place in zip(answers, rank, strict=True)]
    assert "; ".join([*formatted(prompt), *(text for one in parts for text in one)]) == row[2]


@pytest.mark.parametrize("row", rows_of("Rejected"), ids=lambda row: row[2][:40])
def test_a_record_is_rejected_as_documented(row: list[str]) -> None:
    readers = {"preference": comparison, "ranking": ranking, "dialogue": messages_of, "labeled answer": unpaired}
    read = readers[row[1]]
    with pytest.raises(UserError, match=re.escape(row[2])) as raised:
        read(record_of(row[0]))
    assert "\n" not in str(raised.value)


def test_the_page_has_all_tables() -> None:
    """Without its tables the tests above would be empty."""
    tables = ("Dialogues", "Preferences", "Labeled answers", "Rankings", "Rejected")
    assert [len(rows_of(title)) for title in tables] == [17, 11, 5, 5, 22]
    assert len(rows_of("Classes, numbers, choices, tags, spans")) == len(KINDS)


@pytest.mark.parametrize(
    ("record", "wrong"),
    [
        ({"text": "x"}, "this record has text"),
        ({}, "this record has nothing"),
        ({"messages": ["x"]}, "a turn of a dialogue must be an object with role and content, not 'x'"),
        ({"messages": [{"role": "user"}]}, "a turn needs a content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"text was expected, not \['x'\]"),
        ({"prompt": "q", "completion": 5}, "text was expected, not 5"),
        ({"instruction": "q", "output": None}, "text was expected, not None"),
    ],
)
def test_a_record_of_unknown_format_is_rejected(record: dict[str, Any], wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        messages_of(record)


def test_system_and_history_are_in_the_tokens(tmp_path: Path) -> None:
    """System turns and histories reach the model, in dialogues and in preferences."""
    path, count = tmp_path / "rows.jsonl", 0
    for title, kind in (("Dialogues", DialoguesConfig()), ("Preferences", PreferencesConfig())):
        for row in rows_of(title):
            if "Be brief" not in row[1]:
                continue
            path.write_text(json.dumps(record_of(row[1])) + "\n")
            example = Records(kind, [str(path)], tokenizer())[0]
            tokens = example["tokens" if title == "Dialogues" else "chosen_tokens"]
            assert tokenizer().decode(tokens).count("Be brief") == 1, row[0]
            count += 1
    assert count == 8


def test_a_repeated_prompt_is_in_the_tokens_once(tmp_path: Path) -> None:
    """UltraFeedback has the user's turn in `prompt` and again in both dialogues."""
    path = tmp_path / "rows.jsonl"
    turn = {"role": "user", "content": "Who paints the boat?"}
    for prompt in ("Who paints the boat?", [turn]):
        pair = {
            side: [turn, {"role": "assistant", "content": text}] for side, text in (("chosen", "I"), ("rejected", "No"))
        }
        path.write_text(json.dumps({"prompt": prompt, **pair}) + "\n")
        example = Records(PreferencesConfig(max_length=128), [str(path)], tokenizer())[0]
        assert tokenizer().decode(example["chosen_tokens"]).count("Who paints") == 1
        assert tokenizer().decode(example["rejected_tokens"][example["rejected_mask"]]) == "No"


def test_json_files_hold_a_list_or_lines(tmp_path: Path) -> None:
    """JSON lines in a .json file are read as in a .jsonl file, with their line in error messages."""
    rows = [record_of(row[1]) for row in rows_of("Dialogues")]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=1))
    assert [record for _, record in records([str(path)])] == rows
    path.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    assert [record for _, record in records([str(path)])] == rows
    assert [place for place, _ in records([str(path)])][:2] == [f"{path}:2", f"{path}:3"]
    path.write_text(json.dumps(rows[0]))
    assert [record for _, record in records([str(path)])] == rows[:1]
    path.write_text(json.dumps(rows[0]) + "\n{\n")
    with pytest.raises(UserError, match=r"rows\.json:2: this line is not JSON"):
        list(records([str(path)]))


JUNK: list[Any] = [None, True, 0, 1.5, "", "x\ny", [], {}, [[]], [{}], [["a", "b"]], [{"role": "user"}], {"from": "gpt", "value": []},
                   [{"type": "text"}], [{"type": "text", "text": 1}], "\n\nHuman: a\n\nAssistant:"]  # fmt: skip


def damaged(value: Any, rng: np.random.Generator) -> Any:
    """Return a copy of a record in which one value, at any depth, is junk."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or rng.random() < 0.2:
        return JUNK[rng.integers(len(JUNK))]
    key = keys[rng.integers(len(keys))]
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[key] = damaged(value[key], rng)
    return copy


def test_damaged_records_are_read_or_rejected_cleanly(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "rows.jsonl"
    good = [record_of(row[1]) for title in ("Dialogues", "Preferences") for row in rows_of(title)]
    made = [damaged(good[i % len(good)], rng) for i in range(5000)]
    messages: list[str] = []
    for record in (one for one in made if isinstance(one, dict)):
        for read in (messages_of, prompt_of, comparison):
            try:
                read(record)
            except UserError as error:
                messages.append(str(error))
    assert len(messages) > 2000
    assert not [message for message in messages if "\n" in message]
    for record in made[:150]:
        path.write_text(json.dumps(record) + "\n")
        for kind in (DialoguesConfig(), Seq2SeqConfig(), PreferencesConfig()):
            with contextlib.suppress(UserError):
                Records(kind, [str(path)], tokenizer())
