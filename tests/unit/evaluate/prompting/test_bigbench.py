"""Tasks of BIG-bench: prompts, choices, metrics and the reading of answers as in its own code."""

import json
from pathlib import Path
from typing import Any

import pytest

from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.evaluate.prompting.requests import GenerateRequest, ScoreRequest
from firth.evaluate.prompting.runner import run_tasks
from firth.evaluate.prompting.task_files import load_tasks
from firth.evaluate.prompting.task_formats import read_bigbench
from firth.types import UserError
from tests.support.fake_responder import FakeModel, one_result
from tests.support.messages import logged

CHOICES: dict[str, Any] = {
    "name": "color", "description": "", "keywords": [], "task_prefix": "Choose {one}.", "metrics": ["multiple_choice_grade"],
    "preferred_score": "multiple_choice_grade",
    "examples": [
        {"input": "Snow?", "target_scores": {"black": 0, "white": 1}},
        {"input": "Coal?", "target_scores": {"black": 1, "light gray": 0.5}},
        {"input": "Coal?", "target_scores": {"black": 1, "light gray": 0.5}},
    ],
}  # fmt: skip
TEXTS: dict[str, Any] = {
    "name": "sum", "description": "", "keywords": [], "metrics": ["bleu", "exact_str_match", "rouge"],
    "preferred_score": "exact_str_match", "examples": [{"input": "1+1", "target": ["2", "two"]}, {"input": "2+1", "target": "3"}],
}  # fmt: skip


def write(directory: Path, task: object) -> Path:
    """Write a task.json."""
    path = directory / "task.json"
    path.write_text(json.dumps(task))
    return path


def test_choices_are_scored_and_graded(tmp_path: Path) -> None:
    """A copy of an example is dropped; choices stand in the random order of seed 42, which exchanges two sorted ones."""
    write(tmp_path, CHOICES)
    [task] = load_tasks(str(tmp_path))
    model = FakeModel()
    result = one_result(task, model, PromptConfig(shots=1))
    assert model.requests[0] == ScoreRequest(
        "Choose {one}.\nQ: Coal?\n  choice: light gray\n  choice: black\nA: black\n"
        "\nQ: Snow?\n  choice: white\n  choice: black\nA: ",
        "black",
    )
    assert len(result.items) == 2 and list(result.metrics) == ["multiple_choice_grade"]
    assert result.metrics["multiple_choice_grade"].value == 0.5
    write(tmp_path, CHOICES | {"append_choices_to_input": False})
    assert load_tasks(str(tmp_path))[0].items[0].fields["input"] == "\nQ: Snow?\nA: "


def test_texts_are_read_to_the_end_of_a_sentence(tmp_path: Path) -> None:
    """The preferred metric is first; several targets are possible; ROUGE is three metrics."""
    [task] = read_bigbench(write(tmp_path, TEXTS))
    model = FakeModel({"1+1": "\n two. Or so", "2+1": "4\n3"})
    result = one_result(task, model)
    assert [item.answers["none"] for item in result.items] == ["two", "4"]
    assert list(result.metrics) == ["exact_str_match", "bleu", "rouge1", "rouge2", "rougeLsum"]
    assert result.metrics["exact_str_match"].value == 0.5 and result.metrics["rouge1"].value == 50
    assert isinstance(model.requests[0], GenerateRequest) and model.requests[0].stop == ("\n\nQ:",)
    [task] = read_bigbench(write(tmp_path, TEXTS | {"output_regex": "[0-9]+", "stop_string": "#"}))
    result = one_result(task, FakeModel({"1+1": "two", "2+1": "It is 3!"}))
    assert [item.answers["none"] for item in result.items] == ["", "3"] and task.stop == ("#",)


