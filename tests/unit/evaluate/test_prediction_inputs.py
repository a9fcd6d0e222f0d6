"""Input of predict, evaluate and embed: no record is dropped, repaired or shifted without a warning."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner, Result

from firth.cli import app
from firth.data.question_answering import QuestionsConfig, question_of
from firth.data.records import Records
from firth.data.source import SubsetSource
from firth.evaluate.evaluate import evaluate
from firth.evaluate.heads import best_span, choose_answer
from firth.evaluate.predict import predict
from firth.model.config import encoder_config, encoder_decoder_config
from firth.model.model import LM
from firth.objectives.classification import classification_head
from firth.objectives.sft import Seq2SeqSFT
from firth.pretrained.load_save import save_model
from firth.runs.evaluation import Validator
from firth.runs.recipe import EvalConfig, load
from firth.runs.run import run
from firth.training.distributed import Ranks
from firth.types import UserError
from tests.support.messages import logged
from tests.support.tiny_corpus import tokenizer

Saved = Callable[..., Path]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """Return a function that writes a run directory with an untrained model."""

    def make(heads: dict[str, nn.Module], recipe: dict[str, Any], classes: tuple[str, ...] = ()) -> Path:
        vocab_tokenizer = tokenizer()
        torch.manual_seed(0)
        model = LM(encoder_config(vocab_tokenizer.vocab.size, 64, 1, num_heads=2, max_positions=64), heads)
        directory = tmp_path / f"run-{recipe['examples']['kind']}"
        save_model(model, vocab_tokenizer, directory / "model", {"recipe": "0", "classes": classes})
        (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return directory

    return make


@pytest.fixture
def classifier(saved: Saved) -> Path:
    recipe = {
        "objective": {"kind": "classification", "position": "first"},
        "examples": {"kind": "labeled", "max_length": 32},
    }
    return saved({"classes": classification_head(64, 2)}, recipe, ("bad", "good"))


@pytest.fixture
def tagger(saved: Saved) -> Path:
    return saved(
        {"tags": classification_head(64, 3)},
        {"examples": {"kind": "tagged", "max_length": 32}},
        ("B-LOC", "I-LOC", "O"),
    )


@pytest.fixture
def reader(saved: Saved) -> Path:
    recipe = {
        "objective": {"kind": "question_answering", "position": "first", "has_unanswerable": True},
        "examples": {"kind": "questions", "max_length": 48, "max_question_length": 8, "doc_stride": 16},
    }
    return saved({"span": classification_head(64, 2)}, recipe)


def predicted(directory: Path, text: str | bytes, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows and warnings of `predict` for standard input."""
    stdin = io.BytesIO(text if isinstance(text, bytes) else text.encode())
    with logged(logging.WARNING) as notes:
        return list(predict(directory, "-", stdin, **options)), notes


def command(*words: object, stdin: bytes = b"") -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=stdin, catch_exceptions=True)


def squad(path: Path, *questions: dict[str, Any]) -> Path:
    paragraph = {"context": "The play was written by Anne Lee. " * 6, "qas": list(questions)}
    path.write_text(json.dumps({"data": [{"paragraphs": [paragraph]}]}))
    return path


def test_unreadable_row_is_an_error_and_rows_keep_their_numbers(classifier: Path, tmp_path: Path) -> None:
    rows = [f"{i},a film" for i in range(200)]
    rows[41] = "41,a film, and long"
    (tmp_path / "f.csv").write_text("id,text\n" + "\n".join(rows) + "\n")
    for name in ("predict", "embed"):
        found = command(name, classifier, tmp_path / "f.csv", "--out", tmp_path / "o")
        assert isinstance(found.exception, UserError) and not (tmp_path / "o").exists()
        assert f"{tmp_path}/f.csv:43 (3 cells under 2 columns): this row cannot be read" in str(found.exception)
    rows[41] = "x,a film"
    (tmp_path / "f.csv").write_text("id,text\n" + "\n".join(rows) + "\n")
    found = command("predict", classifier, tmp_path / "f.csv", "--out", tmp_path / "o.csv")
    assert "200 rows" in found.output
    table = list(csv.DictReader((tmp_path / "o.csv").open()))
    assert [(row["row"], row["id"]) for row in table] == [(str(i + 1), "x" if i == 41 else str(i)) for i in range(200)]


