"""The tasks in prompts that firth ships, each on a file in its format."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.evaluate.prompting.requests import ScoreRequest
from firth.evaluate.prompting.task_files import builtin_names, is_prompt_task, load_tasks
from firth.evaluate.tasks import TASKS, find
from firth.types import UserError
from tests.support.fake_responder import FakeModel, one_result

PAIR = {"sentence1": "It rains.", "sentence2": "It is wet."}
RECORDS: dict[str, dict[str, object]] = {
    "arithmetic": {"question": "1 + 1?", "answer": 2, "rationale": "One and one are two."},
    "bbh": {"input": "not True is", "target": "False", "rationale": "not True is False."},
    "closed_book": {"question": "q", "answer": ["a", "b"]},
    "glue_cola": {"sentence": "He are.", "label": 0},
    "glue_mnli": {"premise": "It rains.", "hypothesis": "It is wet.", "label": 1},
    "glue_mrpc": PAIR | {"label": 1},
    "glue_qnli": {"question": "Who?", "sentence": "He.", "label": 0},
    "glue_qqp": {"question1": "Who?", "question2": "Which one?", "label": 1},
    "glue_rte": PAIR | {"label": 0},
    "glue_sst2": {"sentence": "Good.", "label": 1},
    "glue_wnli": PAIR | {"label": 1},
    "gsm8k": {"question": "q", "answer": "1 + 1 = 2\n#### 2"},
    "minimal_pairs": {"sentence_good": "He is.", "sentence_bad": "He are."},
    "mmlu": {"question": "q", "choices": list("abcd"), "answer": 1, "subject": "high_school_physics", "rationale": "By law."},
    "mmlu_full_answers": {"question": "q", "choices": list("abcd"), "answer": 1, "subject": "physics", "rationale": "By law."},
    "perplexity": {"text": "one two"},
    "word_translation": {"source": "thanks", "target": "merci"},
}  # fmt: skip


def write_lines(path: Path, records: Sequence[Mapping[str, object]]) -> str:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def shipped() -> list[str]:
    """Return the tasks that read records."""
    return [name for name in builtin_names() if name != "natural_instructions"]


@pytest.mark.parametrize("name", shipped())
def test_shipped_tasks_run(tmp_path: Path, name: str) -> None:
    """Each shipped task renders its format."""
    path = write_lines(tmp_path / "records.jsonl", [RECORDS[name] | {"number": number} for number in range(6)])
    [task] = load_tasks(name, [path])
    result = one_result(task, FakeModel())
    assert len(result.items) == 6 and result.metrics


@pytest.mark.parametrize("name", ["arithmetic", "bbh", "gsm8k", "mmlu", "mmlu_full_answers"])
def test_shipped_tasks_with_rationales(tmp_path: Path, name: str) -> None:
    """The filters of the task read the answer that its rationale ends with."""
    path = write_lines(tmp_path / "records.jsonl", [RECORDS[name] | {"number": number} for number in range(6)])
    [task] = load_tasks(name, [path])
    model = FakeModel()
    one_result(task, model, PromptConfig(shots=2, cot="few-shot"))
    rationale = str(RECORDS[name].get("rationale", "1 + 1 = 2"))
    assert all(request.prompt.count(rationale) == 2 for request in model.requests)


def test_names_of_tasks_are_looked_up_once() -> None:
    """No task in prompts has the name of another task, and an unknown name lists both kinds."""
    assert not {"likelihood", "glue", "objective", *TASKS} & {*builtin_names()}
    assert all(is_prompt_task(name) for name in builtin_names()) and not any(map(is_prompt_task, TASKS))
    with pytest.raises(
        UserError, match=r"there is no task 'mmlo'; .*classification.*in prompts .*mmlu.*task.json of BIG-bench"
    ):
        find("mmlo")


GLUE_FILES = {
    "cola": ("gj04\t1\t\tHe is.\ngj04\t0\t*\tHe are.\n", [1, 0]),
    "sst2": ("sentence\tlabel\ngood\t1\nbad\t0\n", [1, 0]),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tIt rains.\tRain falls.\n0\t7\t9\tIt rains.\tNo.\n", [1, 0]),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t2\t3\tWho?\tWhy?\t0\n2\t4\t5\tWho?\tWho is it?\t1\n", [0, 1]),
    "mnli": (
        "index\tsentence1\tsentence2\tgold_label\n0\tIt rains.\tIt is wet.\tentailment\n1\tIt rains.\tIt is cold.\tneutral\n"
        "2\tIt rains.\tIt is dry.\tcontradiction\n3\tIt rains.\tHm.\t-\n",
        [0, 1, 2],
    ),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\tWho?\tHe.\tentailment\n1\tWho?\tRain.\tnot_entailment\n", [0, 1]),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n1\tIt rains.\tHm.\tnot_entailment\n", [0, 1]),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\t1\n1\tIt rains.\tHm.\t0\n", [1, 0]),
}  # fmt: skip
"""Task -> its file as GLUE distributes it, and the index of the right choices; MNLI's last record has no label."""


