"""Files of pipelines: variables, errors with lines, resuming."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from firth.pipelines import pipeline
from firth.pipelines.ai_feedback import JudgePairs
from firth.pipelines.best_of_n import SampleAnswers
from firth.pipelines.pipeline import TrainRecipe, load_pipeline, load_stage, names, run_pipeline
from firth.pipelines.stage import Stage
from firth.runs.recipe import Recipe
from firth.runs.run import RunResult
from firth.types import UserError

RAN: list[str] = []


@dataclass(frozen=True)
class Note(Stage):
    """Writes a text."""

    main: ClassVar[str] = "text"
    output: ClassVar[str] = "note.txt"

    text: str
    data: tuple[str, ...] = ()

    def run(self, directory: Path) -> Mapping[str, float | str]:
        RAN.append(self.text)
        if self.text == "fail":
            raise UserError("it fails")
        (directory / self.output).write_text(self.text)
        return {"letters": len(self.text)}


@pytest.fixture(autouse=True)
def note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pipeline.KINDS, "note", Note)
    RAN.clear()


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "p.yaml").write_text(text)
    return str(tmp_path / "p.yaml")


def test_variables_are_inputs_and_outputs_of_earlier_stages(tmp_path: Path) -> None:
    file = written(
        tmp_path,
        "inputs:\n  model: a model\n  count: {default: 3, about: samples}\n"
        "stages:\n  sft: {train: sft, init_from: $model, data.path: [d.jsonl]}\n"
        "  answers: {sample: $sft, data: $model/prompts.jsonl, num_samples: $count}\n  pairs: {judge: $answers, model: $sft}\n",
    )
    stages = load_pipeline(file, ["model=runs/m", "answers.seed=5"], Path("out")).stages
    sft, answers, pairs = stages.values()
    assert isinstance(sft, TrainRecipe) and sft.settings == {"init_from": "runs/m", "data.path": ["d.jsonl"]}
    assert isinstance(answers, SampleAnswers) and (answers.model, answers.num_samples, answers.seed) == (
        "out/sft",
        3,
        5,
    )
    assert answers.data == ("runs/m/prompts.jsonl",)
    assert isinstance(pairs, JudgePairs) and pairs.data == ("out/answers/answers.jsonl",)


@pytest.mark.parametrize(
    ("text", "assignments", "message"),
    [
        ("stages:\n  a: {sample: $b, data: x}\n", [], r"p\.yaml:2: stages\.a\.sample: there is no \$b"),
        (
            "stages:\n  a:\n    judge: x\n    modle: y\n",
            [],
            r"p\.yaml:4: stages\.a\.modle: there is no field 'modle'.*'model'",
        ),
        ("stages:\n  a: {judge: x}\n", [], r"p\.yaml:2.*needs the field 'model'"),
        ("stages:\n  a: {sampel: x}\n", [], r"p\.yaml:2: stages\.a: a stage names one of its kinds"),
        ("stages:\n  a: {judge: x, sample: y}\n", [], r"a stage names one of its kinds"),
        ("stages:\n  a b: {note: x}\n", [], r"p\.yaml:2: .*name of a stage"),
        ("inputs: {m: a model}\nstages:\n  m: {note: x}\n", ["m=1"], "is not that of an input"),
        ("inputs:\n  m: a model\nstages:\n  a: {note: $m}\n", [], r"p\.yaml:2: set m=\.\.\.: a model"),
        ("stages:\n  a: {note: x}\n", ["b=1"], r"'b=1': write INPUT=value or STAGE\.field=value"),
        ("stages:\n  a: {note: x}\n", ["a.txt=1"], "there is no field 'txt'"),
        ("stages:\n  a: {note: x}\n  a: {note: y}\n", [], r"p\.yaml:3: a is given twice"),
        ("stages:\n  a: {train: dpo, init_from: x, objectiv.beta: 0.2}\n", [], r"p\.yaml:2: .*objectiv"),
        ("inputs: {m: a model}\nstages:\n  a: {note: $m}\n", ["m=[a"], r"m=\[a:1: this is not YAML"),
        ("stage: {}\n", [], r"p\.yaml:1: there is no field 'stage'"),
        ("stages: [a]\n", [], r"p\.yaml:1: stages must be"),
        ("stages:\n  a: {judge: x, model: y, principles: [' ']}\n", [], r"p\.yaml:2: the list of principles is empty"),
    ],
)
def test_errors_name_file_and_line(tmp_path: Path, text: str, assignments: list[str], message: str) -> None:
    file = written(tmp_path, text)
    with pytest.raises(UserError, match=message):
        load_pipeline(file, assignments, tmp_path / "out")


def test_finished_stages_are_skipped(tmp_path: Path) -> None:
    file = written(tmp_path, "stages:\n  a: {note: one}\n  b: {note: fail}\n")
    with pytest.raises(UserError, match="stage b: it fails"):
        run_pipeline(load_pipeline(file, [], tmp_path / "out"))
    assert RAN == ["one", "fail"] and not (tmp_path / "out" / "b" / "stage.json").exists()
    finished = run_pipeline(load_pipeline(file, ["b.note=two"], tmp_path / "out"))
    assert RAN == ["one", "fail", "two"] and [one.summary for one in finished] == [{"letters": 3}] * 2
    assert "note.txt" in {path.name for path in (tmp_path / "out" / "b").iterdir()}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "letters" in page and page.count("<h2") >= 3


def test_a_changed_stage_is_not_skipped_silently(tmp_path: Path) -> None:
    file = written(tmp_path, "stages:\n  a: {note: one}\n  b: {note: $a}\n")
    run_pipeline(load_pipeline(file, [], tmp_path / "out"))
    with pytest.raises(UserError, match=r"out/a: the stage a or an earlier one was run with other settings"):
        run_pipeline(load_pipeline(file, ["a.note=other"], tmp_path / "out"))
    (tmp_path / "out").rename(tmp_path / "moved")
    run_pipeline(load_pipeline(file, [], tmp_path / "moved"))
    assert len(RAN) == 2


def test_changed_files_are_noticed(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a"}\n')
    file = written(tmp_path, f"stages:\n  a: {{note: one, data: {data}}}\n")
    run_pipeline(load_pipeline(file, [], tmp_path / "out"))
    data.write_text('{"prompt": "b"}\n')
    with pytest.raises(UserError, match="run with other settings"):
        run_pipeline(load_pipeline(file, [], tmp_path / "out"))


def test_changed_files_of_a_training_stage_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records of data.path, the weights of init_from, and the module of a reward function."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(b"1")
    (tmp_path / "stage_rewards.py").write_text("def f(text): return 1.0\n")
    settings = {"init_from": "m", "data.path": "d.jsonl", "examples.reward_function": "stage_rewards:f"}
    stage = TrainRecipe("ppo", settings)
    before = pipeline._identity(stage, Path("out"))
    for file in ("d.jsonl", "m/model.safetensors", "stage_rewards.py"):
        kept = (tmp_path / file).read_bytes()
        (tmp_path / file).write_bytes(kept + b"\n")
        assert pipeline._identity(stage, Path("out")) != before, file
        (tmp_path / file).write_bytes(kept)
    assert pipeline._identity(stage, Path("out")) == before


def test_a_damaged_record_of_a_stage(tmp_path: Path) -> None:
    file = written(tmp_path, "stages:\n  a: {note: one}\n")
    run_pipeline(load_pipeline(file, [], tmp_path / "out"))
    (tmp_path / "out" / "a" / "stage.json").write_text("{")
    with pytest.raises(UserError, match=r"stage\.json: this file is damaged"):
        run_pipeline(load_pipeline(file, [], tmp_path / "out"))


@pytest.mark.parametrize("name", names())
def test_the_pipelines_that_come_with_firth_are_complete(name: str) -> None:
    """Every input is used, and every stage is built from the inputs alone."""
    text = (pipeline.FILES / f"{name}.yaml").read_text()
    inputs: dict[str, Any] = pipeline.config_io.read_yaml(pipeline.FILES / f"{name}.yaml")[0]["inputs"]
    assert all(f"${one}" in text for one in inputs)
    stages = load_pipeline(
        name, [f"{one}=x" for one, about in inputs.items() if isinstance(about, str)], Path("out")
    ).stages
    assert len(stages) >= 3


def test_recipes_of_pipelines_load() -> None:
    """The settings of the training stages are fields of their recipes."""
    for name in names():
        inputs = pipeline.config_io.read_yaml(pipeline.FILES / f"{name}.yaml")[0]["inputs"]
        given = [f"{one}=x" for one, about in inputs.items() if isinstance(about, str)]
        for stage in load_pipeline(name, given, Path("out")).stages.values():
            if isinstance(stage, TrainRecipe):
                assert stage.loaded.init_from


def test_the_recipe_of_a_stage_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is checked, hashed and run as it was read."""
    calls: list[str] = []
    read = pipeline.load

    def counted(name: str, assignments: list[str]) -> Recipe:
        calls.append(name)
        return read(name, assignments)

    def pretended(recipe: Recipe, directory: Path) -> RunResult:
        assert recipe.budget.max_steps == 3
        return RunResult(directory, 3, 3, 0, 0.0, 0.0, {})

    monkeypatch.setattr(pipeline, "load", counted)
    monkeypatch.setattr(pipeline, "run", pretended)
    file = written(tmp_path, "stages:\n  a: {train: gpt, max_steps: 3, data.path: text.txt}\n")
    (tmp_path / "text.txt").write_text("the otter")
    monkeypatch.chdir(tmp_path)
    [done] = run_pipeline(load_pipeline(file, [], tmp_path / "out"))
    assert done.summary["steps"] == 3 and calls == ["gpt"]


def test_single_stages() -> None:
    stage = load_stage("judge", ["data=a.jsonl", "model=m", "principles=[Be brief.]"])
    assert stage == JudgePairs(data=("a.jsonl",), model="m", principles=("Be brief.",))
    with pytest.raises(UserError, match="use `firth train RECIPE"):
        load_stage("train", [])
    with pytest.raises(UserError, match="num_samples"):
        load_stage("sample", ["data=a.jsonl", "model=m", "num_samples=0"])
