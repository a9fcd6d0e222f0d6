"""What a run reports on its data and its exported step: classes, held-out examples, SQuAD metrics, GLUE."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from firth.data.records import Records
from firth.data.split import content_key
from firth.evaluate.evaluate import evaluate, glue_board
from firth.evaluate.heads import by_question
from firth.evaluate.predict import predict
from firth.runs.inference import evaluate_run, held_out_measures
from firth.runs.prepare import RunData, train_tokenizer
from firth.runs.recipe import Recipe, load
from firth.runs.run import RunResult, run
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

SHAPE = (
    "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.max_positions=96", "model.causal=false",
    "model.embedding.type_vocab_size=2", "tokenizer.vocab_size=300", "batch.size=16", "precision=fp32", "optimizer.lr=5e-3",
    "checkpoint.every=0", "max_steps=2",
)  # fmt: skip
WORDS = ("fine", "lovely", "warm", "dull", "cold", "grim")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "text.txt").write_text("\n\n".join(f"a {w} film, and a {v} film" for w in WORDS for v in WORDS))
    train_tokenizer(
        [str(folder / "text.txt")], folder / "tok", algorithm="wordpiece", vocab_size=300, log=lambda _: None
    )
    return folder / "tok"


def reviews(path: Path, labels: list[str]) -> Path:
    rows = [f"a {WORDS[i % 6]} film of {i},{label}" for i, label in enumerate(labels)]
    path.write_text("\n".join(["text,label", *rows]) + "\n")
    return path


def trained(name: str, out: Path, tokens: Path, *settings: str) -> tuple[RunResult, list[str]]:
    lines: list[str] = []
    recipe = load(name, [*SHAPE, f"tokenizer.path={tokens}", *settings])
    return run(recipe, out, lines.append), lines


def test_text_to_text_tokenizer_reads_its_own_fields(tmp_path: Path) -> None:
    rows = [{"prompt": f"is it {w}", "completion": f"it is {w} and {v}"} for w in WORDS for v in WORDS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.csv").write_text("en,fr\n" + "".join(f"a {w} film,une {v} chose\n" for w in WORDS for v in WORDS))
    shape = [one for one in SHAPE if "causal" not in one and "token_type_ids" not in one]
    for source, *forms in (
        ["a.jsonl"],
        ["b.csv", "examples.prompt_template=to French: {en}", "examples.completion_template={fr}"],
    ):
        lines: list[str] = []
        recipe = load(
            "text_to_text",
            [
                *shape,
                "model.encoder.num_layers=1",
                "tokenizer.vocab_size=400",
                f"data={tmp_path / source}",
                "examples.max_length=32",
                *forms,
            ],
        )
        done = run(recipe, tmp_path / source.replace(".", "-"), lines.append)
        assert done.steps == 2
        assert any("ids from the texts of the records: " in line for line in lines)
        assert "French" in (done.directory / "tokenizer" / "tokenizer.json").read_text() or not forms


def test_only_training_examples_count_for_classes(tmp_path: Path, tokens: Path) -> None:
    """A class whose only record is held out is not trained and counts nothing."""
    plain = ["good" if i % 3 else "bad" for i in range(60)]
    texts = [f"a {WORDS[i % 6]} film of {i}" for i in range(60)]
    held = next(i for i in range(60) if content_key(texts[i]) < 0.2 * 2**64)
    file = reviews(tmp_path / "a.csv", [*plain[:held], "odd", *plain[held + 1 :]])
    done, lines = trained(
        "classification",
        tmp_path / "run",
        tokens,
        f"data={file}",
        "data.validation_fraction=0.2",
        "objective.class_weights=balanced",
    )
    [line] = [line for line in lines if "classes: " in line]
    assert "odd 0 (and 1 held out)" in line
    assert "classification: the class 'odd' has no training examples and 1 held-out ones, so it is not learned" in lines
    weights = load(str(done.directory)).objective.class_weights  # type: ignore[attr-defined]
    bad, good = (int(line.split(f"{name} ")[1].split(" ")[0].strip(",")) for name in ("bad", "good"))
    assert weights == pytest.approx([(bad + good) / 3 / bad, (bad + good) / 3 / good, 0.0])


def test_single_class_is_rejected(tmp_path: Path, tokens: Path) -> None:
    file = reviews(tmp_path / "a.csv", ["good"] * 30)
    with pytest.raises(UserError, match="all training examples are of one class, 'good'"):
        trained("classification", tmp_path / "run", tokens, f"data={file}")
    (tmp_path / "a.conll").write_text("a O\nfilm O\n\n" * 30)
    with pytest.raises(UserError, match="all training examples are of one class, 'O'"):
        trained("token_classification", tmp_path / "run", tokens, f"data={tmp_path / 'a.conll'}")


def test_classes_of_a_mixture(tmp_path: Path, tokens: Path) -> None:
    """Ham in one file and spam in the other: each path has one class, and both together have two."""
    files = [reviews(tmp_path / "a.csv", ["ham"] * 40), reviews(tmp_path / "b.csv", ["spam"] * 30)]
    _, lines = trained(
        "classification", tmp_path / "run", tokens, f"data.path=[{files[0]}, {files[1]}]", "data.weights=[1, 1]",
        "objective.class_weights=balanced",
    )  # fmt: skip
    [line] = [line for line in lines if "classes: " in line]
    counts = [int(line.split(f"{name} ")[1].split(" ")[0].strip(",")) for name in ("ham", "spam")]
    assert 30 < counts[0] <= 40 and 20 < counts[1] <= 30
    weights = load(str(tmp_path / "run")).objective.class_weights  # type: ignore[attr-defined]
    assert weights == pytest.approx([sum(counts) / 2 / n for n in counts])


def test_tag_only_in_validation_files_is_no_class(tmp_path: Path, tokens: Path) -> None:
    (tmp_path / "a.conll").write_text("a O\nfine B-GOOD\n\n" * 30)
    (tmp_path / "b.conll").write_text("a O\ngrim B-BAD\n\ngrim B-BAD\n\n")
    with pytest.raises(UserError, match=r"b\.conll:1: the tag B-BAD is none of .*1 more tag has the same problem"):
        trained(
            "token_classification",
            tmp_path / "run",
            tokens,
            f"data={tmp_path / 'a.conll'}",
            f"data.validation_path={tmp_path / 'b.conll'}",
        )


@pytest.mark.parametrize(
    "settings", [("evaluation.best_metric=accuracy",), ("evaluation.every=1", "evaluation.patience=2")]
)
def test_best_metric_without_validation_is_rejected(tmp_path: Path, tokens: Path, settings: tuple[str, ...]) -> None:
    file = reviews(tmp_path / "a.csv", ["good", "bad"] * 4)
    why = r"needs held-out examples, and nothing is held out \(nothing is held out of 8 examples, fewer than 20"
    with pytest.raises(UserError, match=why):
        trained("classification", tmp_path / "run", tokens, f"data={file}", *settings)
    with pytest.raises(UserError, match=r"nothing is held out: name data\.validation_path=FILES"):
        trained("classification", tmp_path / "run", tokens, f"data={file}", "data.validation_fraction=0", *settings)


def test_missing_validation_is_reported_once(tmp_path: Path, tokens: Path) -> None:
    file = reviews(tmp_path / "a.csv", ["good", "bad"] * 4)
    done, lines = trained("classification", tmp_path / "run", tokens, f"data={file}")
    assert sum("nothing is held out of 8 examples, fewer than 20" in line for line in lines) == 1
    assert "nothing is held out of 8 examples" in (done.directory / "report.html").read_text()
    _, lines = trained("classification", tmp_path / "quiet", tokens, f"data={file}", "data.validation_fraction=0")
    assert not any("nothing is held out" in line for line in lines)
    file = reviews(tmp_path / "b.csv", ["good", "bad"] * 11)
    _, lines = trained("classification", tmp_path / "few", tokens, f"data={file}", "data.validation_fraction=0.0001")
    assert any(
        "nothing is held out of 22 examples, of which data.validation_fraction=0.0001 comes to none" in line
        for line in lines
    )


def test_missing_report_is_written_by_the_same_command(tmp_path: Path, tokens: Path) -> None:
    file = reviews(tmp_path / "a.csv", ["good", "bad"] * 30)
    done, _ = trained("classification", tmp_path / "run", tokens, f"data={file}")
    report = done.directory / "report.html"
    report.unlink()  # killed behind done.json
    trained("classification", tmp_path / "run", tokens, f"data={file}")
    assert "accuracy" in report.read_text("utf-8")


def test_unknown_metric_is_rejected_before_training(tmp_path: Path, tokens: Path) -> None:
    file = reviews(tmp_path / "a.csv", ["good", "bad"] * 30)
    with pytest.raises(
        UserError, match=r"evaluation\.best_metric=f2 is not among the held-out metrics: choose one of loss, .*f1"
    ):
        trained(
            "classification",
            tmp_path / "run",
            tokens,
            f"data={file}",
            "data.validation_fraction=0.2",
            "evaluation.best_metric=f2",
        )
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_check_of_best_metric_changes_nothing(tmp_path: Path, tokens: Path) -> None:
    file = reviews(tmp_path / "a.csv", ["good", "bad"] * 30)
    settings = [f"data={file}", "data.validation_fraction=0.2", "model.dropout=0.2"]
    found = [
        trained("classification", tmp_path / str(i), tokens, *settings, *more)[0].metrics["loss"]
        for i, more in enumerate(((), ("evaluation.best_metric=accuracy",)))
    ]
    rows = [json.loads((tmp_path / str(i) / "metrics.jsonl").read_text().splitlines()[0])["loss"] for i in range(2)]
    assert rows[0] == rows[1] and len(found) == 2


def test_report_and_evaluate_show_the_exported_step(tmp_path: Path, tokens: Path) -> None:
    file = reviews(tmp_path / "a.csv", ["good", "bad"] * 30)
    done, _ = trained(
        "classification",
        tmp_path / "run",
        tokens,
        f"data={file}",
        "data.validation_fraction=0.3",
        "evaluation.every=1",
        "evaluation.best_metric=loss",
        "evaluation.patience=2",
        "max_steps=9",
        "optimizer.lr=1.0",
        "schedule.kind=constant",
        "schedule.warmup_ratio=0",
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held = {row["step"]: row["loss"] for row in rows if row["split"] == "valid"}
    best = min(held, key=lambda step: held[step])
    assert done.exported_step == best < done.steps
    found = held_out_measures(done.directory)
    assert (found["exported_step"], found["last_step"], found["loss"]) == (best, done.steps, held[best])
    assert f"exported_step            {best}" in evaluate_run(done.directory, [], task=None, limit=None, as_json=False)
    page = (done.directory / "report.html").read_text()
    assert f"The exported model is that of step {best}, the best of {len(held)} evaluations" in page
    assert f"held-out text, exported step {best}" in page and "did not fall" not in page
    assert f"the model of step {best}, the best evaluation" in (done.model / "README.md").read_text()
    again, _ = trained(
        "classification", tmp_path / "last", tokens, f"data={file}", "data.validation_fraction=0.3", "max_steps=2"
    )
    assert again.exported_step == again.steps == held_out_measures(again.directory)["step"]


def squad(n: int) -> str:
    paragraphs = []
    for i in range(n):
        word = WORDS[i % 6]
        context = f"a film, and a film. a {word} film and a film, and a film {i}"
        question = {
            "id": f"{i}",
            "question": "a film",
            "answers": [{"text": word, "answer_start": context.index(word)}],
        }
        if i % 4 == 0:
            question = {"id": f"{i}", "question": "a film", "answers": [], "is_impossible": True}
        paragraphs.append({"context": context, "qas": [question]})
    return json.dumps({"data": [{"paragraphs": paragraphs}]})


def test_question_metrics_are_those_of_squad(tmp_path: Path, tokens: Path) -> None:
    """Answers are compared as text over all windows of a question, as `firth evaluate` does."""
    (tmp_path / "a.json").write_text(squad(40))
    (tmp_path / "b.json").write_text(squad(16))
    done, _ = trained(
        "question_answering",
        tmp_path / "run",
        tokens,
        f"data={tmp_path / 'a.json'}",
        f"data.validation_path={tmp_path / 'b.json'}",
        "examples.max_length=20",
        "examples.max_question_length=8",
        "examples.doc_stride=4",
        "evaluation.best_metric=exact_match",
        "max_steps=12",
        "evaluation.every=6",
        "schedule.warmup_ratio=0",
    )
    found = evaluate(done.directory, [str(tmp_path / "b.json")])
    for name in ("exact_match", "f1"):
        assert done.metrics[f"valid/{name}"] == pytest.approx(found[name], abs=1e-9)
    assert "Exact match" in (done.directory / "report.html").read_text()


def test_whole_questions_are_evaluated(tmp_path: Path, tokens: Path) -> None:
    from firth.data.question_answering import QuestionsConfig
    from firth.runs.examples import spread

    (tmp_path / "a.json").write_text(squad(20))
    source = Records(
        QuestionsConfig(max_length=18, max_question_length=8, doc_stride=4),
        [str(tmp_path / "a.json")],
        Tokenizer.load(tokens),
    )
    some = spread(source, len(source) // 3)
    assert len(some) < len(source) // 2
    for owner in np.unique(some.record_ids):
        assert (some.record_ids == owner).sum() == (source.record_ids == owner).sum() > 1


def test_no_answer_has_the_probability_of_the_null_span(tmp_path: Path, tokens: Path) -> None:
    from firth.data.question_answering import QuestionsConfig

    (tmp_path / "a.json").write_text(squad(1))
    source = Records(
        QuestionsConfig(max_length=96, max_question_length=8), [str(tmp_path / "a.json")], Tokenizer.load(tokens)
    )
    n = len(source[0]["tokens"])
    scores = np.zeros((n, 2))
    scores[0] = 3.0
    [answer] = by_question(source, iter([scores]), has_unanswerable=True)
    share = np.exp(3.0) / (np.exp(3.0) + n - 1)
    assert (answer["answer"], answer["start"]) == ("", -1)
    assert answer["probability"] == pytest.approx(share**2)


def test_glue_from_its_runs(tmp_path: Path, tokens: Path) -> None:
    head = "index\tsentence1\tsentence2\tgold_label\n"
    labels = ("neutral", "entailment", "contradiction", "-")
    rows = "".join(f"{i}\ta {WORDS[i % 6]} film\ta film\t{labels[i % 4]}\n" for i in range(40))
    for name in ("train", "dev_matched", "dev_mismatched"):
        (tmp_path / f"{name}.tsv").write_text(head + rows)
    (tmp_path / "cola.tsv").write_text("".join(f"gj\t{i % 2}\t\ta {WORDS[i % 6]} film\n" for i in range(40)))
    dev = [str(tmp_path / f"dev_{name}.tsv") for name in ("matched", "mismatched")]
    mnli, lines = trained(
        "glue:mnli",
        tmp_path / "mnli",
        tokens,
        f"data={tmp_path / 'train.tsv'}",
        f"data.validation_path=[{dev[0]}, {dev[1]}]",
    )
    assert any(
        f"10 records have no label and were left out; the first is {tmp_path / 'train.tsv'}:5" in one for one in lines
    )
    cola, _ = trained(
        "glue:cola",
        tmp_path / "cola",
        tokens,
        f"data={tmp_path / 'cola.tsv'}",
        f"data.validation_path={tmp_path / 'cola.tsv'}",
    )
    (tmp_path / "test.tsv").write_text("index\tsentence\n0\ta fine film\n1\ta dull film\n")
    rows = list(predict(cola.directory, str(tmp_path / "test.tsv"), io.StringIO()))
    assert [row["label"] in ("0", "1") for row in rows] == [True, True]
    found = evaluate(mnli.directory, dev)
    assert found["accuracy"] == found["accuracy_mismatched"] == evaluate(mnli.directory, dev[:1])["accuracy"]
    assert found["items"] == found["items_mismatched"] == 30
    only = evaluate(mnli.directory, dev[1:])
    assert only["accuracy_mismatched"] == found["accuracy"] and "accuracy" not in only
    score = evaluate(mnli.directory, [str(cola.directory)], task="glue")
    matthews = evaluate(cola.directory, [str(tmp_path / "cola.tsv")])["matthews"]
    assert score["score"] == pytest.approx(50 * (found["accuracy"] + matthews))
    assert score["tasks"] == ["mnli", "cola"] and len(score["missing_tasks"]) == 7
    with pytest.raises(UserError, match="another run has the task cola already"):
        glue_board([cola.directory, cola.directory], evaluate)
    with pytest.raises(UserError, match="this is not a run of a GLUE recipe"):
        glue_board([tmp_path], evaluate)


def test_invalid_class_weights_are_rejected() -> None:
    with pytest.raises(UserError, match=r"objective\.class_weights='balancd' should be a list or 'balanced'"):
        load("classification", ["objective.class_weights=balancd"])
    assert isinstance(load("classification", ["objective.class_weights=balanced"]), Recipe)


def test_repairs_and_skipped_tables_are_reported(tmp_path: Path, tokens: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"a fine film, and a dull film\n\n" * 20 + b"caf\xe9 au lait")
    reviews(folder / "b.csv", ["good", "bad"])
    lines: list[str] = []
    recipe = load("gpt", [f"data={folder}"])
    RunData(recipe.data, Tokenizer.load(tokens), tmp_path, log=lines.append).stores()
    assert f"pieces that are not UTF-8, read as U+FFFD: 1; the first is {folder / 'a.txt'}" in lines
    [line] = [line for line in lines if "tables skipped" in line]
    assert "are named: 1;" in line and line.endswith(f"the first is {folder / 'b.csv'}")
