"""The page of an evaluation in prompts."""

from firth.evaluate.prompting.prompt_task import ItemResult, PromptConfig
from firth.evaluate.prompting.runner import TaskResult, metric_value
from firth.report.page import render
from firth.runs.evaluate_prompts import prompt_report


def result(model: str, values: list[float]) -> TaskResult:
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
    found = [[result("one", [0.0, 1.0, 1.0, 1.0])], [result("two", [1.0] * 4)]]
    page = render(prompt_report(found, PromptConfig()))
    assert "Question 0?" in page and "Question 1?" not in page
    assert "&lt;no&gt;" in page and "-1.250 | text" in page and "q.jsonl:0" in page
    titles = [section.title for section in prompt_report(found, PromptConfig()).sections]
    assert titles == ["Results", "Comparison", "Groups", "Wrong answers: task, one"]
    assert "1 of 4 items" in page and "2 prompts had fewer examples" in page