@pytest.mark.parametrize("name", GLUE_FILES)
def test_glue_reads_the_files_of_glue(tmp_path: Path, name: str) -> None:
    """Zero-shot and with one example; each prompt holds the fields of its record and no label."""
    path = tmp_path / "dev.tsv"
    text, golds = GLUE_FILES[name]
    path.write_text(text)
    [task] = load_tasks(f"glue_{name}", [str(path)])
    assert [task.gold_of(item) for item in task.items] == golds
    model = FakeModel()
    one_result(task, model)
    choices = task.choices_of(task.items[0])
    assert [request.continuation for request in model.requests if isinstance(request, ScoreRequest)][: len(choices)] == [
        f" {choice}" for choice in choices
    ]  # fmt: skip
    prompts = list(dict.fromkeys(request.prompt for request in model.requests))
    one_result(task, model, PromptConfig(shots=1))
    assert model.requests[-1].prompt.endswith(f"\n\n{prompts[-1]}")
    assert model.requests[-1].prompt.startswith(tuple(f"{prompt} " for prompt in prompts[:-1]))


def test_glue_metrics(tmp_path: Path) -> None:
    """The shorter choice "no" always wins: F1 and Matthews' correlation are 0 where accuracy is not."""
    records = [RECORDS["glue_mrpc"] | {"label": label, "n": n} for n, label in enumerate((1, 0, 0))]
    [task] = load_tasks("glue_mrpc", [write_lines(tmp_path / "a.jsonl", records)])
    found = one_result(task, FakeModel()).metrics
    assert found["acc"].value == pytest.approx(2 / 3) and found["f1"].value == 0
    records = [RECORDS["glue_cola"] | {"label": label, "n": n} for n, label in enumerate((1, 0, 0))]
    [task] = load_tasks("glue_cola", [write_lines(tmp_path / "b.jsonl", records)])
    assert one_result(task, FakeModel()).metrics["mcc"].value == 0


def natural_task(name: str) -> dict[str, object]:
    """Return a task in the format of natural instructions."""
    return {
        "Definition": [f"Do {name}."],
        "Positive Examples": [{"input": f"{name} {i}", "output": f"did {i}", "explanation": ""} for i in range(3)],
        "Negative Examples": [],
        "Instances": [{"id": f"{name}-{i}", "input": f"{name} in {i}", "output": [f"out {i}", "done"]} for i in range(2)],
    }  # fmt: skip


def test_natural_instructions(tmp_path: Path) -> None:
    """A directory is one evaluation grouped by task; a list names the tasks held out from training."""
    (tmp_path / "tasks").mkdir()
    (tmp_path / "splits" / "default").mkdir(parents=True)
    for name in ("one", "two", "three"):
        (tmp_path / "tasks" / f"{name}.json").write_text(json.dumps(natural_task(name)))
    [task] = load_tasks("natural_instructions", [str(tmp_path / "tasks")])
    model = FakeModel({"two in 0": " Done.", "one in 1": "out 1 again"})
    result = one_result(task, model)
    assert model.requests[0].prompt == (
        "Do one.\n\nInput: one 0\nOutput: did 0\n\nInput: one 1\nOutput: did 1\n\nInput: one in 0\nOutput:"
    )
    assert sorted(result.groups) == ["one", "three", "two"]
    by_input = {item.prompt.splitlines()[-2]: item for item in result.items}
    assert by_input["Input: two in 0"].metrics == {"rougeL": 100.0, "exact_match": 1.0}
    assert by_input["Input: one in 1"].metrics["rougeL"] == pytest.approx(80)
    padded = {"Instances": [{"input": "pad", "output": [" out\n"]}, {"input": "half\ud83d", "output": ["x\ud83d"]}]}
    (tmp_path / "padded.json").write_text(json.dumps(natural_task("padded") | padded))
    [spaces] = load_tasks("natural_instructions", [str(tmp_path / "padded.json")])
    result = one_result(spaces, FakeModel({"Input: pad\n": " out"}))
    assert result.items[0].metrics == {"rougeL": 100.0, "exact_match": 1.0} and result.items[0].gold == "out"
    assert "half\ufffd" in result.items[1].prompt and result.items[1].gold == "x\ufffd"
    one_result(task, model, PromptConfig(shots=5))
    assert model.requests[-1].prompt.count("Output: did") == 3, "as many examples as there are"
    held_out = tmp_path / "splits" / "default" / "test_tasks.txt"
    held_out.write_text("two\nthree\n")
    [task] = load_tasks("natural_instructions", [str(held_out)])
    assert [item.fields["task"] for item in task.items] == ["two", "two", "three", "three"]
    held_out.write_text("two\nfour\n")
    with pytest.raises(UserError, match=r"test_tasks.txt:2: there is no four.json in"):
        load_tasks("natural_instructions", [str(held_out)])
    bad = tmp_path / "bad.json"
    for change, words in (
        ({"Definition": 0, "Instances": []}, "bad.json: Instances must be a list"),
        ({"Instances": [{"input": "x"}]}, "bad.json: instance 1: an example has the fields"),
    ):
        bad.write_text(json.dumps(natural_task("bad") | change))
        with pytest.raises(UserError, match=words):
            load_tasks("natural_instructions", [str(bad)])
    bad.write_text("[]")
    with pytest.raises(UserError, match="this is not a task of natural instructions"):
        load_tasks("natural_instructions", [str(bad)])
    with pytest.raises(UserError, match="name their JSON files"):
        load_tasks("natural_instructions")
    with pytest.raises(UserError, match="leave out --examples"):
        load_tasks("natural_instructions", [str(tmp_path / "tasks")], ["x.jsonl"])