def test_a_file_with_metrics_of_choices_and_texts_is_two_tasks(tmp_path: Path) -> None:
    """As in strategyqa, where the examples show an explanation that is a target of its own."""
    examples = [
        {"input": "Frost?", "target_scores": {"Yes": 1, "No": 0}, "target": "Yes. It is cold."},
        {"input": "Heat?", "target_scores": {"Yes": 0, "No": 1}, "target": "No. It is cold."},
    ]
    both = {"metrics": ["bleu", "multiple_choice_grade", "log_likelihood"], "preferred_score": "multiple_choice_grade"}
    tasks = read_bigbench(write(tmp_path, CHOICES | both | {"examples": examples, "append_choices_to_input": False}))
    assert [(task.name, task.output_type) for task in tasks] == [
        ("color", "multiple_choice"), ("color:texts", "generate_until"), ("color:likelihood", "loglikelihood"),
    ]  # fmt: skip
    model = FakeModel()
    results = run_tasks(tasks, model, PromptConfig(shots=1))
    assert model.requests[0].prompt == "Choose {one}.\nQ: Heat?\nA: No. It is cold.\n\nQ: Frost?\nA: "
    assert results[0].metrics["multiple_choice_grade"].value == 0.5
    assert results[2].metrics["log_likelihood"].value == -(len("Yes. It is cold.") + len("No. It is cold.")) / 2


def test_directories_of_subtasks(tmp_path: Path) -> None:
    """A task without examples has its parts in directories."""
    write(tmp_path, {"name": "all", "description": "", "keywords": []})
    with pytest.raises(UserError, match="neither examples nor directories"):
        load_tasks(str(tmp_path))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, TEXTS | {"name": name})
    assert [task.name for task in load_tasks(str(tmp_path))] == ["all:a", "all:b"]


def test_metrics_that_are_models_are_left_out(tmp_path: Path) -> None:
    """BLEURT needs a network of its own."""
    with logged() as messages:
        [task] = read_bigbench(write(tmp_path, TEXTS | {"metrics": ["bleurt", "bleu"], "preferred_score": "bleurt"}))
    assert [metric.name for metric in task.metrics] == ["bleu"]
    assert len(messages) == 1 and "bleurt is a model" in messages[0]


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    """In questions and in choices, which are keys."""
    one = {"input": "Snow\ud83d?", "target_scores": {"bl\ud83dack": 0, "white": 1}}
    [task] = read_bigbench(write(tmp_path, CHOICES | {"examples": [one]}))
    assert task.items[0].fields["question"] == "Snow\ufffd?" and task.items[0].fields["choices"] == [
        "bl\ufffdack",
        "white",
    ]


def test_questions_with_one_choice_are_left_out(tmp_path: Path) -> None:
    """Such a question is always right."""
    one = {"input": "Sky?", "target_scores": {"blue": 1}}
    with logged() as messages:
        [task] = read_bigbench(write(tmp_path, CHOICES | {"examples": [*CHOICES["examples"], one]}))
    assert len(task.items) == 2 and "1 of 3 examples have one choice" in messages[0]


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ([], "this is not a task.json of BIG-bench"),
        (TEXTS | {"metrics": ["bleurt"]}, r"all metrics of this task \(bleurt\) are models"),
        (TEXTS | {"metrics": ["perplexity"]}, "the metric 'perplexity' is not computed here"),
        (TEXTS | {"metrics": "bleu"}, "metrics must be a list of names"),
        (TEXTS | {"examples": []}, "examples must be a list of records"),
        (TEXTS | {"examples": [{"input": "1+1"}]}, "example 1: an example has the fields input, and target or"),
        (TEXTS | {"examples": [{"input": "1+1", "target": []}]}, "example 1: the list of targets is empty"),
        (TEXTS | {"output_regex": "("}, "the filter 'search' does not work"),
        (CHOICES | {"examples": [{"input": "x", "target": "y"}]}, "example 1: there is no target_scores"),
        (CHOICES | {"examples": [{"input": "x", "target_scores": {"a": 0, "b": 0}}]}, "example 1: no choice has a higher score"),
        (CHOICES | {"examples": [{"input": "x", "target_scores": {"a": "high"}}]}, "example 1: the scores of the choices must be numbers"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(tmp_path: Path, task: object, words: str) -> None:
    """With its path and the number of the example."""
    with pytest.raises(UserError, match=rf"task.json: {words}"):
        read_bigbench(write(tmp_path, task))
