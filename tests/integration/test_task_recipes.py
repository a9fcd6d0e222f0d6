"""Tasks from a file to a run, and the results of the run on other files: every recipe once, small and without a base model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from firth.cli import app
from firth.evaluate.evaluate import evaluate
from firth.evaluate.predict import predict
from firth.model.config import encoder_config
from firth.pretrained.load_save import load_model
from firth.runs.recipe import Recipe, load
from firth.runs.run import RunResult, run
from firth.types import UserError

SHAPE = (
    "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.max_positions=96", "model.causal=false",
    "tokenizer.vocab_size=300", "batch.size=16", "precision=fp32", "optimizer.lr=5e-3", "model.embedding.type_vocab_size=2",
)  # fmt: skip
GOOD, BAD = ("fine", "lovely", "warm"), ("dull", "cold", "grim")
Make = Callable[..., tuple[RunResult, Path]]


def reviews(n: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        words = GOOD if i % 2 else BAD
        out.append(
            (f"a {words[rng.integers(3)]} film, and {words[rng.integers(3)]} by {i}", "good" if i % 2 else "bad")
        )
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tasks")
    with (place / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("review", "stars"), *reviews(120)])
    with (place / "text.txt").open("w") as file:
        file.write("\n\n".join(text for text, _ in reviews(200, 1)))
    return place


@pytest.fixture(scope="module")
def make(folder: Path) -> Make:
    """Return the run of a recipe with settings, trained from scratch with a tokenizer of the folder's text."""
    made: dict[str, tuple[RunResult, Path]] = {}

    def one(name: str, *settings: str, steps: int = 40, key: str = "") -> tuple[RunResult, Path]:
        key = key or name
        if key not in made:
            recipe: Recipe = load(
                name,
                [*SHAPE, f"max_steps={steps}", "checkpoint.every=0", *settings, f"tokenizer.path={tokens(folder)}"],
            )
            place = folder / key
            made[key] = run(recipe, place, log=lambda _: None), place
        return made[key]

    return one


def tokens(folder: Path) -> Path:
    from firth.runs.prepare import train_tokenizer

    if not (folder / "tok").exists():
        train_tokenizer(
            [str(folder / "text.txt")], folder / "tok", algorithm="wordpiece", vocab_size=300, log=lambda _: None
        )
    return folder / "tok"


def classified(make: Make, folder: Path) -> tuple[RunResult, Path]:
    return make(
        "classification",
        f"data={folder}/reviews.csv",
        "examples.text_field=review",
        "examples.label_field=stars",
        "data.validation_fraction=0.2",
    )


def test_classification_of_a_csv_file(make: Make, folder: Path) -> None:
    done, place = classified(make, folder)
    assert done.metrics["valid/accuracy"] == done.metrics["valid/f1"] == 1.0
    assert {"valid/macro_f1", "valid/matthews"} <= done.metrics.keys()
    report = json.loads((place / "held_out.json").read_text())
    assert report["classes"] == ["bad", "good"]
    assert sum(map(sum, report["confusion"])) == sum(row["examples"] for row in report["per_class"])
    page = (place / "report.html").read_text()
    assert 'class="matrix"' in page and "Metrics per class" in page and "firth predict" in page


