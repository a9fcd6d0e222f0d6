"""Tasks that are evaluated while a model trains."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.io.safetensors import read_file
from firth.runs.evaluate_prompts import evaluate_prompts
from firth.runs.recipe import load
from firth.runs.run import run
from firth.types import UserError

SETTINGS = (
    "data.split_by=blank", "model.hidden_size=32", "model.num_layers=2", "model.num_heads=2", "tokenizer.vocab_size=400",
    "batch.size=8", "max_steps=4", "evaluation.every=2", "precision=fp32",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "text.txt").write_text("\n\n".join(list(topics.values())[:30]))
    words = [text.split()[:9] for text in list(topics.values())[:40]]
    rows = [{"sentence_good": " ".join(w), "sentence_bad": " ".join(w[::-1])} for w in words]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "ask.yaml").write_text(
        "task: ask\ndata: pairs.jsonl\noutput_type: generate_until\ndoc_to_text: sentence_good\ndoc_to_target: sentence_bad\n"
        "generation_kwargs: {max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n"
    )
    return folder


def train(folder: Path, out: str, *settings: str, recipe: str = "gpt") -> list[str]:
    """Train and return what was logged."""
    lines: list[str] = []
    name = [f"data.path={folder / 'text.txt'}", *SETTINGS, *settings]
    run(load(recipe, name), folder / out, lines.append)
    return lines


def tasks(folder: Path) -> str:
    pairs = f"{{name: minimal_pairs, data: {folder / 'pairs.jsonl'}, limit: 20}}"
    return f"evaluation.tasks=[in_context, {{name: copying, limit: 4}}, {pairs}, {{file: {folder / 'ask.yaml'}, limit: 2}}]"


def test_tasks_are_logged_and_change_no_weight(folder: Path) -> None:
    """The weights are those of a run without tasks to the bit; the last values are those of `firth evaluate`."""
    lines = train(folder, "with", tasks(folder), "examples.max_length=128")
    assert any("in_context: loss at token" in line for line in lines)
    train(folder, "without", "examples.max_length=128")
    mine, theirs = (read_file(folder / name / "model" / "model.safetensors") for name in ("with", "without"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    rows = [json.loads(line) for line in (folder / "with" / "metrics.jsonl").read_text().splitlines()]
    valid = [row for row in rows if row["split"] == "valid"]
    names = {name for name in valid[0] if name.startswith("task/")}
    assert [row["step"] for row in valid] == [2, 4]
    assert {"task/in_context_score", "task/copying_loss", "task/copying_accuracy"} < names
    assert {"task/minimal_pairs/acc", "task/ask/exact_match"} < names
    page = (folder / "with" / "report.html").read_text()
    assert "Loss early and late in the context" in page and "repeated random sequence" in page
    assert "Minimal pairs/acc" in page
    [[result]] = evaluate_prompts(
        [str(folder / "with")], ["minimal_pairs"], PromptConfig(limit=20), data=[str(folder / "pairs.jsonl")]
    )
    assert result.metrics["acc"].value == valid[-1]["task/minimal_pairs/acc"]


def test_a_task_can_choose_the_best_step(folder: Path) -> None:
    """A lower copying loss is better."""
    train(
        folder, "best", "evaluation.tasks=[{name: copying, limit: 2}]", "evaluation.best_metric=task/copying_loss",
        "evaluation.every=1",
    )  # fmt: skip
    rows = [json.loads(line) for line in (folder / "best" / "metrics.jsonl").read_text().splitlines()]
    values = {row["step"]: row["task/copying_loss"] for row in rows if row["split"] == "valid"}
    done = json.loads((folder / "best" / "done.json").read_text())
    assert done["exported_step"] == min(values, key=values.__getitem__)


def test_a_masked_model_is_scored_on_minimal_pairs(folder: Path) -> None:
    """Measures of a decoder and generated answers are refused before training."""
    pairs = f"evaluation.tasks=[{{name: minimal_pairs, data: {folder / 'pairs.jsonl'}, limit: 4}}]"
    train(folder, "mlm", pairs, "max_steps=2", recipe="roberta")
    assert '"task/minimal_pairs/acc"' in (folder / "mlm" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="copying measures a causal decoder"):
        train(folder, "no1", "evaluation.tasks=[copying]", recipe="roberta")
    with pytest.raises(UserError, match=r"pairs.jsonl.*bidirectional, so it cannot write"):
        train(folder, "no2", f"evaluation.tasks=[{{file: {folder / 'ask.yaml'}}}]", recipe="roberta")
    assert not (folder / "no1" / "metrics.jsonl").exists() and not (folder / "no2" / "metrics.jsonl").exists()


def test_wrong_tasks_are_refused_before_training(folder: Path) -> None:
    """With the field, the file and the line."""
    for settings, message in (
        ("evaluation.tasks=[nothing]", "there is no task 'nothing'"),
        ("evaluation.tasks=[minimal_pairs]", "there are no records"),
        (f"evaluation.tasks=[{{name: copying, data: {folder / 'pairs.jsonl'}}}]", "copying reads no data"),
        ("evaluation.tasks=[copying, copying]", "names copying twice"),
        ("evaluation.tasks=[{limit: 3}]", "has either a name"),
        ("evaluation.tasks=[{name: copying, limit: 0}]", "limit"),
        ("evaluation.tasks=[{nam: copying}]", "no field 'nam' in EvalTask; did you mean 'name'"),
    ):
        with pytest.raises(UserError, match=message):
            train(folder, "wrong", settings)
    long = {"sentence_good": "word " * 2000, "sentence_bad": "a b"}
    (folder / "long.jsonl").write_text(json.dumps(long) + "\n")
    with pytest.raises(UserError, match=r"long.jsonl:1.*tokens and this model reads at most"):
        train(folder, "wrong", f"evaluation.tasks=[{{name: minimal_pairs, data: {folder / 'long.jsonl'}}}]")
    assert not (folder / "wrong" / "metrics.jsonl").exists()
