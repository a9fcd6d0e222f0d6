"""Faults in files of tasks: each is reported with its file and line and counted, none is dropped silently."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from firth.corpora import readers
from firth.corpora.input_files import ReadStats
from firth.data.labeled import LabeledConfig, MultipleChoiceConfig, TaggedConfig
from firth.data.labels import ClassNumbering
from firth.data.question_answering import QuestionsConfig, has_unanswerable
from firth.data.records import Records
from firth.types import UserError
from tests.support.tiny_corpus import tokenizer


def file(tmp_path: Path, name: str, text: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def lines(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_numbers_are_not_indices_if_class_names_are_numbers(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({"text": "x", "label": 1}, {"text": "y", "label": 0}))
    with pytest.raises(UserError, match=r"a\.jsonl:2: the label 0 is none of the classes \(1, 2, 3\)"):
        Records(LabeledConfig(max_length=32), [path], tokenizer(), classes=("1", "2", "3"))
    named = Records(LabeledConfig(max_length=32), [path], tokenizer(), classes=("bad", "good"))
    assert [int(named[i]["label"]) for i in range(2)] == [1, 0]
    assert ClassNumbering(("-1", "a")).number(0) is None


def test_white_space_around_labels_is_dropped(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "text, label\nx,bad\ny,bad \nz, good\n")
    source = Records(LabeledConfig(max_length=32), [path], tokenizer())
    assert source.classes == ("bad", "good")
    assert source.notes == [f"2 labels had white space around them, which was dropped; the first is {path}:3"]
    with pytest.raises(UserError, match=r"b\.csv:2: there is no field 'label' for the label; did you mean 'labels'"):
        Records(LabeledConfig(max_length=32), [file(tmp_path, "b.csv", "text,labels\nx,a\n")], tokenizer())


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    path = file(tmp_path, "a.csv", "text,label\nx,bad\n,good\n  ,good\n")
    for is_labeled in (True, False):
        source = Records(
            LabeledConfig(max_length=32), [path], tokenizer(), purpose="train" if is_labeled else "predict"
        )
        assert len(source) == 3 and source.counts["blank"] == 2
        assert f"2 texts were empty and were read as they are; the first is {path}:3" in source.notes


def test_invalid_utf_8_is_reported_for_every_file_type(tmp_path: Path) -> None:
    text = "caf\xe9"
    for name, content in {
        "a.csv": f"text,label\nx,a\n{text},b\n", "b.tsv": f"text\tlabel\nx\ta\n{text}\tb\n",
        "c.jsonl": '{"text": "x", "label": "a"}\n\n{"text": "' + text + '", "label": "b"}\n',
        "d.json": '[{"text": "x", "label": "a"},\n\n{"text": "' + text + '", "label": "b"}]',
    }.items():  # fmt: skip
        path = file(tmp_path, name, content.encode("latin-1"))
        source = Records(LabeledConfig(max_length=32), [path], tokenizer())
        assert source.counts["bad_utf8"] == 1
        assert source.notes == [
            f"1 line was not UTF-8 and has U+FFFD in place of what could not be read; the first is {path}:3"
        ]
    path = file(tmp_path, "e.csv", "text,label\nx,a\ny\0\0,b\n")
    assert Records(LabeledConfig(max_length=32), [path], tokenizer()).notes == [
        f"2 NUL characters were removed; the first is {path}:3"
    ]


def test_a_record_that_is_too_long_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 100)
    path = file(tmp_path, "a.jsonl", lines({"text": "x", "label": "a"}, {"text": "x" * 200, "label": "b"}))
    source = Records(LabeledConfig(max_length=32), [path], tokenizer())
    assert source.notes == [f"1 record was longer than 4 MB and was left out; the first is {path}:2"]


def test_missing_labels_are_left_out(tmp_path: Path) -> None:
    path = file(tmp_path, "a.tsv", "text\tlabel\nx\tneutral\ny\t-\nz\tentailment\n")
    source = Records(LabeledConfig(max_length=32, missing_labels=("-",)), [path], tokenizer())
    assert source.classes == ("entailment", "neutral") and source.counts["unlabeled"] == 1
    assert source.notes == [f"1 record has no label and was left out; the first is {path}:3"]
    assert (
        len(Records(LabeledConfig(max_length=32, missing_labels=("-",)), [path], tokenizer(), purpose="predict")) == 3
    )
    with pytest.raises(UserError, match=r"a\.tsv:3: the label - is none of the classes"):
        Records(LabeledConfig(max_length=32), [path], tokenizer(), classes=("neutral", "entailment"))


def test_numeric_tags_need_class_names(tmp_path: Path) -> None:
    path = file(tmp_path, "a.jsonl", lines({"tokens": ["EU", "rejects"], "ner_tags": [1, 0]}))
    kind = TaggedConfig(max_length=32, tags_field="ner_tags")
    with pytest.raises(UserError, match=r"a\.jsonl:1: the field 'ner_tags' holds 1 instead of the name of a tag"):
        Records(kind, [path], tokenizer())
    source = Records(kind, [path], tokenizer(), classes=("O", "B-ORG"))
    assert source.class_counts(np.arange(1)) == {"O": 1, "B-ORG": 1}
    with pytest.raises(UserError, match=r"a\.jsonl:1: the field 'ner_tags' holds 1, which is not one of the 1 tags"):
        Records(kind, [path], tokenizer(), classes=("O",))
    with pytest.raises(UserError, match=r"b\.jsonl:1: the field 'tokens' holds words that are not text"):
        Records(
            TaggedConfig(max_length=32), [file(tmp_path, "b.jsonl", lines({"tokens": [3], "tags": ["O"]}))], tokenizer()
        )


def test_unknown_tags_are_counted_and_empty_ones_reported(tmp_path: Path) -> None:
    path = file(tmp_path, "a.conll", "EU B-ORG\nx O\n\nAnn B-PER\n\nBen B-PER\n")
    with pytest.raises(
        UserError,
        match=r"a\.conll:4: the tag B-PER is none of the classes \(B-ORG, O\); 1 more tag has the same problem;",
    ):
        Records(TaggedConfig(max_length=32), [path], tokenizer(), classes=("B-ORG", "O"))
    source = Records(
        TaggedConfig(max_length=32), [path], tokenizer(), classes=("B-ORG", "B-PER", "B-TIME", "I-TIME", "O")
    )
    assert source.notes == [f"no record of {path} has the tags 'B-TIME', 'I-TIME'"]


def test_a_missing_word_is_reported_and_nbsp_is_no_separator(tmp_path: Path) -> None:
    good = "EU\tB-ORG\n\n" * 150
    path = file(tmp_path, "a.conll", good + "a\tO\n\tO\nb\tO\n\n" + good)
    source = Records(TaggedConfig(max_length=32), [path], tokenizer())
    assert source.counts["mismatched"] == 1
    assert any(f"the first is {path}:302 (no word before its columns)" in note for note in source.notes)
    with pytest.raises(UserError, match=r"b\.conll:2 \(no word before its columns\): so in 1 of 1 sentences"):
        Records(TaggedConfig(max_length=32), [file(tmp_path, "b.conll", "a\tO\n\tO\nb\tO\n")], tokenizer())
    [(_, sentence)] = readers.records([file(tmp_path, "c.conll", "10\u00a0000 NUM\nmen  NOUN\n")])
    assert sentence == {"tokens": ["10\u00a0000", "men"], "tags": ["NUM", "NOUN"]}


def test_tables_in_a_directory_are_records_not_text(tmp_path: Path) -> None:
    file(tmp_path, "a.jsonl", lines({"text": "x", "label": "a"}))
    file(tmp_path, "b.csv", "text,label\ny,b\n")
    assert [record["text"] for _, record in readers.records([str(tmp_path)])] == ["x", "y"]
    counts = ReadStats()
    assert [d.text for d in readers.documents([str(tmp_path)], counts=counts)] == ["x"]
    assert (counts.skipped, counts.at["skipped"]) == (1, str(tmp_path / "b.csv"))
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"no text in this directory: .*b\.csv and such are records, read as text only"):
        list(readers.documents([str(tmp_path)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answers": 3}, "question q7: 'answers' holds '3', so this is not SQuAD's JSON: fix or remove it"),
        ({"answers": None}, "question q7: there is no 'answers'"),
        ({"id": None}, "article 1, paragraph 2, question 1: there is no 'id'"),
        ({"question": None}, "question q7: there is no 'question'"),
        ({"answers": [{"text": "b"}]}, "question q7: there is no 'answer_start'"),
    ],
)
def test_squad_errors_name_the_question(tmp_path: Path, change: dict[str, object], message: str) -> None:
    question = {"id": "q7", "question": "?", "answers": [{"text": "b", "answer_start": 2}]} | change
    good = {"context": "a b", "qas": []}
    path = file(
        tmp_path, "a.json", json.dumps({"data": [{"paragraphs": [good, {"context": "a b", "qas": [question]}]}]})
    )
    with pytest.raises(UserError) as found:
        list(readers.records([path]))
    assert message in str(found.value) and str(found.value).startswith(path)


def test_lost_answers_and_long_questions(tmp_path: Path) -> None:
    answers = [{"text": "b", "answer_start": 2}]
    qas = [
        {"id": "1", "question": "which? " * 30, "answers": answers},
        {"id": "2", "question": "?", "answers": []},
        {"id": "3", "question": "?", "answers": [], "is_impossible": True},
    ]
    path = file(tmp_path, "a.json", json.dumps({"data": [{"paragraphs": [{"context": "a b", "qas": qas}]}]}))
    source = Records(QuestionsConfig(max_length=64, max_question_length=16), [path], tokenizer())
    assert (len(source), has_unanswerable(source)) == (2, True)
    assert source.notes == [
        f"1 question was longer than 16 tokens and lost its end; the first is {path}: question 1",
        "1 question has no answer though every question of SQuAD 1.1 has one, and was left out; "
        f"the first is {path}: question 2",
        f"1 question has no answer, so the model may say that there is none; the first is {path}: question 3",
    ]
    assert source.metadata(1)["question"].right == ()


def test_carriage_returns_alone_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"a\.csv:1: a line ends in a carriage return alone, as on old Macs: convert it"
    ):
        list(readers.records([file(tmp_path, "a.csv", "text,label\rx,a\ry,b\r")]))


def test_column_names_do_not_hide_a_header(tmp_path: Path) -> None:
    columns = ("source", "label", "mark", "sentence")
    train = file(tmp_path, "train.tsv", "gj04\t1\t\tSo it is.\ngj04\t0\t*\tIs so it.\n")
    test = file(tmp_path, "test.tsv", "index\tsentence\n0\tSo it is.\n1\tIs so it.\n")
    assert (
        len(Records(LabeledConfig(max_length=32, text_field="sentence", column_names=columns), [train], tokenizer()))
        == 2
    )
    unlabeled = Records(
        LabeledConfig(max_length=32, text_field="sentence", column_names=columns),
        [test],
        tokenizer(),
        classes=("0", "1"),
        purpose="predict",
    )
    assert len(unlabeled) == 2 and unlabeled.counts == {"examples": 2, "records": 2, "files": 1}


def test_class_counts_of_some_examples(tmp_path: Path) -> None:
    path = file(tmp_path, "a.conll", "a A\nb B\n\nc A\n\nd A\ne B\nf B\n")
    source = Records(TaggedConfig(max_length=32), [path], tokenizer())
    assert source.class_counts(np.array([2, 0])) == {"A": 2, "B": 3}
    assert source.class_counts(np.array([1])) == {"A": 1, "B": 0}
    assert source.class_counts(np.zeros(0, np.int64)) == {"A": 0, "B": 0}


def test_unnamed_columns_get_the_names_of_pandas(tmp_path: Path) -> None:
    """Spreadsheets pad a header with empty cells, and pandas writes its index under one."""
    path = file(tmp_path, "a.csv", "kind,message,,,\ngood,a film,,,\nbad,a play\nbad,a poem,,see,\n")
    rows = [record for _, record in readers.records([path])]
    empty = {"Unnamed: 2": "", "Unnamed: 3": "", "Unnamed: 4": ""}
    assert rows[:2] == [{"kind": "good", "message": "a film", **empty}, {"kind": "bad", "message": "a play", **empty}]
    assert rows[2]["Unnamed: 3"] == "see"
    source = Records(LabeledConfig(max_length=32, text_field="message", label_field="kind"), [path], tokenizer())
    assert source.class_counts(np.arange(3)) == {"bad": 2, "good": 1}
    note = f"3 columns have no name and are called 'Unnamed: ' and their place from 0; the first is {path}:1"
    assert source.notes == [note]
    index = [record for _, record in readers.records([file(tmp_path, "b.csv", ",text,label\n0,x,good\n")])]
    assert index == [{"Unnamed: 0": "0", "text": "x", "label": "good"}]


def test_labels_spelled_null_and_na_are_classes(tmp_path: Path) -> None:
    rows = "".join(f"text {i},{('NA', 'null')[i % 2]}\n" for i in range(12))
    source = Records(LabeledConfig(max_length=32), [file(tmp_path, "a.csv", "text,label\n" + rows)], tokenizer())
    assert source.class_counts(np.arange(12)) == {"NA": 6, "null": 6}


def test_one_short_row_does_not_reject_a_small_table(tmp_path: Path) -> None:
    """One row of a GLUE file without a cell is left out and reported; more are rejected with advice on TSV."""
    head = "sentence\tlabel\n"
    nine = "".join(f"film {i}\t1\n" for i in range(9))
    path = file(tmp_path, "dev.tsv", head + nine + "a play\n")
    source = Records(LabeledConfig(max_length=32, text_field="sentence"), [path], tokenizer())
    assert source.counts == {"examples": 9, "records": 9, "files": 1, "mismatched": 1}
    assert source.notes == [
        f"1 row had another number of cells than its head and was left out; the first is {path}:11 "
        "(1 cells under 2 columns)"
    ]
    path = file(tmp_path, "test.tsv", head + nine + "a play\n" * 2)
    with pytest.raises(UserError, match=r"2 of 11 rows: give each row as many cells.*a TSV holds no tab") as raised:
        Records(LabeledConfig(max_length=32, text_field="sentence"), [path], tokenizer())
    assert "quot" not in str(raised.value)


def test_labels_written_as_floats(tmp_path: Path) -> None:
    """pandas writes integers as 1.0 where a column has a gap; other floats are for a regression."""
    path = file(tmp_path, "a.jsonl", lines(*({"text": f"x {label!r}", "label": label} for label in (1.0, 0.0, 1))))
    source = Records(LabeledConfig(max_length=32), [path], tokenizer())
    assert source.classes == ("0", "1")
    assert [int(source[i]["label"]) for i in range(3)] == [1, 0, 1]
    assert source.notes == [
        f"2 labels were written as a decimal number (1.0) and were read as a whole one; the first is {path}:1"
    ]
    chosen = Records(
        MultipleChoiceConfig(max_length=32),
        [file(tmp_path, "o.jsonl", lines({"text": "x", "options": ["a", "b"], "label": 1.0}))],
        tokenizer(),
    )
    assert chosen[0]["label"] == chosen.counts["decimal"] == 1
    path = file(tmp_path, "b.jsonl", lines({"text": "x", "label": 1.5}))
    with pytest.raises(UserError, match=r"b\.jsonl:1: the label is 1\.5.* use the recipe `regression` for numbers"):
        Records(LabeledConfig(max_length=32), [path], tokenizer())
    with pytest.raises(UserError, match=r"c\.csv:2: the label is empty.* remove the record"):
        Records(LabeledConfig(max_length=32), [file(tmp_path, "c.csv", "text,label\nx,\n")], tokenizer())