def test_evaluate_warns_of_skipped_and_truncated_records(classifier: Path, tmp_path: Path) -> None:
    rows = ["a film,good"] * 150
    rows[6] = "a film, good, really"
    (tmp_path / "f.csv").write_text("text,label\n" + "\n".join(rows) + "\n" + "film " * 80 + ",bad\n")
    found = command("evaluate", classifier, tmp_path / "f.csv", "--json")
    assert json.loads(found.stdout)["items"] == 150
    assert (
        f"had another number of cells than its head and was left out; the first is {tmp_path}/f.csv:8" in found.stderr
    )
    assert f"longer than 32 tokens and lost its end; the first is {tmp_path}/f.csv:152" in found.stderr


def test_truncation_warnings_have_the_users_location(classifier: Path, tmp_path: Path) -> None:
    long = "film " * 80
    rows, notes = predicted(classifier, f"a film\n\n{long}\n")
    assert [row["row"] for row in rows] == [1, 2, 3] and rows[1] == {"row": 2}
    assert "standard input: 1 row of 3 without text; the first is row 2" in notes
    assert any("lost its end; the first is standard input:3" in note for note in notes)
    (tmp_path / "f.txt").write_text(f"a film\n{long}\n")
    found = command("predict", classifier, tmp_path / "f.txt")
    assert len(found.stdout.splitlines()) == 2 and f"the first is {tmp_path}/f.txt:2" in found.stderr
    found = command("embed", classifier, tmp_path / "f.txt", "--out", tmp_path / "e.npy")
    assert "1 text longer than the limit, truncated at the end; the first is row 2" in found.stderr


