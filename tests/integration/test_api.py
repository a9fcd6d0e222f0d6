"""The Python API and the scripts of examples/, which a user would start from."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import firth
from firth.io.json_files import row_line
from tests.support.messages import logged

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = ["so", "shaken", "as", "we", "are", "wan", "with", "care", "find", "a", "time", "for", "peace", "to", "pant"]
TINY = {"model.hidden_size": 32, "model.num_heads": 2, "model.num_layers": 1, "tokenizer.vocab_size": 300}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Return a file of 300 lines."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text("".join(" ".join(rng.choice(WORDS, 12)) + "\n" for _ in range(300)), "utf-8")
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    """Return a decoder's run, its messages and its rows of metrics."""
    rows = []
    settings = {**TINY, "data.path": text, "data.split_by": "line", "max_steps": 12, "evaluation.every": 6}
    with logged() as messages:
        directory = tmp_path_factory.mktemp("runs") / "gpt"
        result = firth.train(firth.load_recipe("gpt", settings), directory, on_metrics=rows.append)
    return result, messages, rows


def script(name, *arguments, cwd=EXAMPLES):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_of_the_api_exists():
    assert 8 <= len(firth.__all__) <= 12
    for name in firth.__all__:
        assert getattr(firth, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = firth.nothing


def test_import_firth_loads_no_torch():
    code = "import sys, firth; dir(firth); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_settings_are_those_of_the_command_line():
    by_mapping = firth.load_recipe("gpt", {"batch.size": 7, "data.path": ["a.txt", "b: c.txt"], "model.dropout": 0.5})
    by_line = firth.load_recipe("gpt", ["batch.size=7", "data.path=['a.txt', 'b: c.txt']", "model.dropout=0.5"])
    assert by_mapping == by_line and by_mapping.data.path == ("a.txt", "b: c.txt")
    with pytest.raises(firth.UserError, match=r"no field 'siz'.*did you mean 'size'"):
        firth.load_recipe("gpt", {"batch.siz": 7})


def test_progress_and_metrics_are_captured(run):
    result, lines, rows = run
    assert any("parameters" in line for line in lines) and any("step 12/12" in line for line in lines)
    assert (result.directory / "metrics.jsonl").read_text("utf-8") == "".join(map(row_line, rows))
    assert [row["step"] for row in rows if row["split"] == "valid"] == [6, 12]
    assert rows[-1]["loss"] == pytest.approx(result.metrics["valid/loss"])


def test_training_prints_nothing_unless_logging_is_configured(text, tmp_path):
    """As in transformers, messages below WARNING are not shown; the same lines as on the command line can be."""
    settings = {**TINY, "data.path": str(text), "data.split_by": "line", "max_steps": 2}
    code = f"import firth; firth.train(firth.load_recipe('gpt', {settings}), 'run')"
    loud = f"import logging; logging.basicConfig(level=logging.INFO, format='%(message)s'); {code}"
    overrides = [f"{field}={value}" for field, value in settings.items()]
    shown = []
    for name, command in (
        ("a", ["-c", code]),
        ("b", ["-c", loud]),
        ("c", ["-m", "firth", "train", "gpt", *overrides, "--out", "run"]),
    ):
        (tmp_path / name).mkdir()
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path / name, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
        )  # fmt: skip
        shown.append((done.stdout, done.stderr))
    speed = re.compile(r"loss.*|\d+ s\b|in 0:\d\d: .* peak")
    silent, (out, err), (cli_out, cli_err) = shown
    assert silent == ("", "") and out == "" and cli_err == ""
    assert speed.sub("", err) == speed.sub("", cli_out) and "gpt 100%  step 2/2" in cli_out


