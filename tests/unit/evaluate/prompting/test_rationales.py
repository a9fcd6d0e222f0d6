"""Few-shot chain of thought: examples with rationales, whose answers filters read."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from firth.evaluate.prompting.metrics import Filter, FilterChain
from firth.evaluate.prompting.prompt_task import MetricConfig, PromptConfig, PromptTask
from firth.evaluate.prompting.requests import GenerateReply, GenerateRequest, Reply, Request
from firth.evaluate.prompting.task_files import load_tasks
from firth.types import UserError
from tests.support.fake_responder import FakeModel, items, one_result
from tests.support.samples import sample_number

FEW_SHOT = PromptConfig(shots=1, cot="few-shot")
LAST_NUMBER = (FilterChain("none", (Filter("regex", {"regex_pattern": r"(-?\d+)", "group_select": -1}),)),)
SUMS = PromptTask(
    "sums", items({"q": "1+1", "a": 2, "why": "One and one are 2."}, {"q": "2+3", "a": 5, "why": "Two and three are 5."}),
    "generate_until", "Q: {{q}}\nA:", "a", rationale="{{why}} The answer is {{a}}.", filters=LAST_NUMBER, max_new_tokens=8,
    metrics=(MetricConfig("exact_match"),),
)  # fmt: skip
LETTERS = PromptTask(
    "letters", items({"q": "x", "gold": 1, "why": "As b."}, {"q": "y", "gold": 0, "why": "As a."}), "multiple_choice",
    "{{q}}", "gold", choices=("A", "B"), rationale="{{why}} The answer is {{['A', 'B'][gold]}}.", metrics=(MetricConfig("acc"),),
    filters=(FilterChain("none", (Filter("regex", {"regex_pattern": "answer is ([AB])"}),)),),
)  # fmt: skip


def test_examples_show_the_rationale_before_the_answer() -> None:
    """One request per question; there is room for a rationale; the answer is what the filter reads."""
    model = FakeModel({"Q: 2+3\nA:": "Three and two are 4, no, 5."})
    result = one_result(SUMS, model, FEW_SHOT)
    first, second = model.requests
    assert second.prompt == "Q: 1+1\nA: One and one are 2. The answer is 2.\n\nQ: 2+3\nA:"
    assert isinstance(first, GenerateRequest) and first.max_new_tokens == 256
    assert [item.answers["none"] for item in result.items] == ["5", "5"]
    assert result.metrics["exact_match"].value == 0.5
    one_result(SUMS, model, PromptConfig(shots=1))
    assert model.requests[-1].prompt == "Q: 1+1\nA: 2\n\nQ: 2+3\nA:"


def test_votes_over_rationales() -> None:
    """Self-consistency (Wang 2022): the most frequent of the read answers."""

    class Voter(FakeModel):
        def reply(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply]]:
            for i, request in enumerate(requests):
                assert isinstance(request, GenerateRequest) and request.temperature > 0
                yield i, GenerateReply(f"By way {request.seed}: {5 if sample_number(request) < 3 else 6}", "stop")

    result = one_result(SUMS, Voter(), replace(FEW_SHOT, votes=5))
    assert [item.answers["none"] for item in result.items] == ["5", "5"]
    assert len(result.items[0].replies) == 5


def test_multiple_choice_reads_the_choice_from_the_text() -> None:
    """A text that names no choice is wrong."""
    model = FakeModel(
        {"B.\n\nx": "It is clear. The answer is B.", "A.\n\nx": "The answer is B", "B.\n\ny": "Who knows?"}
    )
    result = one_result(LETTERS, model, replace(FEW_SHOT, votes=1))
    assert [item.metrics["acc"] for item in result.items] == [1.0, 0.0]
    assert result.items[0].gold == "B" and result.items[0].answers == {"none": "B"}
    assert all(isinstance(request, GenerateRequest) for request in model.requests)


@pytest.mark.parametrize(
    ("task", "config", "words"),
    [
        (replace(SUMS, rationale=""), FEW_SHOT, r"sums: --cot few-shot needs rationales, and the task names none: .*doc_to_rationale"),
        (replace(SUMS, rationale="{{reason}}"), FEW_SHOT, r"questions.jsonl:1: .* 'reason' is undefined; the fields are 'q', 'a'"),
        (SUMS, PromptConfig(shots=0, cot="few-shot"), r"sums: --cot few-shot needs examples, and there are 0: give --shots"),
        (replace(SUMS, stop=("One",)), FEW_SHOT, r"questions.jsonl:1: the rationale contains 'One', at which answers of sums end"),
        (
            replace(SUMS, rationale="{{why}} That is 3."), FEW_SHOT,
            r"questions.jsonl:1: filter_list reads '3' from the rationale, and the answer is '2'",
        ),
        (replace(LETTERS, filters=()), FEW_SHOT, "filter_list reads ' As b. The answer is B.'"),
        (LETTERS, PromptConfig(votes=3), "--votes samples generated answers"),
        (replace(SUMS, output_type="loglikelihood"), FEW_SHOT, "--cot needs answers"),
    ],
)  # fmt: skip
def test_a_fault_is_found_before_the_model_runs(task: PromptTask, config: PromptConfig, words: str) -> None:
    """A task that has no usable rationales."""
    model = FakeModel()
    with pytest.raises(UserError, match=words):
        one_result(task, model, config)
    assert not model.requests


def test_a_text_file_of_examples(tmp_path: Path) -> None:
    """BIG-Bench Hard's prompts: the lines with the canary are left out, the rest precedes each question."""
    prompt = tmp_path / "boolean.txt"
    prompt.write_text("Canary: do not train on this\n-----\nEvaluate.\n\nQ: not True\nA: So the answer is False.\n")
    data = tmp_path / "boolean.json"
    data.write_text('{"canary": "c", "examples": [{"input": "not False", "target": "True"}]}')
    [task] = load_tasks("bbh", [str(data)], [str(prompt)])
    model = FakeModel({"not False": "not False is True. So the answer is True."})
    result = one_result(task, model, PromptConfig(cot="few-shot"))
    assert model.requests[0].prompt == "Evaluate.\n\nQ: not True\nA: So the answer is False.\n\nQ: not False\nA:"
    assert result.metrics["exact_match"].value == 1 and result.items[0].location == f"{data}: example 1"
    prompt.write_text("\n")
    with pytest.raises(UserError, match=r"boolean.txt: this file of examples is empty"):
        load_tasks("bbh", [str(data)], [str(prompt)])
    with pytest.raises(UserError, match=r"boolean.txt: .* give no other file"):
        load_tasks("bbh", [str(data)], [str(prompt), str(data)])