def test_errors_have_the_users_location(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^standard input:2: there is no field 'text'; did you mean 'texts'"):
        predicted(classifier, '{"text": "a"}\n{"texts": "b"}\n')
    with pytest.raises(UserError, match=r"^standard input:2: this line is not JSON"):
        predicted(classifier, '{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match=r"^standard input: the input holds no record$"):
        predicted(classifier, "")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match=rf"^{tmp_path}/empty.txt: the input holds no record$"):
        list(predict(classifier, str(tmp_path / "empty.txt"), io.BytesIO()))


def test_only_line_feeds_separate_lines(classifier: Path, tmp_path: Path) -> None:
    rows, _ = predicted(classifier, "one\u2028film\nsecond\x0c film\r\nthird")
    assert [row["row"] for row in rows] == [1, 2, 3] and all("label" in row for row in rows)
    found = command("embed", classifier, "-", "--out", tmp_path / "e.jsonl", stdin="one\u2028film\n\nthird\n".encode())
    assert "1 row of 3 without text; the first is row 2" in found.stderr and "3 vectors" in found.stdout
    vectors = [json.loads(line) for line in (tmp_path / "e.jsonl").read_text().splitlines()]
    assert [one["row"] for one in vectors] == [1, 2, 3]
    single = command("embed", classifier, "-", "--out", tmp_path / "one.npy", stdin=b"third")
    assert single.exit_code == 0
    np.testing.assert_allclose(np.load(tmp_path / "one.npy")[0], vectors[2]["embedding"], atol=1e-5)


def test_invalid_utf_8_is_read_with_a_warning(classifier: Path, tmp_path: Path) -> None:
    rows, notes = predicted(classifier, "a caf\xe9 film\na film\n".encode("latin-1"))
    assert len(rows) == 2 and "standard input: 1 line not in UTF-8, read with U+FFFD for bad bytes" in notes
    found = command("embed", classifier, "-", "--out", tmp_path / "e.npy", stdin=b"caf\xe9\n")
    assert found.exit_code == 0 and "not in UTF-8" in found.stderr
    with pytest.raises(UserError, match="standard input: this is UTF-16"):
        predicted(classifier, "a film\n".encode("utf-16"))


def test_missing_files_and_unwritable_outputs(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("a film\n")
    for name in ("predict", "embed"):
        found = command(name, classifier, tmp_path / "nope.txt", "--out", tmp_path / "o")
        assert f"{tmp_path}/nope.txt: there is no such file" in str(found.exception)
        found = command(name, classifier, tmp_path / "f.txt", "--out", tmp_path / name / "deep" / "o.jsonl")
        assert found.exit_code == 0 and (tmp_path / name / "deep" / "o.jsonl").is_file()
        found = command(name, classifier, tmp_path / "f.txt", "--out", tmp_path / "f.txt" / "o")
        assert isinstance(found.exception, UserError) and "is not a directory" in str(found.exception)
        found = command(name, classifier, tmp_path / "f.txt", "--out", tmp_path)
        assert isinstance(found.exception, UserError) and "this is a directory" in str(found.exception)


def test_input_format_is_guessed_or_given(classifier: Path, tagger: Path, tmp_path: Path) -> None:
    rows, notes = predicted(classifier, "{a} film\nanother\n")
    assert len(rows) == 2 and "its first line begins with { but is not JSON" in notes[0]
    assert len(predicted(classifier, '{"text": "one"}\n', form="lines")[0]) == 1
    rows, notes = predicted(classifier, "id,title\n1,a film\n")
    assert len(rows) == 2 and "this may be a table without a column 'text'" in notes[0] and "--input csv" in notes[0]
    with pytest.raises(UserError, match="standard input:2: there is no field 'text'; it has id, title"):
        predicted(classifier, "id,title\n1,a film\n", form="csv")
    assert predicted(classifier, "a fine, warm film\n") == predicted(classifier, "a fine, warm film\n", form="lines")
    (tmp_path / "f.data").write_text("id\ttext\n7\ta film\n")
    found = command("predict", classifier, tmp_path / "f.data", "--input", "tsv")
    assert json.loads(found.stdout)["id"] == "7"
    (tmp_path / "f.csv").write_text('a film\n"another, and more\n')
    assert len(command("predict", classifier, tmp_path / "f.csv", "--input", "lines").stdout.splitlines()) == 2
    found = command("predict", classifier, "-", "--input", "xml")
    assert "--input xml: the formats are auto, lines, csv, tsv, jsonl, conll, squad" in str(found.exception)
    rows, _ = predicted(tagger, "EU X-Y\nrejects X-Y\n\nParis X-Y\n", form="conll")
    assert [row["tokens"] for row in rows] == [["EU", "rejects"], ["Paris"]]


COLUMNS = "-DOCSTART- -X- -X- O\n\nParis NN I-NP B-LOC\nsleeps VBZ I-VP O\n\nRome NN I-NP I-LOC\n"


@pytest.mark.parametrize("name", ["a.txt", "eng.testa", "a.conll", "-"])
def test_token_classification_reads_columns_as_in_training(name: str, tagger: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(COLUMNS)
    file = name if name == "-" else str(tmp_path / name)
    rows = list(predict(tagger, file, io.BytesIO(COLUMNS.encode())))
    assert [row["tokens"] for row in rows] == [["Paris", "sleeps"], ["Rome"]]
    rows, notes = predicted(tagger, "Paris X-Y\nsleeps X-Z\n")
    assert len(rows) == 2 and "this may have one word per line with columns and unknown tags" in notes[0]
    rows, _ = predicted(tagger, "a grim film\n\nParis sleeps\n")
    assert [row.get("tokens") for row in rows] == [["a", "grim", "film"], None, ["Paris", "sleeps"]]


def test_squad_on_standard_input_and_an_absent_answer(reader: Path, tmp_path: Path) -> None:
    file = squad(
        tmp_path / "a.json",
        {"id": "q1", "question": "Who wrote it?", "answers": [{"text": "Anne Lee", "answer_start": 24}]},
        {"id": "q2", "question": "Who wrote it, and when, and why, and who else?", "answers": [{"text": "Lee", "answer_start": 3}]},
    )  # fmt: skip
    rows, notes = predicted(reader, file.read_bytes())
    assert [row["id"] for row in rows] == ["q1", "q2"] and rows == list(predict(reader, str(file), io.BytesIO()))
    assert any(
        "1 question was longer than 8 tokens and lost its end; the first is standard input: question q2" in s
        for s in notes
    )
    with logged(logging.WARNING) as notes:
        assert evaluate(reader, [str(file)])["items"] == 2
    assert any("1 answer is not in its passage" in note and "question q2" in note for note in notes)


def test_probability_of_no_answer(reader: Path, tmp_path: Path) -> None:
    """A head with equal scores, then scores that prefer "no answer"."""
    vocab_tokenizer = tokenizer()
    head = classification_head(64, 2)
    nn.init.zeros_(head.weight)
    model = LM(encoder_config(vocab_tokenizer.vocab.size, 64, 1, num_heads=2, max_positions=64), {"span": head})
    save_model(model, vocab_tokenizer, reader / "model", {"recipe": "0"})
    file = squad(tmp_path / "a.json", {"id": "q1", "question": "Who?", "answers": []})
    [row] = predict(reader, str(file), io.BytesIO())
    assert row["answer"] != "" and row["probability"] < 0.01  # all scores are equal, so a span wins over "no answer"
    scores = np.zeros((6, 2))
    scores[0] = 4.0
    offsets = np.array([[-1, -1], [0, 1], [1, 2], [2, 3], [3, 4], [4, 5]])
    answer = choose_answer([best_span(scores, offsets, 0)], "abcde", has_unanswerable=True)
    assert answer["answer"] == "" and answer["probability"] == pytest.approx((np.exp(4) / (np.exp(4) + 5)) ** 2)


@pytest.fixture
def writer(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def make(examples: dict[str, Any]) -> Path:
        vocab_tokenizer = tokenizer()
        torch.manual_seed(0)
        config = encoder_decoder_config(vocab_tokenizer.vocab.size, 64, 1, num_heads=2, max_positions=48)
        model = LM(config, Seq2SeqSFT().heads(config))
        save_model(model, vocab_tokenizer, tmp_path / "run" / "model", {"recipe": "0"})
        recipe = {
            "objective": {"kind": "seq2seq"},
            "examples": {"kind": "seq2seq", "max_length": 32, "max_target_length": 5} | examples,
        }
        (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return tmp_path / "run"

    return make


def test_seq2seq_is_predicted_and_evaluated(writer: Callable[..., Path], tmp_path: Path) -> None:
    run_directory = writer({"prompt_template": "translate to French: {en}", "completion_template": "{fr}"})
    rows, _ = predicted(run_directory, '{"en": "an otter", "id": 3}\n{"en": "a film", "fr": "un film"}\n')
    assert [row.keys() for row in rows] == [
        {"row", "id", "answer", "probability", "finish"},
        {"row", "answer", "probability", "finish"},
    ]
    assert all(row["finish"] in ("stop", "length") and 0 <= row["probability"] <= 1 for row in rows)
    lines, _ = predicted(run_directory, "an otter\n\na film\n")
    assert [line.get("answer") for line in lines] == [rows[0]["answer"], None, rows[1]["answer"]]
    (tmp_path / "t.csv").write_text("en,fr\nan otter,une loutre\na film,un film\n")
    table = list(predict(run_directory, str(tmp_path / "t.csv"), io.BytesIO()))
    assert [row["answer"] for row in table] == [row["answer"] for row in rows]
    found = evaluate(run_directory, [str(tmp_path / "t.csv")])
    assert (found["task"], found["items"]) == ("generation", 2) and "exact_match" in found
    with pytest.raises(UserError, match=r"standard input:2: the template .* does not fit this record"):
        predicted(run_directory, '{"en": "a"}\n{"de": "b"}\n')


def test_seq2seq_of_prompts_and_dialogues(writer: Callable[..., Path]) -> None:
    run_directory = writer({})
    turns = [{"role": "user", "content": "an otter"}, {"role": "assistant", "content": "a beast"}]
    rows, _ = predicted(run_directory, "\n".join(json.dumps(r) for r in [
        {"prompt": "an otter"}, {"prompt": "an otter", "completion": "x"}, {"messages": turns}, {"messages": turns[:1]},
        {"instruction": "an otter"},
    ]))  # fmt: skip
    assert len(rows) == 5 and len({row["answer"] for row in rows}) == 1
    run_directory = writer({"prompt_template": "{a} and {b}", "completion_template": "{c}"})
    with pytest.raises(UserError, match="the prompt template has the fields a, b, which lines of text cannot give"):
        predicted(run_directory, "a line\n")


def test_annotations_are_evaluated_by_their_majority(saved: Saved, tmp_path: Path) -> None:
    recipe = {
        "objective": {"kind": "multi_annotator", "position": "first"},
        "examples": {"kind": "multi_annotator", "max_length": 32, "labels_field": "votes"},
    }
    run_directory = saved({"classes": classification_head(64, 2)}, recipe, ("bad", "good"))
    (tmp_path / "v.jsonl").write_text(
        '{"text": "a film", "votes": ["good", "bad", "good"]}\n{"text": "a film", "votes": ["bad"]}\n'
        '{"text": "a film", "label": "bad"}\n'
    )
    found = evaluate(run_directory, [str(tmp_path / "v.jsonl")])
    assert (found["task"], found["items"], found["majority_label"]) == ("classification", 3, "bad")
    assert len(list(predict(run_directory, str(tmp_path / "v.jsonl"), io.BytesIO()))) == 3
    (tmp_path / "w.jsonl").write_text('{"text": "a film"}\n')
    with pytest.raises(UserError, match=r"w.jsonl:1: the field 'votes' must be a list"):
        evaluate(run_directory, [str(tmp_path / "w.jsonl")])


QUESTIONS = {"a film": "fine", "and then": "dull", "who": "warm"}


def windows(path: Path, n: int) -> Path:
    """Write passages of several windows, with several questions each."""
    passages = []
    for i in range(n):
        words = ["a fine thing, and then", "the dull day", "warm and low"]
        context = ". ".join(words[(i + k) % 3] for k in range(9))
        questions = [
            {"id": f"{i}-{q}", "question": q, "answers": [{"text": a, "answer_start": context.index(a)}]}
            for q, a in QUESTIONS.items()
        ]
        passages.append({"context": context, "qas": questions})
    path.write_text(json.dumps({"data": [{"paragraphs": passages}]}))
    return path


@pytest.mark.slow
def test_validation_of_answers_is_squads_by_question(tmp_path: Path) -> None:
    """Validation and `evaluate` agree on the same questions, over all of their windows."""
    tokenizer().save(tmp_path / "tok")
    train, valid = windows(tmp_path / "train.json", 8), windows(tmp_path / "valid.json", 5)
    settings = [
        f"data={train}", f"data.validation_path={valid}", f"tokenizer.path={tmp_path}/tok", "model.hidden_size=32", "model.num_layers=1",
        "model.num_heads=2", "model.max_positions=64", "model.causal=false", "model.embedding.type_vocab_size=2", "precision=fp32",
        "examples.max_length=32", "examples.max_question_length=8", "examples.doc_stride=8",
        "max_steps=60", "evaluation.every=20", "checkpoint.every=0",
        "evaluation.best_metric=exact_match", "batch.size=16", "optimizer.lr=1e-2",
    ]  # fmt: skip
    done = run(load("question_answering", settings), tmp_path / "run", lambda _: None)
    found = evaluate(tmp_path / "run", [str(valid)])
    assert found["items"] == 15
    for name in ("exact_match", "f1"):
        assert done.metrics[f"valid/{name}"] == pytest.approx(found[name], abs=1e-6) and found[name] > 0.1
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    best = max(row["exact_match"] for row in rows if row["split"] == "valid")
    assert done.metrics["valid/exact_match"] == best


def test_a_share_of_the_validation_windows_has_whole_questions(tmp_path: Path) -> None:
    whole = Records(
        QuestionsConfig(max_length=32, max_question_length=8, doc_stride=8),
        [str(windows(tmp_path / "a.json", 6))],
        tokenizer(),
    )
    half = SubsetSource(whole, np.flatnonzero(whole.record_ids >= 6))  # four of six passages, of three questions each
    assert len(whole) > 40 and len(np.unique(half.record_ids)) == 12
    config = encoder_config(600, 32, 1, num_heads=2, max_positions=64)
    recipe = replace(
        load("question_answering", []), model=config, evaluation=EvalConfig(every=1, max_examples=len(half) // 2)
    )
    chosen = Validator(recipe, half, 0.0, tokenizer(), Ranks()).examples
    record_ids = np.unique(chosen.record_ids)
    assert 4 <= len(record_ids) <= 8
    for record_id in record_ids:
        assert (chosen.record_ids == record_id).sum() == (whole.record_ids == record_id).sum()
    assert chosen.metadata(0)["question"] == question_of(whole, int(chosen.record_ids[0]))


def test_training_questions_without_an_answer_give_a_warning(tmp_path: Path) -> None:
    file = squad(
        tmp_path / "a.json",
        {"id": "q1", "question": "Who?", "answers": [{"text": "Anne", "answer_start": 24}]},
        {"id": "q2", "question": "Why?", "answers": []},
    )
    source = Records(QuestionsConfig(max_length=96, max_question_length=16), [str(file)], tokenizer())
    assert any("1 question has no answer" in r and "q2" in r for r in source.notes)


def test_likelihood_warns_of_repaired_text(writer: Callable[..., Path], tmp_path: Path) -> None:
    run_directory = writer({})
    (tmp_path / "a.txt").write_bytes(b"a caf\xe9 and a film, and a film\x00 and another\n")
    with logged(logging.WARNING) as notes:
        assert evaluate(run_directory, [str(tmp_path / "a.txt")], task="likelihood")["tokens"] > 0
    assert notes == [
        f"{tmp_path}/a.txt: 1 byte sequences were not UTF-8 and were read as U+FFFD",
        f"{tmp_path}/a.txt: 1 NUL characters were left out",
    ]