def test_a_decoder_generates_scores_and_chooses(run):
    model = firth.load_model(run[0].directory)
    first = model.generate(["so shaken", "find we"], max_new_tokens=5, seed=3)
    assert first == model.generate(["so shaken", "find we"], max_new_tokens=5, seed=3) and len(first) == 2
    [answer] = model.chat([[{"role": "user", "content": "so shaken"}]], max_new_tokens=5, seed=3)
    assert answer and answer not in first  # the chat template surrounds the prompt
    options = [" as we are", " zzz qqq 123"]
    scores = model.score(["so shaken"] * 2, options)
    assert scores[0] > scores[1] and model.choose("so shaken", options) == 0
    assert model.embed(["so shaken", "peace"], normalize=True).shape == (2, model.config.hidden_size)
    with pytest.raises(firth.UserError, match="a list of texts is needed"):
        model.generate("so shaken")
    with pytest.raises(firth.UserError, match="temperature"):
        model.generate(["so shaken"], temperature=-1)


def test_the_model_evaluates_as_the_command_does(run, text):
    from typer.testing import CliRunner

    from firth.cli import app

    model = firth.load_model(run[0].directory)
    ours = model.evaluate([str(text)])
    done = CliRunner().invoke(app, ["evaluate", str(run[0].directory), str(text), "--json"])
    theirs = json.loads(done.stdout)
    assert ours["bits_per_byte"] == pytest.approx(theirs["bits_per_byte"], rel=1e-6)


def test_rows_are_kept_and_other_rows_refused(tmp_path):
    rows = [{"text": f"{word} {i}", "label": "ab"[i % 2]} for i, word in enumerate(WORDS * 3)]
    settings = {"max_steps": 2, "tokenizer.vocab_size": 300,
                "model": {"hidden_size": 32, "num_heads": 2, "num_layers": 1, "causal": False}}  # fmt: skip
    recipe = firth.load_recipe("classification", settings)
    result = firth.train(recipe, tmp_path / "run", rows=rows, validation_rows=rows[:4])
    assert [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()] == rows
    assert firth.train(recipe, tmp_path / "run", rows=rows, validation_rows=rows[:4]).steps == result.steps
    with pytest.raises(firth.UserError, match="holds other rows"):
        firth.train(recipe, tmp_path / "run", rows=rows[1:])
    with pytest.raises(firth.UserError, match="validation_rows needs rows"):
        firth.train(recipe, tmp_path / "run2", validation_rows=rows)
    with pytest.raises(firth.UserError, match="must be dicts of texts"):
        firth.train(recipe, tmp_path / "run3", rows=[{"text": object()}])
    model = firth.load_model(tmp_path / "run")
    by_row, by_text = model.predict(rows[:3]), model.predict([row["text"] for row in rows[:3]])
    assert [row["label"] for row in by_row] == [row["label"] for row in by_text]
    with pytest.raises(firth.UserError, match="no LM head"):
        model.generate(["a"])


def test_an_encoder_fills_masks(text, tmp_path):
    settings = {**TINY, "data.path": text, "data.split_by": "line", "max_steps": 2}
    firth.train(firth.load_recipe("roberta", settings), tmp_path / "run")
    [gap] = firth.load_model(tmp_path / "run").fill("so <mask> as", top=3)
    probabilities = [probability for _, probability in gap]
    assert len(gap) == 3 and probabilities == sorted(probabilities, reverse=True)


def test_the_scripts_run(text, tmp_path):
    output = script("pretrain.py", text, tmp_path / "gpt", "--steps", 8)
    assert "held-out loss" in output and "\nThe " in output
    assert "valid/loss" in script("own_objective.py", text, tmp_path / "rare", 4)
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text(
        "".join(json.dumps({"prompt": f"Speak {i}.", "completion": "It is old."}) + "\n" for i in range(8))
    )
    firth.train(
        firth.load_recipe("sft", {"init_from": tmp_path / "gpt", "data.path": dialogues, "max_steps": 2}),
        tmp_path / "sft",
    )
    output = script("preferences.py", tmp_path / "sft", tmp_path / "dpo", "--steps", 12)
    before, after = (float(line.split("= ")[1].split()[0]) for line in output.splitlines() if "log p(chosen)" in line)
    assert after > before


def test_the_classifier_learns(tmp_path):
    output = script("classify.py", tmp_path / "classifier")
    correct, total = (int(word) for word in output.split(" test rows")[0].splitlines()[-1].replace("of", "").split())
    assert total == 16 and correct >= 14
