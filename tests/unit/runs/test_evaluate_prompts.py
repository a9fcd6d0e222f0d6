"""The page of an evaluation in prompts, and the board of several."""

import json
from pathlib import Path

import pytest

from firth.evaluate.prompting.contamination import Contamination
from firth.evaluate.prompting.prompt_task import ItemResult, PromptConfig
from firth.evaluate.prompting.results import read_results, write_results
from firth.evaluate.prompting.runner import TaskResult, metric_value, task_result, with_contamination
from firth.report.page import render
from firth.runs.evaluate_prompts import board, prompt_report, read_entries
from firth.types import UserError


def result(model: str, right: int, task: str = "arithmetic/two", metric: str = "acc") -> TaskResult:
    """Return the result of 40 items, of which the first ones are right."""
    items = [
        ItemResult(f"q.jsonl:{i}", str(i % 8), "p", 2, ["4"], {}, {metric: float(i < right)}, [-1.0]) for i in range(40)
    ]
    return task_result(task, model, items)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    """All metrics, groups and items, also below the directory of several models."""
    first = with_contamination(result("runs/a", 10), Contamination(("runs/a",), (True,) * 10 + (False,) * 30))
    write_results(tmp_path / "model-1", [first, result("runs/a", 3, "other")], PromptConfig(shots=2))
    write_results(tmp_path / "model-2", [result("runs/b", 12)], PromptConfig(shots=2))
    found = read_results(tmp_path)
    assert [(one.task, one.model) for one, _ in found] == [
        ("arithmetic/two", "runs/a"), ("other", "runs/a"), ("arithmetic/two", "runs/b"),
    ]  # fmt: skip
    assert found[0][0] == result("runs/a", 10) and found[0][1]["share"] == 0.25 and found[0][1]["shots"] == 2
    with pytest.raises(UserError, match="there is no results"):
        read_results(tmp_path / "nothing")
    (tmp_path / "model-2" / "samples_arithmetic_two.jsonl").write_text('{"location": 3}\n')
    with pytest.raises(UserError, match=r"samples_arithmetic_two.*, line 1: the field 'location'"):
        read_results(tmp_path)


def test_models_are_named_by_what_differs(tmp_path: Path) -> None:
    """Settings first; directories where nothing else differs."""
    for name, config in (("x", PromptConfig(shots=0)), ("y", PromptConfig(shots=5)), ("z", PromptConfig(shots=5))):
        write_results(tmp_path / name, [result("m", 10)], config)
    names = [entry.result.model for entry in read_entries([str(tmp_path / name) for name in "xyz"])]
    assert names == ["m shots=0", f"m shots=5 ({tmp_path / 'y'})", f"m shots=5 ({tmp_path / 'z'})"]
    with pytest.raises(UserError, match="named twice"):
        read_entries([str(tmp_path / "x")] * 2)
    with pytest.raises(UserError, match="two results or more"):
        board([str(tmp_path / "x")])


def test_the_board_orders_models_and_says_better_where_it_may(tmp_path: Path) -> None:
    """In text, in JSON and on the page."""
    for name, right in (("low", 10), ("high", 30), ("near", 29)):
        write_results(tmp_path / name, [result(name, right)], PromptConfig(shots=2))
    places = [str(tmp_path / name) for name in ("low", "high", "near")]
    text = board(places, tmp_path / "page")
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["high", "near", "low"]
    assert lines[2].split()[:4] == ["high", "0.7500", "0.0327", "low"]
    assert (
        sum("does not differ from" in line for line in lines) == 1
        and sum("is worse than" in line for line in lines) == 2
    )
    page = (tmp_path / "page" / "report.html").read_text()
    assert "after Holm" in page and page.count("<table") == 2 and "http" not in page.split("<body")[1]
    found = json.loads(board(places, as_json=True))
    assert [one["better"] for one in found["comparisons"]] == ["high", "near", ""]
    assert [(one["model"], one["value"]) for one in found["results"]] == [
        ("high", 0.75),
        ("near", 0.725),
        ("low", 0.25),
    ]


def page_result(model: str, values: list[float]) -> TaskResult:
    items = [
        ItemResult(
            f"q.jsonl:{i}", "ab"[i % 2], f"Question {i}?", 0, "yes", {"none": "<no>"}, {"acc": value}, [-1.25, "text"]
        )
        for i, value in enumerate(values)
    ]
    groups = {name: {"acc": metric_value("acc", [item for item in items if item.group == name])} for name in "ab"}
    return TaskResult("task", model, 0, 1, {"acc": metric_value("acc", items)}, groups, items)


def test_the_page_shows_wrong_answers_only() -> None:
    """With the location, what the model replied, and the groups."""
    found = [[page_result("one", [0.0, 1.0, 1.0, 1.0])], [page_result("two", [1.0] * 4)]]
    page = render(prompt_report(found, PromptConfig()))
    assert "Question 0?" in page and "Question 1?" not in page
    assert "&lt;no&gt;" in page and "-1.250 | text" in page and "q.jsonl:0" in page
    titles = [section.title for section in prompt_report(found, PromptConfig()).sections]
    assert titles == ["Results", "Comparison", "Groups", "Wrong answers: task, one"]
    assert "1 of 4 items" in page and "2 prompts had fewer examples" in page
