"""An objective outside the package: the one of docs/how-to/add-an-objective.md trains as the page says."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from firth.cli import app
from firth.objectives import find, name_of
from firth.objectives.objective import Objective
from firth.runs.config_io import from_dict, to_dict
from firth.types import IGNORE, UserError

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "add-an-objective.md"
MODULE, LOOK = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.S)
[PRINTED] = re.findall(r"```text\n(.*?)```", PAGE.read_text("utf-8"), re.S)
*_, COMMAND = re.findall(r"^firth (train .*)$", PAGE.read_text("utf-8"), re.M)
TINY = ["tokenizer.vocab_size=300", "model.hidden_size=32", "model.num_heads=2", "model.num_layers=1", "max_steps=12",
        "data.split_by=line"]  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a working directory with the page's module and a text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "skip_lm", raising=False)
    (tmp_path / "skip_lm.py").write_text(MODULE, "utf-8")
    (tmp_path / "MY_FOLDER").mkdir()
    (tmp_path / "MY_FOLDER" / "mine.txt").write_text(
        "".join(f"so shaken as we are, so wan with care {i}\n" for i in range(400)), "utf-8"
    )
    return tmp_path


def train(*settings):
    done = CliRunner().invoke(app, [*shlex.split(COMMAND), *TINY, *settings])
    return done.exit_code, done.output + str(done.exception or "")


def test_the_example_of_the_page_is_printed(place, capsys, monkeypatch):
    monkeypatch.syspath_prepend(place)
    exec(compile(LOOK, "look.py", "exec"), {})
    assert capsys.readouterr().out == PRINTED


def test_the_objective_of_the_page_trains(place):
    code, output = train()
    assert code == 0, output
    run = place / "runs" / "skip"
    losses = [float(loss) for loss in re.findall(r"step \d+/\d+ +loss (\d\.\d+)", output)]
    assert losses[-1] < losses[0] - 0.5
    assert "skip_lm:SkipLM" in (run / "recipe.yaml").read_text("utf-8")
    assert (run / "model" / "model.safetensors").is_file()
    assert CliRunner().invoke(app, ["generate", str(run), "so shaken"]).exit_code == 0
    code, output = train()
    assert code == 0 and "is finished" in output
    (place / "skip_lm.py").write_text(MODULE + "\n# changed\n", "utf-8")
    code, output = train()
    assert code != 0 and "objective skip_lm:SkipLM" in output


def test_its_labels_are_tokens_ahead(place):
    objective = find("skip_lm:SkipLM")(distance=3)
    tokens = np.arange(10)
    built = objective.build_example({"tokens": tokens}, None, None)
    assert built["labels"].tolist() == [3, 4, 5, 6, 7, 8, 9]
    documents = np.array([0] * 5 + [1] * 5)
    built = objective.build_example({"tokens": tokens, "document_ids": documents}, None, None)
    assert built["labels"].tolist() == [3, 4, IGNORE, IGNORE, IGNORE, 8, 9]
    assert objective.build_example({"tokens": tokens[:2]}, None, None)["labels"].tolist() == [IGNORE]


def test_its_recipe_is_written_and_read(place):
    objective = from_dict(Objective, {"kind": "skip_lm:SkipLM", "distance": 4})
    assert to_dict(objective)["kind"] == name_of(type(objective)) == "skip_lm:SkipLM"
    assert from_dict(Objective, to_dict(objective)) == objective
    both = from_dict(Objective, ["skip_lm:SkipLM", "weight_penalty"])
    assert [one["kind"] for one in to_dict(both)] == ["skip_lm:SkipLM", "weight_penalty"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("skip_lm:Skip", r"has no attribute 'Skip'"),
        ("nowhere:Skip", r"No module named 'nowhere'"),
        ("os:path", r"'os:path' is no objective"),
        ("skip_lm:np", r"'skip_lm:np' is no objective"),
        ("skip_lm", r"there is no objective 'skip_lm'"),
        ({"kind": "skip_lm:SkipLM", "distanc": 3}, r"did you mean 'distance'"),
    ],
)
def test_wrong_names_are_explained(place, name, message):
    with pytest.raises(UserError, match=message):
        from_dict(Objective, name)


def test_a_module_that_fails_is_named(place):
    (place / "broken.py").write_text("1 / 0\n", "utf-8")
    with pytest.raises(UserError, match=r"'broken:Loss' cannot be imported: ZeroDivisionError"):
        from_dict(Objective, "broken:Loss")


def test_a_model_directory_imports_nothing(place):
    """The objective that firth.json names is of another person's machine: it is unknown, not imported."""
    code, output = train()
    assert code == 0, output
    (place / "skip_lm.py").write_text("raise SystemExit\n", "utf-8")
    sys.modules.pop("skip_lm")
    assert CliRunner().invoke(app, ["generate", str(place / "runs/skip/model"), "so shaken"]).exit_code == 0