def test_predict_from_files_and_standard_input(make: Make, folder: Path) -> None:
    _, place = classified(make, folder)
    file = folder / "new.csv"
    file.write_text("id,review\n1,a lovely film\n2,a grim film\n")
    rows = list(predict(place, str(file), io.BytesIO()))
    assert [row["label"] for row in rows] == ["good", "bad"]
    assert all(row["probability"] == max(row["probabilities"].values()) > 0.5 for row in rows)
    assert sum(rows[0]["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    lines = list(predict(place, "-", io.BytesIO(b"a lovely film\n\na grim film\n")))
    records = list(predict(place, "-", io.BytesIO(b'{"review": "a lovely film"}\n{"review": "a grim film"}\n')))
    table = list(predict(place, "-", io.BytesIO(file.read_bytes())))
    assert table == rows and [row.pop("id") for row in rows] == ["1", "2"]
    assert lines == [rows[0], {"row": 2}, rows[1] | {"row": 3}]
    assert records == rows
    found = CliRunner().invoke(app, ["predict", str(place), "-"], input="a lovely film\n")
    assert json.loads(found.output) == rows[0]
    out = folder / "out.csv"
    CliRunner().invoke(app, ["predict", str(place), str(file), "--out", str(out)])
    table = list(csv.DictReader(out.open()))
    assert [row["label"] for row in table] == ["good", "bad"]
    assert float(table[0]["probability_good"]) == rows[0]["probability"]
    (folder / "bad.csv").write_text("text\nx\n")
    with pytest.raises(UserError, match=r"bad\.csv:2: there is no field 'review'"):
        list(predict(place, str(folder / "bad.csv"), io.BytesIO()))


def test_evaluate_matches_validation_of_training(make: Make, folder: Path) -> None:
    _, place = classified(make, folder)
    found = evaluate(place, [str(folder / "reviews.csv")])
    assert (found["task"], found["accuracy"], found["items"]) == ("classification", 1.0, 120)


def test_row_order_does_not_change_predictions(make: Make, folder: Path) -> None:
    """Classes are numbered by name, so a file that starts with another class is scored alike."""
    _, place = classified(make, folder)
    head, *rows = (folder / "reviews.csv").read_text().splitlines()
    (folder / "reversed.csv").write_text("\n".join([head, *reversed(rows)]) + "\n")
    files = [str(folder / "reviews.csv"), str(folder / "reversed.csv")]
    assert [evaluate(place, [path])["accuracy"] for path in files] == [1.0, 1.0]
    one, other = ([row["label"] for row in predict(place, path, io.BytesIO())] for path in files)
    assert one == other[::-1]


def test_empty_cell_has_a_prediction(make: Make, folder: Path) -> None:
    _, place = classified(make, folder)
    texts = [text for text, _ in reviews(12)]
    texts[3] = ""
    (folder / "gap.csv").write_text("review,stars\n" + "".join(f'"{text}",good\n' for text in texts))
    rows = list(predict(place, str(folder / "gap.csv"), io.BytesIO()))
    assert [row["row"] for row in rows] == list(range(1, 13))
    assert rows[3] == {"row": 4} and "nan" not in json.dumps(rows).lower()


def test_missing_column_is_named_before_training(folder: Path, tmp_path: Path) -> None:
    path = folder / "reviews.csv"
    settings = ["model={hidden_size: 32, num_layers: 1, num_heads: 2, max_positions: 96, causal: false}", "max_steps=1"]
    recipe = load(
        "classification", [*settings, f"data={path}", "examples.text_field=reviews", "examples.label_field=stars"]
    )
    with pytest.raises(UserError, match=r"reviews\.csv:2: there is no field 'reviews'; did you mean 'review'\?"):
        run(recipe, tmp_path / "run", lambda _: None)


def test_one_document_has_no_pairs(folder: Path, tmp_path: Path) -> None:
    """BERT's pairs need two documents; the message names the setting that makes them."""
    (tmp_path / "one.txt").write_text(" ".join(text for text, _ in reviews(40)))
    settings = [*SHAPE, "max_steps=1", f"tokenizer.path={tokens(folder)}", f"data={tmp_path / 'one.txt'}"]
    with pytest.raises(UserError, match=r"two documents or more.*set data\.split_by=blank"):
        run(load("bert", settings), tmp_path / "run", lambda _: None)


def test_tokenizer_is_trained_on_the_fields_that_are_read(folder: Path, tmp_path: Path) -> None:
    shape = "model={hidden_size: 32, num_layers: 1, num_heads: 2, max_positions: 96, causal: false}"
    settings = [shape, f"data={folder}/reviews.csv", "tokenizer.vocab_size=400", "max_steps=1", "checkpoint.every=0"]
    done = run(
        load("classification", [*settings, "examples.text_field=review", "examples.label_field=stars"]),
        tmp_path / "run",
        lambda _: None,
    )
    assert done.steps == 1
    [vocabulary] = (tmp_path / "run" / "tokenizer").glob("tokenizer.json")
    assert "fine" in vocabulary.read_text()


def test_long_text_is_truncated_and_reported(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(
        "text,label\n"
        + "".join(f"a fine film {i},good\na dull film {i},bad\n" for i in range(10))
        + "film " * 200
        + ",bad\n"
    )
    settings = [
        *SHAPE,
        f"data={tmp_path}/long.csv",
        f"tokenizer.path={tokens(folder)}",
        "max_steps=2",
        "data.validation_fraction=0",
    ]
    run(load("classification", [*settings, "examples.max_length=500"]), tmp_path / "run", lambda _: None)
    done = json.loads((tmp_path / "run" / "done.json").read_text())
    assert done["counts"]["cut"] == 1
    assert done["remarks"] == [
        f"1 text was longer than 96 tokens and lost its end; the first is {tmp_path}/long.csv:22"
    ]
    assert "long.csv:22" in (tmp_path / "run" / "report.html").read_text()
    with pytest.raises(UserError, match=r"set evaluation\.every"):
        load("classification", ["evaluation.patience=2"])


def test_regression_predictions_have_the_units_of_the_data(make: Make, folder: Path) -> None:
    rows = [{"text": text, "label": 900.0 if label == "good" else 700.0} for text, label in reviews(120)]
    (folder / "prices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done, place = make("regression", f"data={folder}/prices.jsonl", "data.validation_fraction=0.2")
    assert done.metrics["valid/pearson"] > 0.95
    scores = [row["score"] for row in predict(place, str(folder / "prices.jsonl"), io.BytesIO())]
    assert np.sqrt(np.mean((np.array(scores) - [row["label"] for row in rows]) ** 2)) < 30
    found = evaluate(place, [str(folder / "prices.jsonl")])
    assert found["task"] == "regression" and found["rmse"] < 30 and found["spearman"] > 0.8


def test_multiple_choice(make: Make, folder: Path) -> None:
    rows = []
    for i in range(120):
        good = GOOD[i % 3]
        options = [BAD[i % 3], good, BAD[(i + 1) % 3]][: 2 + i % 2]
        rows.append({"text": "the film was", "options": options, "label": options.index(good)})
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done, place = make("multiple_choice", f"data={folder}/choices.jsonl", "data.validation_fraction=0.2")
    assert load_model(done.model).heads["choice"].weight.shape == (1, 32)
    predictions = list(predict(place, str(folder / "choices.jsonl"), io.BytesIO()))
    assert [row["choice"] for row in predictions[:4]] == [1, 1, 1, 1]
    assert [len(row["probabilities"]) for row in predictions[:2]] == [2, 3]
    assert evaluate(place, [str(folder / "choices.jsonl")])["accuracy"] > 0.95


def test_token_classification(make: Make, folder: Path) -> None:
    sentences = []
    for text, _ in reviews(120):
        words = text.replace(",", " ,").split()
        sentences.append("\n".join(f"{w} {'I-GOOD' if w in GOOD else 'I-BAD' if w in BAD else 'O'}" for w in words))
    (folder / "tags.conll").write_text("\n\n".join(sentences) + "\n")
    done, place = make("token_classification", f"data={folder}/tags.conll", "data.validation_fraction=0.2")
    assert done.metrics["valid/f1"] > 0.95
    found = evaluate(place, [str(folder / "tags.conll")])
    assert found["task"] == "token_classification" and found["f1"] > 0.95 and found["items"] == 120
    [row] = predict(place, "-", io.BytesIO(b"a grim film\n"))
    assert (row["tokens"], row["tags"]) == (["a", "grim", "film"], ["O", "B-BAD", "O"])
    assert json.loads((place / "held_out.json").read_text())["per_class"][0]["class"] == "BAD"


def test_question_answering(make: Make, folder: Path) -> None:
    paragraphs = []
    for i in range(160):
        word = (*GOOD, *BAD)[i % 6]
        context = f"a film, and a film. a {word} film and a film, and {i}"
        answers = [{"text": word, "answer_start": context.index(word)}]
        questions = [{"id": f"{i}", "question": "a film", "answers": answers}]
        if i % 4 == 0:
            context = f"a film, and a film and a film, and {i}"
            questions = [{"id": f"{i}", "question": "a film", "answers": [], "is_impossible": True}]
        paragraphs.append({"context": context, "qas": questions})
    (folder / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    done, place = make(
        "question_answering",
        f"data={folder}/squad.json",
        "examples.max_length=32",
        "examples.max_question_length=8",
        "examples.doc_stride=8",
        "data.validation_fraction=0.2",
        "batch.pack_to_length=64",
        steps=80,
    )
    assert done.metrics["valid/accuracy"] > 0.9
    found = evaluate(place, [str(folder / "squad.json")])
    assert (
        found["task"] == "question_answering"
        and found["exact_match"] > 0.9
        and found["f1"] > 0.9
        and found["items"] == 160
    )
    answers = list(predict(place, str(folder / "squad.json"), io.BytesIO()))
    assert (answers[0]["answer"], answers[0]["start"]) == ("", -1)
    assert answers[1]["answer"] == GOOD[1] and answers[1]["id"] == "1"


def test_best_checkpoint_is_exported_and_patience_stops(folder: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model: the last model is worse than the best one."""
    settings = [
        *SHAPE, f"data={folder}/reviews.csv", "examples.text_field=review", "examples.label_field=stars", "data.validation_fraction=0.2",
        f"tokenizer.path={tokens(folder)}", "evaluation.every=5", "checkpoint.every=0", "max_steps=400", "optimizer.lr=2e-2",
        "schedule.kind=constant",
    ]  # fmt: skip
    done = run(
        load("classification", [*settings, "evaluation.best_metric=accuracy", "evaluation.patience=3"]),
        tmp_path / "run",
        lambda _: None,
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held = [(row["accuracy"], row["step"]) for row in rows if row["split"] == "valid"]
    assert done.steps < 400 and done.steps == held[-1][1]
    best = max(accuracy for accuracy, _ in held)
    assert done.metrics["valid/accuracy"] == best
    assert [accuracy for accuracy, _ in held].index(best) == len(held) - 4
    again = run(
        load("classification", [*settings, "evaluation.best_metric=accuracy", "evaluation.patience=3"]),
        tmp_path / "run",
        lambda _: None,
    )
    assert again == done
    with pytest.raises(
        UserError, match=r"evaluation\.best_metric=recall is not among the held-out metrics: choose one of loss"
    ):
        run(load("classification", [*settings, "evaluation.best_metric=recall"]), tmp_path / "no", lambda _: None)


def test_templates_make_text_to_text_of_a_table(folder: Path, tmp_path: Path) -> None:
    settings = [
        f"data={folder}/reviews.csv", "examples.prompt_template=is it good? {review}", "examples.completion_template={stars}",
        f"tokenizer.path={tokens(folder)}", *SHAPE[:3], "model.encoder.num_layers=1", "model.max_positions=96",
        "max_steps=2", "checkpoint.every=0", "precision=fp32", "examples.max_length=64",
    ]  # fmt: skip
    done = run(load("text_to_text", settings), tmp_path / "run", lambda _: None)
    assert done.steps == 2
    result = CliRunner().invoke(app, ["predict", str(tmp_path / "run"), "-"], input="a warm film\n\na grim film\n")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row["row"] for row in rows] == [1, 2, 3] and "answer" in rows[0] and rows[1] == {"row": 2}
    found = evaluate(tmp_path / "run", [str(folder / "reviews.csv")])
    assert (found["task"], found["items"]) == ("generation", 120)
    with pytest.raises(
        UserError, match=r"reviews\.csv:2: the template .* does not fit this record: \{rating\} is not a field name"
    ):
        run(load("text_to_text", [*settings, "examples.completion_template={rating}"]), tmp_path / "no", lambda _: None)


@pytest.mark.parametrize("shape", ["model.causal=true", "model.encoder.num_layers=1"])
def test_decoders_and_encoder_decoders_classify_pairs(folder: Path, tmp_path: Path, shape: str) -> None:
    rows = [{"text": f"a film {i}", "other": t, "label": label} for i, (t, label) in enumerate(reviews(120))]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = [
        *SHAPE[:4], *SHAPE[5:9], shape, f"tokenizer.path={tokens(folder)}", "checkpoint.every=0",
        f"data={tmp_path}/pairs.jsonl", "examples.text_pair_field=other", "max_steps=40", "data.validation_fraction=0.2",
    ]  # fmt: skip
    done = run(load("classification", settings), tmp_path / "run", lambda _: None)
    assert done.metrics["valid/accuracy"] > 0.9
    assert evaluate(tmp_path / "run", [str(tmp_path / "pairs.jsonl")])["accuracy"] > 0.9


def test_glue_files(folder: Path, tmp_path: Path) -> None:
    heads = {
        "sst2": "sentence\tlabel", "mrpc": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "qqp": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "qnli": "index\tquestion\tsentence\tlabel",
        "mnli": "index\tsentence1\tsentence2\tlabel1\tgold_label", "rte": "index\tsentence1\tsentence2\tlabel",
        "wnli": "index\tsentence1\tsentence2\tlabel", "stsb": "index\tgenre\tsentence1\tsentence2\tscore", "cola": "",
    }  # fmt: skip
    cells = {
        "label": "1", "Quality": "0", "is_duplicate": "1", "gold_label": "neutral", "score": "3.8", "sentence": 'a "film',
    }  # fmt: skip
    from firth.runs.prepare import RunData
    from firth.tokenizer.tokenizer import Tokenizer

    for task, head in heads.items():
        path = tmp_path / f"{task}.tsv"
        row = "\t".join(cells.get(name, "a film") for name in head.split("\t")) if head else 'gj04\t1\t\ta "film'
        path.write_text((head + "\n" if head else "") + (row + "\n") * 3)
        recipe = load(f"glue:{task}", [f"data={path}"])
        data = RunData(recipe.data, Tokenizer.load(tokens(folder)), tmp_path)
        settled = recipe.objective.configure(partial(recipe.examples.stats, data), encoder_config(300, 32, 1))
        cut = recipe.examples.build(data, settled)
        assert len(cut.train) == 3, task
        assert settled.constraints.class_names == {"stsb": (), "mrpc": ("0",), "mnli": ("neutral",)}.get(task, ("1",))
        assert ("token_type_ids" in cut.train[0]) == (task not in ("sst2", "cola"))


def test_few_labels_with_a_teacher(make: Make, folder: Path, tmp_path: Path) -> None:
    """The commands of the docs: every label is kept, the unlabeled texts are others, and nothing is simulated."""
    _, teacher = classified(make, folder)
    others = folder / "more.csv"
    others.write_text("review\n" + "".join(f'"{text}"\n' for text, _ in reviews(60, 2)))
    settings = [*SHAPE, "max_steps=2", "batch.size=8", f"tokenizer.path={tokens(folder)}"]
    settings += [
        f"data={folder}/reviews.csv",
        "data.validation_fraction=0",
        "examples.base.text_field=review",
        "examples.base.label_field=stars",
    ]
    heard: list[str] = []
    done = run(
        load("semi_supervised", [*settings, f"examples.teacher={teacher}", f"examples.unlabeled_path=[{others}]"]),
        tmp_path / "run", heard.append,
    )  # fmt: skip
    counts = json.loads((done.directory / "done.json").read_text())["counts"]
    assert (counts["examples"], counts["unlabeled"]) == (120, 60)
    with pytest.raises(UserError, match=r"set one of examples\.unlabeled_path=.* and examples\.num_labeled="):
        run(load("semi_supervised", [*settings, f"examples.teacher={teacher}"]), tmp_path / "none", lambda _: None)
    with pytest.raises(UserError, match=r"lacks `examples\.teacher`: the run of `firth train classification`"):
        run(
            load("semi_supervised", [*settings, f"examples.unlabeled_path=[{others}]"]),
            tmp_path / "alone",
            lambda _: None,
        )
    trial = ["examples=partially_labeled", "examples.num_labeled=40", "objective=consistency"]
    run(load("semi_supervised", [*trial, *settings]), tmp_path / "trial", heard.append)
    assert "a trial: 40 of 120 records keep their label (examples.num_labeled=40)" in heard


def test_annotators_are_simulated_only_on_request(folder: Path, tmp_path: Path) -> None:
    settings = [*SHAPE, "max_steps=2", "batch.size=8", f"tokenizer.path={tokens(folder)}"]
    clean = [f"data={folder}/reviews.csv", "data.validation_fraction=0"]
    with pytest.raises(
        UserError,
        match=r"reviews\.csv:2: .*recipe `classification` for records with one label, or set examples=simulated_annotators",
    ):
        run(
            load("weak_supervision", [*settings, *clean, "examples.text_field=review", "examples.labels_field=stars"]),
            tmp_path / "a",
            lambda _: None,
        )
    heard: list[str] = []
    fields = ["examples=simulated_annotators", "examples.base.text_field=review", "examples.base.label_field=stars"]
    run(load("weak_supervision", [*settings, *clean, *fields]), tmp_path / "b", heard.append)
    assert any(
        line.startswith("a simulation: the labels of 120 records are replaced by the votes of 5") for line in heard
    )
    voted = tmp_path / "voted.jsonl"
    rows = [{"text": text, "labels": [label, label, "bad"]} for text, label in reviews(40)]
    voted.write_text("".join(json.dumps(row) + "\n" for row in rows))
    heard.clear()
    run(load("weak_supervision", [*settings, f"data={voted}"]), tmp_path / "c", heard.append)
    assert not any("simulation" in line for line in heard)
    listed = CliRunner().invoke(app, ["list"]).output
    assert (
        "records {text, labels: [of several annotators]}" in listed and "records {text, label}; examples.unl" in listed
    )
