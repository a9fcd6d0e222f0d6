"""Comparisons at a tiny size: equal FLOPs, one tokenizer, held-out test records, resumption, errors, consistent outputs."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from firth import cli
from firth.compare import compare as compare_module
from firth.compare.compare import ComparisonConfig, compare
from firth.compare.probe_dataset import draw_probe, questions
from firth.compare.report import METRICS, Interval, Score, differences, gains, markdown, paired, result_row
from firth.data.examples import DataConfig
from firth.data.labeled import LabeledConfig
from firth.data.split import content_key
from firth.data.token_store import TokenStore
from firth.evaluate.evaluate import evaluate
from firth.io.integrity import read_record
from firth.runs.prepare import documents_of
from firth.runs.recipe import Recipe, load
from firth.runs.run import RunResult, run
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.logging import OnMetrics
from firth.training.schedule import Budget
from firth.types import LogLine, UserError

FLOPS = 5e7
SMALL = (
    "model.hidden_size=16", "model.num_heads=1", "model.head_dim=16", "model.intermediate_size=32",
    "model.num_layers=1", "examples.max_length=24", "batch.size=2",
    "batch.pack_to_length=0", "tokenizer.vocab_size=400", "precision=fp32", "data.validation_fraction=0.2",
    "probe.precision=fp32", "probe.budget.max_steps=3", "probe.batch.size=4",
)  # fmt: skip
WORDS = ["king", "queen", "war", "fool", "lord", "sea", "dead", "speak", "laugh", "again", "every", "while"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences of two classes that differ in one word."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("records") / "labeled.jsonl"
    rows = [
        {"text": " ".join([*rng.choice(WORDS, 12), ("gladly", "sadly")[i % 2], *rng.choice(WORDS, 4)]), "label": "+-"[i % 2]}
        for i in range(150)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(records: Path | str, **changes: object) -> ComparisonConfig:
    fields = {"compute": Budget(max_flops=FLOPS), "shares": (0.5, 1.0), "seeds": 2, "probe": str(records), "labels": 20}
    return ComparisonConfig(**(fields | changes))


def contest(out: Path, records: Path, names: tuple[str, ...] = ("roberta", "t5"), **changes: object) -> str:
    settings = [*SMALL, f"data.path={records}"]
    return compare(names, settings, config(records, **changes), out, log=lambda _: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, records: Path) -> tuple[Path, str]:
    """A finished comparison and its output."""
    out = tmp_path_factory.mktemp("comparison")
    return out, contest(out, records)


def rows(directory: Path) -> list[dict[str, float]]:
    found = [json.loads(text) for text in (directory / "metrics.jsonl").read_text().splitlines()]
    return [row for row in found if row["split"] == "train"]


def test_runs_end_with_the_step_that_reaches_their_flops(finished: tuple[Path, str]) -> None:
    out, _ = finished
    runs = sorted((out / "runs").glob("*/share-*/seed-*"))
    assert len(runs) == 2 * 2 * 2
    for directory in runs:
        wanted = FLOPS * float(directory.parent.name.removeprefix("share-"))
        *_, before, last = [row["flops"] for row in rows(directory)]
        assert before < wanted <= last
        assert json.loads((directory / "done.json").read_text())["flops"] == last


def test_one_text_one_tokenizer_and_held_out_test_records(finished: tuple[Path, str], records: Path) -> None:
    out, _ = finished
    own = (out / "tokenizer" / "tokenizer.json").read_bytes()
    for file in (out / "runs").rglob("tokenizer/tokenizer.json"):
        assert file.read_bytes() == own
    assert [path.name for path in (out / "data").glob("*/*")] in (["train", "valid"], ["valid", "train"])  # made once
    tokenizer = Tokenizer.load(out / "tokenizer")
    store = TokenStore.open(next((out / "data").glob("*/train")), tokenizer)
    read = tokenizer.decode(np.array(store.tokens))
    tested = [json.loads(text)["text"] for text in (out / "probe" / "test.jsonl").read_text().splitlines()]
    trained = [json.loads(text)["text"] for text in (out / "probe" / "train-0.jsonl").read_text().splitlines()]
    assert len(tested) > 10 and len(trained) == 20
    assert not any(text in read for text in tested)
    assert all(text in read for text in trained)
    assert trained != [json.loads(text)["text"] for text in (out / "probe" / "train-1.jsonl").read_text().splitlines()]


def test_two_workers_give_the_same_table(finished: tuple[Path, str], records: Path, tmp_path: Path) -> None:
    settings = [*SMALL, f"data.path={records}"]
    compare(("roberta", "t5"), settings, config(records), tmp_path / "out", log=lambda _: None, workers=2)

    def scores(out: Path) -> list[dict[str, object]]:
        found = json.loads((out / "results.json").read_text())["scores"]
        return [{k: v for k, v in one.items() if k not in ("seconds", "key")} for one in found]  # a key has the paths

    assert scores(tmp_path / "out") == scores(finished[0])


def test_the_table_agrees_with_the_results(finished: tuple[Path, str]) -> None:
    out, output = finished
    results = json.loads((out / "results.json").read_text())
    scores = [Score(**s) for s in results["scores"]]
    on_disk = [Score(**read_record(f)) for f in (out / "scores").rglob("*.json")]
    assert sorted(scores, key=str) == sorted(on_disk, key=str)
    assert len(scores) == 2 * 2 * 3
    table = (out / "table.md").read_text()
    head, _, *body = [[c.strip() for c in text.strip("|").split("|")] for text in table.splitlines() if text[:1] == "|"]
    assert {cells[0] for cells in body} == {"roberta", "t5"}
    for cells in body:
        row = dict(zip(head, cells, strict=True))
        own = [s for s in scores if s.recipe == row["recipe"] and s.share == 1.0]
        scratch = {s.seed: s.accuracy for s in scores if s.recipe == row["recipe"] and s.share == 0.0}
        assert row["probe accuracy"].startswith(f"{np.mean([s.accuracy for s in own]):.3f} (")
        assert row["gain"].startswith(f"{np.mean([s.accuracy - scratch[s.seed] for s in own]):.3f} (")
        assert row["cloze accuracy"].startswith(f"{np.mean([s.cloze_accuracy for s in own]):.3f} (")
        assert row["parameters"] == f"{own[0].parameters:,}" and own[0].parameters > 1000
    assert output.startswith(markdown([result_row(scores, cells[0], 1.0) for cells in body]))
    page = (out / "report.html").read_text()
    assert page.count('<svg class="plot wide"') == 2  # the probe and the cloze accuracy; none of bits per byte
    assert page.count("whisker") > 8
    assert all(word in page for word in results["conclusions"])


def test_a_finished_comparison_is_reused_and_can_grow(
    finished: tuple[Path, str], records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, output = finished
    called: list[str] = []

    def stop(recipe: Recipe, directory: Path, log: LogLine, on_metrics: OnMetrics) -> RunResult:
        called.append(recipe.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_module, "run", stop)
    assert contest(out, records) == output
    assert called == []
    with pytest.raises(KeyboardInterrupt):
        contest(out, records, seeds=3)
    assert called == ["probe"]


def test_an_interrupted_comparison_resumes_to_the_same_scores(
    finished: tuple[Path, str], records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = finished
    for killed_at in (0, 3, 5):
        calls = iter(range(100))

        def interrupted(
            recipe: Recipe, directory: Path, log: LogLine, on_metrics: OnMetrics,
            calls: Iterator[int] = calls, killed_at: int = killed_at,
        ) -> RunResult:  # fmt: skip
            if next(calls) == killed_at:
                raise KeyboardInterrupt
            return run(recipe, directory, log=log, on_metrics=on_metrics)

        monkeypatch.setattr(compare_module, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            contest(tmp_path, records, seeds=1)
    monkeypatch.setattr(compare_module, "run", run)
    contest(tmp_path, records, seeds=1)
    for file in (tmp_path / "scores").rglob("*.json"):
        ours, theirs = (
            read_record(top / "scores" / file.relative_to(tmp_path / "scores")) for top in (tmp_path, whole)
        )
        # Their directories are in their recipes, and so in their keys.
        assert ours | {"seconds": 0, "key": ""} == theirs | {"seconds": 0, "key": ""}


def test_causal_models_are_compared_by_bits_per_byte(records: Path, tmp_path: Path) -> None:
    output = contest(tmp_path, records, ("gpt", "roberta"), probe="none", shares=(1.0,), seeds=1)
    results = json.loads((tmp_path / "results.json").read_text())
    by_name = {score["recipe"]: score for score in results["scores"]}
    held_out = [
        json.loads(text) for text in (tmp_path / "runs/gpt/share-1/seed-0/metrics.jsonl").read_text().splitlines()
    ]
    assert by_name["gpt"]["bits_per_byte"] == held_out[-1]["bits_per_byte"]
    assert by_name["roberta"]["bits_per_byte"] is None and by_name["gpt"]["accuracy"] is None
    assert "probe" not in output and "bits per byte" in output
    assert "One seed does not distinguish it from" in output


def test_a_finetuned_encoder_decoder_is_scored_as_in_training(records: Path, tmp_path: Path) -> None:
    model = [setting for setting in SMALL if setting.startswith("model.")]
    t5 = load("t5", [*model, "model.encoder.num_layers=1", "tokenizer.vocab_size=400"])
    recipe = load("classification", [
        f"data.path={records}", "tokenizer.vocab_size=400", "objective.position=answer", "max_steps=4", "precision=fp32",
    ])  # fmt: skip
    ended = run(replace(recipe, model=t5.model), tmp_path / "run", log=lambda _: None)
    share = recipe.data.validation_fraction * 2**64
    held_out = [r for r in records.read_text().splitlines() if content_key(json.loads(r)["text"]) < share]
    (tmp_path / "held.jsonl").write_text("\n".join(held_out) + "\n")
    found = evaluate(tmp_path / "run", [str(tmp_path / "held.jsonl")])
    assert found["task"] == "classification" and found["items"] == len(held_out) > 3
    assert found["accuracy"] == pytest.approx(ended.metrics["valid/accuracy"])


@pytest.mark.parametrize(("names", "settings", "changes", "message"), [
    (("roberta", "nobody"), (), {}, "there is no recipe 'nobody'"),
    (("roberta", "classification"), (), {}, "classification starts from another run, but a comparison trains from scratch"),
    (("roberta", "roberta"), (), {}, "roberta is named twice"),
    ((), (), {}, "name the recipes to compare"),
    (("gpt", "roberta"), ("objective=mlm",), {}, "gpt: objective mlm reads a text from both sides, which a causal decoder cannot"),
    (("roberta",), ("data.path=nowhere.txt",), {}, "nowhere.txt: there is no such file"),
    (("roberta",), (), {"probe": "nowhere.jsonl"}, "nowhere.jsonl: there is no such file"),
    (("roberta",), (), {"labels": 10_000}, "but --labels is 10000: give more records, or fewer --labels"),
    (("roberta",), ("probe.examples.label_field=tone",), {}, "the field 'tone' should hold a class; the record has text, label"),
    (("roberta",), ("probe.batch.row=4",), {}, "there is no field 'row' in Batch"),
    (("roberta", "gpt"), ("examples.max_length=100000",), {}, "gpt: .*too few for one window"),
])  # fmt: skip
def test_errors_are_raised_before_anything_is_trained(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...], settings: tuple[str, ...], changes: dict[str, object], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(compare_module, "run", lambda *_, **__: pytest.fail("something was trained"))
    all_settings = [*SMALL, f"data.path={records}", *settings]
    with pytest.raises(UserError, match=message):
        compare(names, all_settings, config(records, **changes), tmp_path / "out", log=lambda _: None)


def test_other_settings_in_the_same_directory_are_an_error(finished: tuple[Path, str], records: Path) -> None:
    with pytest.raises(UserError, match=r"holds a comparison with other settings \(another number of labels\)"):
        contest(finished[0], records, labels=21)
    with pytest.raises(UserError, match=r"another compute"):
        contest(finished[0], records, compute=Budget(max_seconds=1))


def test_settings_can_be_fixed_in_the_same_directory(
    records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="too few for one window"):
        compare(
            ("gpt",),
            [*SMALL, f"data.path={records}", "examples.max_length=100000"],
            config(records),
            tmp_path / "out",
            print,
        )
    made = tmp_path / "out" / "tokenizer" / "tokenizer.json"
    before = made.read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text(records.read_text().replace("king", "emperor"))
    monkeypatch.setattr(compare_module, "train_once", lambda *_: pytest.fail("accepted"))
    with pytest.raises(pytest.fail.Exception, match="accepted"):
        contest(tmp_path / "out", other, labels=30)
    assert made.read_bytes() != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all my work")
    with pytest.raises(UserError, match="already exists and holds no comparison"):
        contest(tmp_path / "mine", records)


@pytest.mark.parametrize(("changes", "message"), [
    ({"compute": Budget(max_steps=3)}, "do not cost the same"),
    ({"shares": (0.0, 1.0)}, "should be greater than 0"),
    ({"shares": ()}, "shares is empty"),
    ({"seeds": 0}, "seeds=0 should be greater than or equal to 1"),
])  # fmt: skip
def test_invalid_configurations_are_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config("none", **changes)


def scores_of(name: str, values: list[float], share: float = 1.0) -> list[Score]:
    return [Score(name, share, seed, "", accuracy=value) for seed, value in enumerate(values)]


@pytest.mark.oracle
def test_intervals_are_students_and_paired() -> None:
    first, second = [0.71, 0.74, 0.78, 0.80], [0.70, 0.72, 0.75, 0.79]
    ours = paired(scores_of("a", first), scores_of("b", second), METRICS[0])
    theirs = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-4)
    for n in range(2, 21):
        values = np.random.default_rng(n).normal(size=n).tolist()
        made = Interval.of(values)
        wanted = scipy.stats.t.interval(0.95, n - 1, np.mean(values), scipy.stats.sem(values))
        assert made is not None and made.low is not None and made.high is not None
        assert (made.mean, made.high - made.low) == pytest.approx((np.mean(wanted), np.diff(wanted)[0]), rel=1e-4)
    assert Interval.of([0.5]) == Interval(0.5)


def test_intervals_are_clipped_to_possible_values() -> None:
    row = result_row(scores_of("a", [0.67, 1.0]) + scores_of("a", [0.5, 0.9], 0.0), "a", 1.0)
    assert str(row.accuracy) == "0.835 (0.000 to 1.000)"
    assert row.gain is not None and (row.gain.low, row.gain.high) == (
        pytest.approx(-0.3097, abs=1e-3),
        pytest.approx(0.5797, abs=1e-3),
    )
    [sentence] = differences(scores_of("a", [0.9, 0.1]) + scores_of("b", [0.1, 0.85]), METRICS[0])
    assert sentence.endswith("2 seeds do not distinguish it from b by 0.025 (-1.000 to 1.000).")


def test_best_is_reported_only_if_the_interval_excludes_zero() -> None:
    scores = (
        scores_of("a", [0.80, 0.82, 0.84]) + scores_of("b", [0.70, 0.71, 0.745]) + scores_of("c", [0.90, 0.70, 0.80])
    )
    [sentence] = differences(scores, METRICS[0])
    assert re.fullmatch(
        r"Accuracy of the probe: a has the highest mean\. It is above b by 0\.102 \(0\.0\d+ to 0\.1\d+\)\. "
        r"3 seeds do not distinguish it from c by 0\.020 \(-0\.\d+ to 0\.\d+\)\.",
        sentence,
    )
    [single] = differences(scores_of("a", [0.8]) + scores_of("b", [0.7]), METRICS[0])
    assert single == "Accuracy of the probe: a has the highest mean. One seed does not distinguish it from b by 0.100."
    rows = [
        result_row(scores + scores_of("a", [0.5, 0.51, 0.52], 0.0) + scores_of("c", [0.5, 0.9, 0.7], 0.0), n, 1.0)
        for n in "ac"
    ]
    helps, unsure = gains(rows)
    assert helps.startswith("Pretraining helps a: +0.310 (")
    assert unsure.startswith("These seeds cannot say whether pretraining helps c: +0.100 (")
    less = [Score(n, 1.0, s, "", bits_per_byte=v + s / 100) for n, v in (("x", 2.0), ("y", 1.5)) for s in range(3)]
    assert differences(less, METRICS[1]) == ["Held-out text: y is best. It is below x by 0.500 (0.500 to 0.500)."]


def test_test_records_are_from_held_out_documents(tmp_path: Path) -> None:
    plays = [tmp_path / "text" / f"play-{i}.txt" for i in range(8)]
    plays[0].parent.mkdir()
    for play in plays:
        play.write_text(f"Who goes there? It is the king of {play.stem}. " * 5)
    rows = [{"text": f"{play.name} {i}", "label": "ab"[i % 2], "name": play.name} for play in plays for i in range(6)]
    (tmp_path / "probe.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataConfig(path=(str(plays[0].parent),), validation_fraction=0.3)
    drawn = draw_probe(
        str(tmp_path / "probe.jsonl"),
        LabeledConfig(),
        source,
        source.path,
        labels=12,
        seeds=1,
        folder=tmp_path / "out",
        log=print,
    )
    held_out = {d.name for d in documents_of(source, source.path, validation=True)}
    tested = [json.loads(text) for text in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    trained = [json.loads(text) for text in (tmp_path / "out" / "train-0.jsonl").read_text().splitlines()]
    assert {row["name"] for row in tested} == held_out != set()
    assert len(tested) == drawn.num_tested == 6 * len(held_out)
    assert held_out.isdisjoint(row["name"] for row in trained)


def test_plays_give_as_many_questions_as_statements(tmp_path: Path) -> None:
    speech = "Who goes there in the night? It is the king of all these lands. He is not well today, they say. Go!"
    (tmp_path / "speeches.jsonl").write_text(json.dumps({"play": "hamlet", "text": speech}) + "\n")
    rows = [
        json.loads(text)
        for text in questions(tmp_path / "speeches.jsonl", tmp_path / "q.jsonl").read_text().splitlines()
    ]
    assert rows == [
        {"text": "Who goes there in the night", "label": "question", "name": "hamlet.txt"},
        {"text": "It is the king of all these lands", "label": "statement", "name": "hamlet.txt"},
    ]


def test_settings_apply_to_all_recipes_or_to_one(records: Path, tmp_path: Path) -> None:
    settings = [*SMALL, f"data.path={records}", "gpt.model.intermediate_size=48", "probe.optimizer.lr=1e-3"]
    ready = compare_module.prepare(("roberta", "gpt"), settings, config(records), tmp_path, lambda _: None)
    configs = {name: recipe.model for name, recipe in ready.recipes.items()}
    assert (configs["roberta"].intermediate_size, configs["gpt"].intermediate_size) == (32, 48)
    assert configs["roberta"].vocab_size == configs["gpt"].vocab_size == ready.tokenizer.vocab.size
    assert ready.probe_recipe.optimizer.lr == 1e-3
    assert [ready.finetuning(name, 0).objective.position for name in ("roberta", "gpt")] == ["first", "last"]
    assert ready.finetuning("gpt", 0) == ready.finetuning("gpt", 0) != ready.finetuning("gpt", 1)


def test_compute_in_seconds_is_shared(records: Path, tmp_path: Path) -> None:
    output = contest(
        tmp_path, records, ("gpt",), compute=Budget(max_seconds=0.4), shares=(0.5, 1.0), seeds=1, probe="none"
    )
    half, whole = (json.loads((tmp_path / f"runs/gpt/share-{s}/seed-0/done.json").read_text()) for s in ("0.5", "1"))
    assert 0.2 <= half["seconds"] < 0.4 <= whole["seconds"]
    assert "gpt" in output and "FLOPs" in output


def test_the_command_checks_compute_and_shares() -> None:
    for compute in ({}, {"max_seconds": 1.0, "max_flops": 1e9}):
        with pytest.raises(UserError, match="--max-seconds N or --max-flops N, one of them"):
            cli.compare(["gpt"], **compute)
    with pytest.raises(UserError, match="--shares is 'half'"):
        cli.compare(["gpt"], max_seconds=1.0, shares="half")
